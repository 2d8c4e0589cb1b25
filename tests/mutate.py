"""Damage slides: every mutation is drawn from a seed, and knows a little of the format."""

from __future__ import annotations

import json
import random
import re
import shutil
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pydicom
import tifffile

INTEGERS = (
    *(0, 1, 2, 3, 7, 8, 9, 16, 255, 256, 257, 32767, 32768, 65535, 65536, 1 << 20, 1 << 24),
    *((1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 40, (1 << 63) - 1, (1 << 64) - 1),
)
NUMBERS = (
    *(b"0", b"-1", b"1", b"0.0", b"1e-300", b"1e309", b"nan", b"inf", b"4294967296"),
    *(b"99999999999999999999", b"", b"x", b"\0", b"../..", b"0x10", b"1,5", b"-0"),
)
VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 2, 3, 65536, 1 << 31, 1 << 62, 1 << 80, 1e308, float("nan")),
    *(float("inf"), "", "x", "../../x", "a\0b", "<b>", "é" * 999, [], [[]], [1], {}, {"a": 1}),
)
Span = tuple[int, int]
"""Offset and length in a file."""


def mutate(original: Path, folder: Path, draw: random.Random) -> Path:
    """Write a damaged copy of a slide into a folder; return its path."""
    path = folder / original.name
    if original.is_dir():
        members = _members(original)
        _mutate_members(members, draw)
        for name, data in members.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(data)
        return path
    if original.suffix == ".mrxs":
        return _mutate_mirax(original, folder, draw)
    if original.suffix == ".zip" and draw.random() < 0.7:
        return _mutate_zip(original, path, draw)
    data = bytearray(original.read_bytes())
    kinds = _kinds(original)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        draw.choice(kinds)(data, draw)
    path.write_bytes(data)
    return path


Mutation = Callable[[bytearray, random.Random], None]


def _kinds(original: Path) -> list[Mutation]:
    """Return what may be done to a file; what knows the format comes up more often."""
    with original.open("rb") as file:
        head = file.read(132)
    if head[128:] == b"DICM":
        return [*_GENERIC, *[_in(_dicom_spans(original))] * 8]
    if original.suffix in TEXTS:
        return [*_GENERIC, *[_text] * 6, *[_json] * 6 * head.startswith(b"{")]
    if head[:2] in (b"II", b"MM"):
        layout = _tiff_layout(original)
        own = [layout.change_entry, layout.change_value, layout.change_tile, layout.change_chain]
        return [*_GENERIC, *own * 2, layout.change_entry, layout.change_value, layout.change_text]
    return [*_GENERIC, *_GENERIC, _in(((0, 200),))]


# --- any file ----------------------------------------------------------------------------------


def truncate(data: bytearray, draw: random.Random) -> None:
    """Cut the end off, at any place or near either end."""
    size = len(data)
    del data[draw.choice((draw.randrange(size + 1), min(size, draw.randrange(600)), size - 1)) :]


def flip(data: bytearray, draw: random.Random) -> None:
    """Turn a few bits over, often near the beginning."""
    for _ in range(draw.randint(1, 16)):
        if data:
            limit = len(data) if draw.random() < 0.5 else min(len(data), 4096)
            data[draw.randrange(limit)] ^= 1 << draw.randrange(8)


def overwrite(data: bytearray, draw: random.Random) -> None:
    """Put zeros, ones or noise over a stretch."""
    start, length = draw.randrange(len(data) + 1), draw.choice((1, 4, 100, 5000))
    length = min(length, len(data) - start)
    data[start : start + length] = draw.choice(
        (bytes(length), b"\xff" * length, draw.randbytes(length))
    )


def shift(data: bytearray, draw: random.Random) -> None:
    """Take bytes out or put some in, so that all behind them lie elsewhere."""
    start = draw.randrange(len(data) + 1)
    if draw.random() < 0.5:
        del data[start : start + draw.choice((1, 2, 100))]
    else:
        data[start:start] = draw.randbytes(draw.choice((1, 2, 100)))


_GENERIC: list[Mutation] = [truncate, flip, overwrite, shift]
TEXTS = (".txt", ".csv", ".toml", ".json", ".geojson")


def _text(data: bytearray, draw: random.Random) -> None:
    data[:] = change_text(bytes(data), draw)


def _json(data: bytearray, draw: random.Random) -> None:
    data[:] = change_json(bytes(data), draw)


