"""Zarr arrays that others may have written: no code of theirs runs, no chunk outgrows its size."""

from __future__ import annotations

import asyncio
import itertools
import math
import os
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, cast

import imagecodecs
import numpy as np
import numpy.typing as npt
import zarr
from numcodecs.abc import Codec as V2Codec
from zarr.abc.codec import BytesBytesCodec
from zarr.codecs import ShardingCodec
from zarr.storage import LocalStore

from wsi_pipeline.geometry import Block

Array: TypeAlias = "zarr.Array[Any]"

# zarr hands chunks to whatever their metadata name, pickle among them, and lets it unpack as much
# as it likes. These get the room that a chunk may take and fail where that is not enough.
DECODERS: Mapping[str, Callable[..., bytes | bytearray]] = {
    "blosc": imagecodecs.blosc_decode,
    "bz2": imagecodecs.bz2_decode,
    "gzip": imagecodecs.gzip_decode,
    "lz4": partial(imagecodecs.lz4_decode, header=True),
    "zlib": imagecodecs.zlib_decode,
    "zstd": imagecodecs.zstd_decode,
}
"""What is unpacked, by the names that zarr's metadata have for it."""
HARMLESS = ("bytes", "crc32c", "transpose")
"""Codecs of zarr 3 that give about as many bytes as they take."""
SLACK = 64
"""Bytes that a checksum may add to a chunk."""
MAX_CHUNK = 1 << 26
"""Bytes of a chunk: several are in memory at once, of each worker."""
MIN_CHUNK = 1 << 10
"""Values of a chunk: each costs milliseconds, whatever it holds."""
FEW = 64
"""Chunks that may be smaller, as those of a pyramid's last levels are."""
MAX_WHOLE = 1 << 28
"""Bytes of an array that is read whole."""


