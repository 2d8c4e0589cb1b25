"""What slides, bundles and URLs say is only text: no path, no HTML, no secret that is kept."""

from __future__ import annotations

import base64
import functools
import gzip
import hashlib
import http.server
import json
import os
import pickle
import re
import socket
import threading
import tracemalloc
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import numpy.typing as npt
import psutil
import pytest
import zarr
from bundles import pointwise_bundle, small_unet_bundle
from click.testing import CliRunner, Result
from pydicom import DataElement, Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.uid import (
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    VLWholeSlideMicroscopyImageStorage,
    generate_uid,
)

from wsi_pipeline.annotations.document import parse_document
from wsi_pipeline.cli import group
from wsi_pipeline.errors import AnnotationError, BundleError, SourceError
from wsi_pipeline.files.download import download, fetch_file
from wsi_pipeline.files.formats import dicom_slides
from wsi_pipeline.files.paths import as_path, without_secrets
from wsi_pipeline.options import ScheduleOptions, SelectOptions
from wsi_pipeline.run.jobs import plan_jobs
from wsi_pipeline.run.tile import tile
from wsi_pipeline.schedule.cluster import open_cluster
from wsi_pipeline.sources import open_source
from wsi_pipeline.sources.mpp import ome_mpp
from wsi_pipeline.viewer.run_view import open_shown

HOSTILE = "<script>alert(1)</script>"


def segment(slide: str, tmp_path: Path, *options: str) -> Result:
    model = tmp_path / "model"
    if not model.is_dir():
        pointwise_bundle(model, mpp=0.25)
    arguments = ["--model", str(model), "--output", str(tmp_path / "out"), "--device", "cpu"]
    return CliRunner().invoke(group, ["segment", slide, *arguments, *options])


def all_text(folder: Path) -> str:
    """Return what all files of a folder hold, with their names."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return "\n".join(f"{path}\n{path.read_bytes().decode('latin-1')}" for path in files)


# --- names -------------------------------------------------------------------------------------


class Tags(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


@pytest.mark.skipif(os.name == "nt", reason="no such file names there")
@pytest.mark.parametrize(
    "name", ["<img src=x onerror=alert(1)>", "a..", "a\nb", "\"quoted' &amp;", "a%2f..%2fx", "-rf"]
)
def test_a_slides_name_is_only_a_name(tmp_path: Path, slide_path: Path, name: str) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    os.link(slide_path, folder / f"{name}.tif")
    model = pointwise_bundle(tmp_path / "model", mpp=0.25)
    toml = (model / "model.toml").read_text("utf-8")
    (model / "model.toml").write_text(toml.replace('"Tumor"', f'"../{HOSTILE}"'), "utf-8")
    before = {path for path in tmp_path.rglob("*") if "out" not in path.parts}
    result = segment(str(folder), tmp_path)
    assert result.exit_code == 0, result.output
    output = tmp_path / "out"
    assert {path for path in tmp_path.rglob("*") if output not in (path, *path.parents)} == before
    (run,) = [path for path in output.iterdir() if path.is_dir()]
    assert (run / "run.json").is_file()
    tags = Tags((output / "report.html").read_text("utf-8")).found
    assert not {"iframe", "object"} & {tag for tag, _ in tags}
    assert [tag for tag, _ in tags].count("script") == 1
    assert all((a.get("src") or "data:").startswith("data:") for tag, a in tags if tag == "img")
    assert not [key for _, attributes in tags for key in attributes if key.startswith("on")]


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1/a/../../b.svs",
        "http://127.0.0.1/a/..",
        "http://127.0.0.1/x/%2e%2e%2f%2e%2e%2fb.svs",
        "memory://x/../../b.svs",
    ],
)
def test_a_urls_folder_lies_in_the_output(tmp_path: Path, url: str) -> None:
    (job,) = plan_jobs([as_path(url)], tmp_path / "out")
    folder = Path(os.path.normpath(job.folder))
    assert folder.parent == tmp_path / "out"


@pytest.mark.parametrize("color", ['"red;}</style><script>"', '["0", 0, 0]', "[0, 0, 256]"])
def test_a_colour_is_three_numbers(tmp_path: Path, slide_path: Path, color: str) -> None:
    model = pointwise_bundle(tmp_path / "model", mpp=0.25)
    toml = (model / "model.toml").read_text("utf-8")
    (model / "model.toml").write_text(toml.replace("[200, 0, 0]", color), "utf-8")
    result = segment(str(slide_path), tmp_path)
    assert result.exit_code == 1
    assert "output.classes[1].color" in result.output


def test_entries_of_a_zip_are_never_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "in" / "a.zarr.zip"
    path.parent.mkdir()
    axes = [{"name": axis, "type": "space"} for axis in "yx"]
    outside = {"axes": axes, "datasets": [{"path": "../../secret"}]}
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(".zgroup", '{"zarr_format": 2}')
        archive.writestr(".zattrs", json.dumps({"multiscales": [outside]}))
        archive.writestr("../../evil.txt", "x")
        archive.writestr("/evil.txt", "x")
    with pytest.raises(SourceError):
        open_source(path, mpp=1)
    assert sorted(tmp_path.rglob("*")) == [path.parent, path]


def test_xml_entities_are_not_multiplied() -> None:
    entities = "".join(
        f'<!ENTITY e{n} "{f"&e{n - 1};" * 10 if n else "x" * 10}">' for n in range(10)
    )
    bomb = f'<?xml version="1.0"?><!DOCTYPE OME [{entities}]><OME><Image ID="&e9;"/></OME>'
    assert ome_mpp(bomb, ifd=0, size=(1, 1)) == {}


# --- zarrs of others ---------------------------------------------------------------------------


REFUSED = "expected uint8|expected 8-bit|is not read"


class Payload:
    """What writes a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (os.mkdir, (str(self._path),))