def change_text(data: bytes, draw: random.Random) -> bytes:
    """Return a text with a number replaced, or a piece taken out, doubled or replaced by noise."""
    numbers = list(re.finditer(rb"-?\d+(\.\d+)?", data))
    if numbers and draw.random() < 0.7:
        start, end = draw.choice(numbers).span()
        return data[:start] + draw.choice(NUMBERS) + data[end:]
    start = draw.randrange(len(data) + 1)
    end = start + draw.choice((1, 1, 5, 40, 400))
    piece = draw.choice((b"", data[start:end] * 2, draw.randbytes(3), b"<", b'"', b"\0", b"&x;"))
    return data[:start] + piece + data[end:]


def _in(spans: tuple[Span, ...]) -> Mutation:
    """Return a mutation of a field at one of some places."""

    def change(data: bytearray, draw: random.Random) -> None:
        start, length = draw.choice(spans)
        size = draw.choice((1, 2, 4, 8))
        at = start + draw.randrange(max(length - size, 0) + 1)
        _put(data, at, size, draw.choice("<>"), draw)

    return change


def _put(data: bytearray, at: int, size: int, order: str, draw: random.Random) -> None:
    """Write a number that is odd somewhere, or near the size of the file."""
    number = draw.choice((*INTEGERS, len(data), len(data) - 1, draw.getrandbits(64)))
    field = (number % (1 << 8 * size)).to_bytes(size, "little" if order == "<" else "big")
    if 0 <= at <= len(data) - size:
        data[at : at + size] = field