def trusted(array: object, kind: npt.DTypeLike = np.uint8) -> Array:
    """Check an opened array; return it, its chunks unpacked by `DECODERS`, into bounded room.

    Raises:
        ValueError: no array, one of other values, unknown codecs, chunks too large or too small.
    """
    if not isinstance(array, zarr.Array):
        raise ValueError("no array where one should be")
    if array.dtype != np.dtype(kind):
        raise ValueError(f"an array of {array.dtype}; expected {np.dtype(kind)}")
    length = math.prod(array.chunks)
    count = math.prod(-(-n // chunk) for n, chunk in zip(array.shape, array.chunks, strict=True))
    if length * array.dtype.itemsize > MAX_CHUNK:
        raise ValueError(f"chunks of {array.chunks}, which do not fit in memory")
    if length < MIN_CHUNK and count > FEW:
        raise ValueError(f"{count:,} chunks of {array.chunks}: too small to be read in good time")
    metadata: Any = array.metadata
    if metadata.zarr_format == 2:
        if metadata.filters:
            raise ValueError(f"filter {_name(metadata.filters[0])!r} is not read")
        packed = metadata.compressor
        bounded = replace(
            metadata, compressor=packed and _Bounded2(packed, length * array.dtype.itemsize + SLACK)
        )
    else:
        bounded = replace(metadata, codecs=tuple(map(_bounded, metadata.codecs)))
    inner: Any = array._async_array
    # Before zarr 3.1.4 the attribute was private.
    config = inner.config if hasattr(inner, "config") else inner._config
    return zarr.Array(zarr.AsyncArray(metadata=bounded, store_path=inner.store_path, config=config))


def read_whole(array: object, kind: npt.DTypeLike) -> npt.NDArray[Any]:
    """Read all of a small array, checked as by `trusted`; return its values.

    Raises:
        ValueError: it is too large, or not what it should be.
    """
    checked = trusted(array, kind)
    if checked.nbytes > MAX_WHOLE:
        raise ValueError(f"an array of {checked.shape}, which does not fit in memory")
    return np.asarray(checked[:])


def _name(codec: Any) -> str:
    """Return the name of a codec, of either version of zarr."""
    found = codec.codec_id if isinstance(codec, V2Codec) else codec.to_dict()["name"]
    return str(found).removeprefix("numcodecs.")


def _decode(codec: Any, packed: Any, room: int) -> bytes | bytearray:
    return DECODERS[_name(codec)](packed, out=room)


def _known(codec: Any) -> None:
    if _name(codec) not in DECODERS:
        raise ValueError(f"codec {_name(codec)!r} is not read; expected {', '.join(DECODERS)}")


class _Bounded2(V2Codec):  # type: ignore[misc]  # ships no types
    """A codec of zarr 2 that unpacks into bounded room."""

    codec_id = "bounded"

    def __init__(self, codec: Any, room: int) -> None:
        _known(codec)
        self._codec, self._room = codec, room

    def get_config(self) -> Any:
        return self._codec.get_config()

    def encode(self, buf: Any) -> Any:
        return self._codec.encode(buf)

    def decode(self, buf: Any, out: Any = None) -> Any:
        return _decode(self._codec, buf, self._room)


@dataclass(frozen=True)
class _Bounded3(BytesBytesCodec):
    """A codec of zarr 3 that unpacks into bounded room."""

    codec: BytesBytesCodec
    is_fixed_size = False

    def to_dict(self) -> Any:
        return self.codec.to_dict()

    def compute_encoded_size(self, input_byte_length: int, chunk_spec: Any) -> int:
        return self.codec.compute_encoded_size(input_byte_length, chunk_spec)

    async def _encode_single(self, chunk_data: Any, chunk_spec: Any) -> Any:
        return await self.codec._encode_single(chunk_data, chunk_spec)

    async def _decode_single(self, chunk_data: Any, chunk_spec: Any) -> Any:
        itemsize = chunk_spec.dtype.to_native_dtype().itemsize
        room = math.prod(chunk_spec.shape) * itemsize + SLACK
        # Codecs leave Python's lock alone, so that chunks are unpacked side by side.
        found = await asyncio.to_thread(_decode, self.codec, chunk_data.to_bytes(), room)
        return chunk_spec.prototype.buffer.from_bytes(found)


def _bounded(codec: Any) -> Any:
    """Return what stands for a codec of zarr 3."""
    if isinstance(codec, ShardingCodec):
        if odd := [_name(c) for c in codec.index_codecs if _name(c) not in HARMLESS]:
            raise ValueError(f"codec {odd[0]!r} of a shard's index is not read")
        return replace(codec, codecs=tuple(map(_bounded, codec.codecs)))
    if _name(codec) in HARMLESS:
        return codec
    _known(codec)
    return _Bounded3(codec)


def chunk_files(array: zarr.Array[Any], block: Block) -> list[Path]:
    """Return where the chunks (shards, where there are) of a block lie, also if none is there."""
    unit, folder = array.shards or array.chunks, cast("LocalStore", array.store).root / array.path
    axes = zip(block.start, block.stop, unit, strict=True)
    spans = (range(start // side, -(-stop // side)) for start, stop, side in axes)
    return [folder / array.metadata.encode_chunk_key(key) for key in itertools.product(*spans)]


def write_chunk(array: Array, file: Path, values: npt.NDArray[Any]) -> None:
    """Write a chunk of a local zarr 2 array in this thread, to the byte as zarr would.

    zarr's own writing goes through one event loop for all threads of a process, for which those
    wait.

    Args:
        file: one of `chunk_files`.
        values: at the array's end fewer than a chunk has; the rest is 0.
    """
    metadata: Any = array.metadata
    if values.shape != array.chunks:
        rest = [(0, side - n) for side, n in zip(array.chunks, values.shape, strict=True)]
        values = np.pad(values, rest)
    packed = metadata.compressor.encode(np.ascontiguousarray(values))
    file.parent.mkdir(parents=True, exist_ok=True)
    # Not seen before it is whole; named as zarr names it.
    partial = file.with_name(f"{file.name}.{uuid.uuid4().hex}.partial")
    try:
        partial.write_bytes(packed)
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)