def poison(array: Path, trap: Path) -> None:
    """Name pickle as the codec of an array of zarr 2, and give all chunks something to unpickle."""
    table = json.loads((array / ".zarray").read_text("utf-8"))
    for path in array.rglob("*"):
        if path.is_file() and not path.name.startswith("."):
            path.write_bytes(pickle.dumps(Payload(trap)))
    table |= {"dtype": "|O", "filters": [{"id": "vlen-utf8"}], "fill_value": ""}
    table |= {"compressor": {"id": "pickle"}}
    (array / ".zarray").write_text(json.dumps(table), "utf-8")


def write_zarr_slide(folder: Path, pixels: npt.NDArray[np.uint8], **options: Any) -> Path:
    """Write an OME-Zarr slide of one level, 0.4 or 0.5; return its folder."""
    version = options.pop("zarr_format", 2)
    root = zarr.open_group(folder, mode="w", zarr_format=version)
    root.create_array("0", data=pixels, **options)
    axes = [{"name": axis, "type": "space", "unit": "micrometer"} for axis in "yx"]
    scale = [{"type": "scale", "scale": [0.25, 0.25, 1.0]}]
    image = {
        "axes": [*axes, {"name": "c", "type": "channel"}],
        "datasets": [{"path": "0", "coordinateTransformations": scale}],
    }
    if version == 2:
        root.attrs.put({"multiscales": [{"version": "0.4", **image}]})
    else:
        root.attrs.put({"ome": {"version": "0.5", "multiscales": [image]}})
    return folder