# --- TIFF --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class TiffLayout:
    """Where what lies in a TIFF.

    Attributes:
        order: of bytes, as `struct` has it.
        big: whether it is a BigTIFF.
        directories: their offsets.
        entries: offsets of the entries of all directories.
        values: offset, length and size of one item, of what lies outside the entries.
        texts: descriptions.
        tiles: stored bytes.
    """

    order: str
    big: bool
    directories: tuple[int, ...]
    entries: tuple[int, ...]
    values: tuple[tuple[int, int, int], ...]
    texts: tuple[Span, ...]
    tiles: tuple[Span, ...]

    def change_entry(self, data: bytearray, draw: random.Random) -> None:
        """Change code, type, count or value of a tag."""
        word = 8 if self.big else 4
        fields = ((0, 2), (2, 2), (4, word), (4 + word, word), (4 + word, 2), (4 + word, word))
        at, size = draw.choice(fields)
        _put(data, draw.choice(self.entries) + at, size, self.order, draw)

    def change_value(self, data: bytearray, draw: random.Random) -> None:
        """Change one of the values of a tag, such as the offset of a tile."""
        if not self.values:
            return
        start, length, size = draw.choice(self.values)
        at = start + draw.randrange(max(length // size, 1)) * size
        _put(data, at, size, self.order, draw)

    def change_chain(self, data: bytearray, draw: random.Random) -> None:
        """Change how many entries a directory has, or where the next one is."""
        at = draw.choice(self.directories)
        counter, entry, word = (8, 20, 8) if self.big else (2, 12, 4)
        if draw.random() < 0.5:
            _put(data, at, counter, self.order, draw)
            return
        count = int.from_bytes(data[at : at + counter], "little" if self.order == "<" else "big")
        end = at + counter + entry * count
        if draw.random() < 0.5:
            _put(data, end, word, self.order, draw)
        elif end + word <= len(data):
            limit = 1 << 8 * word
            there = draw.choice(self.directories) % limit
            data[end : end + word] = struct.pack(self.order + "QI"[word == 4], there)

    def change_tile(self, data: bytearray, draw: random.Random) -> None:
        """Change a few bytes of a tile, or all of it."""
        if not self.tiles:
            return
        start, length = draw.choice(self.tiles)
        tile = data[start : start + length]
        draw.choice((flip, flip, overwrite))(tile, draw)
        data[start : start + length] = draw.choice((tile, tile, tile, bytes(len(tile))))

    def change_text(self, data: bytearray, draw: random.Random) -> None:
        """Change a description, which keeps its length."""
        if not self.texts:
            return
        start, length = draw.choice(self.texts)
        text = change_text(bytes(data[start : start + length]), draw)
        data[start : start + length] = text[:length].ljust(length, b"\0")


@cache
def _tiff_layout(path: Path) -> TiffLayout:
    with tifffile.TiffFile(path) as file:
        pages = [p for page in file.pages for p in (page, *(page.pages or ()))]
        tags = [tag for page in pages for tag in page.tags]
        word = 8 if file.is_bigtiff else 4
        return TiffLayout(
            order=file.byteorder,
            big=file.is_bigtiff,
            directories=tuple(page.offset for page in pages),
            entries=tuple(tag.offset for tag in tags),
            values=tuple(
                (tag.valueoffset, tag.valuebytecount, max(tag.valuebytecount // tag.count, 1))
                for tag in tags
                if tag.valuebytecount > word
            ),
            texts=tuple((t.valueoffset, t.valuebytecount) for t in tags if t.dtype == 2),
            tiles=tuple(
                span
                for page in pages
                for span in list(zip(page.dataoffsets, page.databytecounts, strict=True))[:50]
            ),
        )


# --- DICOM -------------------------------------------------------------------------------------


@cache
def _dicom_spans(path: Path) -> tuple[Span, ...]:
    """Return where the elements of a DICOM file lie, with their heads."""

    def walk(dataset: Any) -> Iterator[Span]:
        for element in dataset:
            if element.VR == "SQ":
                for item in element.value:
                    yield from walk(item)
            elif element.file_tell:
                size = len(element.value) if isinstance(element.value, bytes | str) else 4
                yield element.file_tell - 8, 8 + min(size, 64)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of values that are longer than allowed
        dataset = pydicom.dcmread(path)
        return (*walk(dataset.file_meta), *walk(dataset))


# --- several files -----------------------------------------------------------------------------


def _members(folder: Path) -> dict[str, bytes]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def _mutate_members(members: dict[str, bytes], draw: random.Random) -> None:
    """Change a member or two, metadata more often than chunks."""
    for _ in range(draw.choice((1, 1, 2))):
        metadata = [name for name in members if _is_metadata(name)]
        name = draw.choice(metadata if metadata and draw.random() < 0.7 else list(members))
        if draw.random() < 0.1:
            del members[name]
            continue
        if _is_metadata(name) and draw.random() < 0.8:
            members[name] = change_json(members[name], draw)
            continue
        data = bytearray(members[name])
        draw.choice(_GENERIC)(data, draw)
        members[name] = bytes(data)


def _is_metadata(name: str) -> bool:
    return name.endswith((".zattrs", ".zarray", ".zgroup", *TEXTS))


def change_json(data: bytes, draw: random.Random) -> bytes:
    """Return JSON of which one value somewhere is another, is missing or comes twice."""
    try:
        root = [json.loads(data)]
    except ValueError:  # it has been changed before
        return change_text(data, draw)
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        keys = list(node) if isinstance(node, dict) else range(len(node))
        for key in keys:
            places.append((node, key))
            if isinstance(node[key], dict | list):
                walk(node[key])

    walk(root)
    node, key = draw.choice(places)
    chance = draw.random()
    if chance < 0.7:
        node[key] = draw.choice(VALUES)
    elif chance < 0.85 and node is not root:
        del node[key]
    elif isinstance(node, list):
        node.insert(key, node[key])
    return json.dumps(root[0]).encode()


def _mutate_zip(original: Path, path: Path, draw: random.Random) -> Path:
    with zipfile.ZipFile(original) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    _mutate_members(members, draw)
    compression = draw.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    with zipfile.ZipFile(path, "w", compression) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of names that come twice
        for name, data in members.items():
            archive.writestr(name, data)
            if draw.random() < 0.02:
                archive.writestr(draw.choice((name, f"../{name}", f"/{name}")), data)
    return path


def _mutate_mirax(original: Path, folder: Path, draw: random.Random) -> Path:
    """Change one of the files of a MIRAX slide; the others are links."""
    path, parts = folder / original.name, folder / original.stem
    parts.mkdir()
    sources = sorted(original.with_suffix("").iterdir())
    weights = [8 if part.suffix == ".ini" or part.name == "Index.dat" else 1 for part in sources]
    (chosen,) = draw.choices(sources, weights)
    for part in sources:
        if part != chosen:
            (parts / part.name).symlink_to(part)
    data = bytearray(chosen.read_bytes())
    if chosen.suffix == ".ini":
        data = bytearray(change_text(bytes(data), draw))
    else:
        draw.choice((*_GENERIC, *[_in(((0, len(data)),))] * 6))(data, draw)
    (parts / chosen.name).write_bytes(data)
    shutil.copyfile(original, path)
    return path