@pytest.fixture
def unsafe(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let numcodecs unpickle, as all of its versions up to 0.16.5 do."""
    monkeypatch.setattr("numcodecs.pickles.ALLOW_UNSAFE_PICKLE_DECODE", True)


@pytest.mark.usefixtures("unsafe")
@pytest.mark.parametrize("command", ["export", "evaluate", "view", "segment"])
def test_a_run_folder_of_somebody_else_runs_no_code(
    tmp_path: Path, slide_path: Path, command: str
) -> None:
    assert segment(str(slide_path), tmp_path).exit_code == 0
    (run,) = (path.parent for path in (tmp_path / "out").glob("*/run.json"))
    for array in [path.parent for path in run.glob("mask.ome.zarr/**/.zarray")]:
        poison(array, tmp_path / "trap")
    if command == "segment":
        result = segment(str(slide_path), tmp_path, "--outputs", "tiff,png")
    elif command == "view":
        shown = open_shown(run)
        assert re.search(REFUSED, " ".join(shown.problems))
        shown.close()
        return
    else:
        more = [str(run)] if command == "evaluate" else ["--simplify", "0", "--outputs", "overlay"]
        result = CliRunner().invoke(group, [command, str(run), *more])
        assert result.exit_code == 1
        assert re.search(REFUSED, result.output)
    assert not (tmp_path / "trap").exists()
    assert result.exception is None or isinstance(result.exception, SystemExit)


@pytest.mark.usefixtures("unsafe")
@pytest.mark.filterwarnings("ignore:Numcodecs codecs")
def test_a_zarr_slide_and_a_patch_grid_of_somebody_else_run_no_code(
    tmp_path: Path, slide_path: Path
) -> None:
    pixels = np.full((100, 120, 3), 200, np.uint8)
    slide = write_zarr_slide(tmp_path / "a.zarr", pixels, chunks=(64, 64, 3))
    poison(slide / "0", tmp_path / "trap")
    with pytest.raises(SourceError, match=REFUSED):
        open_source(slide)
    options = {"patch_size": 256, "overlap": 0, "select": SelectOptions()}
    tile(slide_path, tmp_path / "grid.zarr", mpp=0.25, **options)
    for name in ("patches", "pixels"):
        path = tmp_path / "grid.zarr" / name / "zarr.json"
        text = path.read_text("utf-8")
        table = json.loads(text)
        packed = {"name": "numcodecs.lzma", "configuration": {}}
        path.write_text(json.dumps({**table, "codecs": [table["codecs"][0], packed]}), "utf-8")
        with pytest.raises(SourceError, match="lzma"):
            open_source(tmp_path / "grid.zarr")
        path.write_text(text, "utf-8")
    assert not (tmp_path / "trap").exists()


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("kind", ["blosc", "gzip", "zstd"])
def test_a_chunk_takes_no_more_room_than_it_may(tmp_path: Path, version: int, kind: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (100, 120, 3), np.uint8)
    codec: Any = {"id": kind} if version == 2 else {"name": kind, "configuration": {}}
    slide = write_zarr_slide(
        tmp_path / "a.zarr", pixels, zarr_format=version, compressors=codec, chunks=(64, 64, 3)
    )
    with open_source(slide) as opened:
        np.testing.assert_array_equal(opened.at(0.25).read((0, 0), (100, 120)), pixels)
    bomb = {"blosc": numcodecs.Blosc(), "gzip": numcodecs.GZip(9), "zstd": numcodecs.Zstd()}[kind]
    packed = bytes(bomb.encode(bytes(1 << 28)))
    for path in (slide / "0").rglob("*"):
        if path.is_file() and path.name not in (".zarray", ".zattrs", "zarr.json"):
            path.write_bytes(packed)
    tracemalloc.start()
    try:
        with open_source(slide) as opened, pytest.raises(SourceError, match="cannot be read"):
            opened.at(0.25).read((0, 0), (100, 120))
        assert tracemalloc.get_traced_memory()[1] < 1 << 25
    finally:
        tracemalloc.stop()


def test_chunks_are_neither_too_large_nor_too_small(tmp_path: Path) -> None:
    large = np.zeros((9000, 9000, 1), np.uint8)
    with pytest.raises(SourceError, match="do not fit in memory"):
        open_source(write_zarr_slide(tmp_path / "a.zarr", large, chunks=(9000, 9000, 1)))
    small = np.zeros((64, 64, 3), np.uint8)
    with pytest.raises(SourceError, match="too small to be read in good time"):
        open_source(write_zarr_slide(tmp_path / "b.zarr", small, chunks=(1, 1, 3)))
    path = tmp_path / "c.zarr.zip"
    whole = write_zarr_slide(tmp_path / "c.zarr", small, chunks=(64, 64, 3))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in whole.rglob("*"):
            if file.is_file():
                archive.write(file, file.relative_to(whole))
        archive.writestr("0/9.9.9", bytes(1 << 27))
    with pytest.raises(SourceError, match="chunks that fit in memory"):
        open_source(path)


def test_large_chunks_are_read_one_by_one_and_whole(tmp_path: Path) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (2300, 2600, 3), np.uint8)
    slide = write_zarr_slide(tmp_path / "a.zarr", pixels, chunks=(1200, 1300, 3))
    with open_source(slide) as opened:
        found = opened.at(0.25).read((1100, 1250), (1150, 1301))
        np.testing.assert_array_equal(found, pixels[1100:2250, 1250:2551])


# --- what unpacks to much ------------------------------------------------------------------------


@contextmanager
def bounded(most: int) -> Iterator[None]:
    """Let the body take so many bytes at most, as far as Python knows of them."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < most
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("kind", [VLWholeSlideMicroscopyImageStorage, CTImageStorage])
def test_a_deflated_dicom_is_not_unpacked_to_look_at(tmp_path: Path, kind: str) -> None:
    header = Dataset()
    header.SOPClassUID, header.SOPInstanceUID = kind, generate_uid()
    header.file_meta = FileMetaDataset()
    header.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    header["PixelData"] = DataElement("PixelData", "OB", bytes(1 << 27))
    path = tmp_path / "a.dcm"
    header.save_as(path, enforce_file_format=True)
    assert path.stat().st_size < 1 << 18
    with bounded(1 << 26):
        assert dicom_slides([path]) == ([path] if "77.1.6" in kind else [])


@pytest.mark.parametrize(
    "content",
    [gzip.compress(bytes(1 << 28)), b"[" * 1_000_000, b'{"a":' * 100_000],
    ids=["gzip", "lists", "tables"],
)
def test_a_geojson_bomb_is_refused(content: bytes) -> None:
    with (
        bounded(1 << 28),
        pytest.raises(AnnotationError, match=r"gzip data unpack|nested too deeply"),
    ):
        parse_document(content)


# --- secrets -----------------------------------------------------------------------------------


class Ranges(http.server.SimpleHTTPRequestHandler):
    """Serves parts of files, as object stores do."""

    def do_GET(self) -> None:
        data = Path(self.translate_path(self.path)).read_bytes()
        asked = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        start, stop = 0, len(data)
        if asked:
            start, stop = int(asked[1]), min(int(asked[2] or stop) + 1, stop)
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(stop - start))
        self.end_headers()
        self.wfile.write(data[start:stop])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def served(tmp_path: Path, slide_path: Path) -> Iterator[str]:
    """Return the address of a server of one slide."""
    folder = tmp_path / "served"
    folder.mkdir()
    os.link(slide_path, folder / "a.tif")
    handler = functools.partial(Ranges, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("name", ["a.tif", "none.tif"])
def test_secrets_of_a_url_and_of_the_environment_are_neither_kept_nor_shown(
    tmp_path: Path, served: str, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "tip-top-secret")
    url = f"http://me:open-sesame@{served}/{name}?X-Amz-Signature=signed-secret"
    result = segment(url, tmp_path)
    assert result.exit_code == (0 if name == "a.tif" else 1), result.output
    kept = all_text(tmp_path / "out")
    run = json.loads((tmp_path / "out" / Path(name).stem / "run.json").read_text("utf-8"))
    assert run["slide"]["path"] == f"http://{served}/{name}"
    assert run["slide"]["name"] == name
    for secret in ("open-sesame", "signed-secret", "X-Amz-Signature", "tip-top-secret"):
        assert secret not in kept + result.output


@pytest.mark.parametrize("name", ["model.toml", "none.toml"])
@pytest.mark.parametrize("command", ["segment", "models show", "info"])
def test_secrets_of_a_models_url_are_not_shown(
    tmp_path: Path, served: str, monkeypatch: pytest.MonkeyPatch, name: str, command: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    made = small_unet_bundle(tmp_path / "made")
    text = (made / "model.toml").read_text("utf-8")
    numbers = (made / "model.safetensors").read_bytes()
    (tmp_path / "served" / "model.safetensors").write_bytes(numbers)
    weights = f"http://me:open-sesame@{served}/model.safetensors?sig=signed-secret"
    entry = f'{{ url = "{weights}", sha256 = "{hashlib.sha256(numbers).hexdigest()}" }}'
    text = text.replace('"model.safetensors"', entry)
    (tmp_path / "served" / "model.toml").write_text(text, "utf-8")
    url = f"http://me:open-sesame@{served}/{name}?X-Amz-Signature=signed-secret"
    slide = str(tmp_path / "served" / "a.tif")
    line = {
        "segment": ["segment", slide, "--model", url, "--output", str(tmp_path / "out")],
        "models show": ["models", "show", url, "--json"],
        "info": ["info", f"http://me:open-sesame@{served}/a.tif?sig=signed-secret", "--json"],
    }[command]
    result = CliRunner().invoke(group, line)
    assert isinstance(result.exception, SystemExit | None), result.exception
    fine = command == "info" or name == "model.toml"
    assert result.exit_code == (0 if fine else 1), result.output
    kept = all_text(tmp_path / "out") if (tmp_path / "out").exists() else ""
    for secret in ("open-sesame", "signed-secret"):
        assert secret not in kept + result.output


@pytest.mark.parametrize(
    "url", ["http://me:open-sesame@nowhere.invalid:x/m.toml", "ftp://me:open-sesame@h/m?sig=secret"]
)
def test_secrets_of_an_odd_url_are_not_shown(url: str) -> None:
    with pytest.raises(BundleError) as caught:
        download(url, "0" * 64)
    assert not re.search("sesame|secret", str(caught.value))


def test_a_server_is_told_who_asks_and_others_are_not(tmp_path: Path) -> None:
    asked: list[tuple[str, str | None]] = []

    class Sends(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append((self.path, self.headers.get("Authorization")))
            self.send_response(302 if self.path == "/first" else 200)
            if self.path == "/first":
                self.send_header("Location", "/second")
            self.end_headers()
            self.wfile.write(b"" if self.path == "/first" else b"weights")

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Sends) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        url = f"http://me:open%20sesame@127.0.0.1:{server.server_port}/first"
        fetch_file(url, tmp_path / "w")
        assert (tmp_path / "w").read_bytes() == b"weights"
        with pytest.raises(BundleError, match="has more than"):
            fetch_file(f"http://127.0.0.1:{server.server_port}/large", tmp_path / "x", most=3)
        server.shutdown()
        thread.join()
    basic = "Basic " + base64.b64encode(b"me:open sesame").decode()
    assert asked == [("/first", basic), ("/second", None), ("/large", None)]
    assert [path.name for path in tmp_path.iterdir()] == ["w"]


def test_what_is_no_url_keeps_its_marks() -> None:
    for text in ("a?b@c", "slides/what?.svs: why? me@home", "C:\\a@b\\c.svs"):
        assert without_secrets(text) == text
    assert without_secrets("s3://key:secret@bucket/a.svs?versionId=1 is, s3://b/c is") == (
        "s3://bucket/a.svs is, s3://b/c is"
    )


# --- the network -------------------------------------------------------------------------------


def test_dask_listens_on_loopback_only() -> None:
    process = psutil.Process()

    def listening() -> set[tuple[str, int]]:
        connections = process.net_connections("inet")
        return {tuple(c.laddr) for c in connections if c.status == psutil.CONN_LISTEN}

    before = listening()
    with open_cluster(ScheduleOptions(workers=2)):
        hosts = {host for host, _ in listening() - before}
        assert hosts <= {"127.0.0.1", "::1"}
    with socket.socket() as own:  # what is looked at can fail
        own.bind(("127.0.0.1", 0))
        own.listen()
        assert own.getsockname() in listening()
