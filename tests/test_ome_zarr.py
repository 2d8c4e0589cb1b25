from __future__ import annotations

import json
import os
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from ome_zarr.io import parse_url
from ome_zarr.reader import Label, Reader
from ome_zarr_models.v04.image import Image as Image04
from ome_zarr_models.v05.image import Image as Image05

from wsi_pipeline.bundle import ClassInfo
from wsi_pipeline.export import level_shapes
from wsi_pipeline.export.ome_zarr import (
    build_pyramid,
    count_files,
    create_mask,
    is_empty,
    open_mask,
    read_mask,
    write_block,
)
from wsi_pipeline.geometry import Block, iter_blocks
from wsi_pipeline.options import Ngff

CLASSES = (
    ClassInfo(name="Background"),
    ClassInfo(name="Tumor", color=(200, 0, 0)),
    ClassInfo(name="Nécrose µ", color=(1, 2, 255)),
)
MPP = (0.2512, 0.25)  # y, x
NGFF = get_args(Ngff)


def blobs(shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    """Return a label map with classes 0 to 2 in large patches and single pixels."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 3, size=(shape[0] // 97 + 1, shape[1] // 89 + 1), dtype=np.uint8)
    labels = np.repeat(np.repeat(coarse, 97, axis=0), 89, axis=1)[: shape[0], : shape[1]].copy()
    y, x = rng.integers(0, shape[0], 50), rng.integers(0, shape[1], 50)
    labels[y, x] = rng.integers(0, 3, 50)
    return labels


def written(path: Path, labels: np.ndarray, ngff: Any) -> Path:
    mask = create_mask(
        path, labels.shape, classes=CLASSES, mask_mpp=MPP, ngff=ngff, name="slide & <1>"
    )
    for block in iter_blocks(labels.shape, (4096, 4096)):
        write_block(mask, block, labels[block.slices])
    build_pyramid(path, CLASSES)
    return path


def metadata_of(path: Path, ngff: str) -> dict[str, Any]:
    if ngff == "0.4":
        return json.loads((path / ".zattrs").read_text("utf-8"))
    return json.loads((path / "zarr.json").read_text("utf-8"))["attributes"]["ome"]


def files_in(path: Path) -> list[Path]:
    return [p.relative_to(path) for p in path.rglob("*") if p.is_file()]


@pytest.mark.parametrize("ngff", NGFF)
@settings(max_examples=8, deadline=None)
@given(shape=st.tuples(st.integers(1, 2600), st.integers(1, 2600)), seed=st.integers(0, 2**32 - 1))
def test_every_level_is_every_second_pixel_of_the_one_below(
    ngff: str, shape: tuple[int, int], seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    labels = blobs(shape, seed)
    path = written(tmp_path_factory.mktemp("z") / "m.zarr", labels, ngff)
    datasets = (metadata_of(path, ngff).get("multiscales"))[0]["datasets"]
    group = zarr.open_group(path, mode="r")
    for level, dataset in enumerate(datasets):
        stored = group[dataset["path"]]
        assert stored.dtype == np.uint8
        assert np.array_equal(stored[:], labels[:: 2**level, :: 2**level])
    assert max(stored.shape) <= 1024
    assert len(datasets) == 1 or max(group[datasets[-2]["path"]].shape) > 1024


@pytest.mark.parametrize("ngff", NGFF)
def test_scales_keep_the_physical_extent(tmp_path: Path, ngff: str) -> None:
    path = written(tmp_path / "m.zarr", blobs((2999, 4100)), ngff)
    (multiscale,) = metadata_of(path, ngff)["multiscales"]
    extents = []
    for level, dataset in enumerate(multiscale["datasets"]):
        (transformation,) = dataset["coordinateTransformations"]
        assert transformation["type"] == "scale"
        assert transformation["scale"] == [0.2512 * 2**level, 0.25 * 2**level]
        shape = open_mask(path, level=level).shape
        extents.append(np.multiply(shape, transformation["scale"]))
        assert np.all(abs(extents[0] - extents[-1]) <= transformation["scale"])
    assert len(extents) == 4


@pytest.mark.parametrize("ngff", NGFF)
def test_metadata_follow_the_specification(tmp_path: Path, ngff: str) -> None:
    path = written(tmp_path / "m.zarr", blobs((1300, 700)), ngff)
    metadata = metadata_of(path, ngff)
    (multiscale,) = metadata["multiscales"]
    assert multiscale["name"] == "slide & <1>"
    assert multiscale["axes"] == [
        {"name": name, "type": "space", "unit": "micrometer"} for name in ("y", "x")
    ]
    # the root is an image: napari-ome-zarr takes a root that is a label for one of an image two
    # folders up, and makes a zarr group of that folder
    assert "image-label" not in metadata
    assert metadata["omero"]["channels"][0]["window"]["end"] == 2
    assert metadata_of(path / "labels", ngff)["labels"] == ["classes"]
    labels = metadata_of(path / "labels" / "classes", ngff)
    assert labels["multiscales"] == metadata["multiscales"]
    label = labels["image-label"]
    assert label["source"] == {"image": "../../"}
    assert label["colors"] == [
        {"label-value": 0, "rgba": [0, 0, 0, 0]},
        {"label-value": 1, "rgba": [200, 0, 0, 255]},
        {"label-value": 2, "rgba": [1, 2, 255, 255]},
    ]
    assert [(p["label-value"], p["class"]) for p in label["properties"]] == [
        (0, "Background"),
        (1, "Tumor"),
        (2, "Nécrose µ"),
    ]
    group = zarr.open_group(path, mode="r")
    if ngff == "0.4":
        assert group.metadata.zarr_format == 2
        assert multiscale["version"] == label["version"] == "0.4"
        assert Image04.from_zarr(group).labels
        assert json.loads((path / "0" / ".zarray").read_text())["dimension_separator"] == "/"
    else:
        assert group.metadata.zarr_format == 3
        assert metadata["version"] == "0.5"
        assert "version" not in multiscale
        assert Image05.from_zarr(group).labels
        for level in ("0", "1"):
            stored = json.loads((path / level / "zarr.json").read_text())
            assert stored["dimension_names"] == ["y", "x"]


@pytest.mark.parametrize("ngff", NGFF)
def test_ome_zarr_py_opens_it(tmp_path: Path, ngff: str) -> None:
    labels = blobs((2100, 1500))
    path = written(tmp_path / "m.zarr", labels, ngff)
    location = parse_url(path, mode="r")
    assert location is not None
    image, _, node = Reader(location)()
    for pixels in (image.data, node.data):
        assert [level.shape for level in pixels] == level_shapes(labels.shape)
        assert np.array_equal(np.asarray(pixels[0]), labels)
        assert np.array_equal(np.asarray(pixels[1]), labels[::2, ::2])
    # it is seen as labels, in their colours
    assert image.load(Label) is None
    assert node.load(Label) is not None
    assert node.metadata["color"][1] == [200 / 255, 0, 0, 1]
    assert node.metadata["properties"][2] == {"class": "Nécrose µ"}


@pytest.mark.parametrize("ngff", NGFF)
def test_napari_shows_labels_of_the_slides_size_in_their_colours(tmp_path: Path, ngff: str) -> None:
    reader = pytest.importorskip("napari_ome_zarr")
    labels = blobs((1300, 700))
    path = written(tmp_path / "out" / "slide" / "mask.ome.zarr", labels, ngff)
    image, shown = reader.napari_get_reader(str(path))()
    assert [kind for _, _, kind in (image, shown)] == ["image", "labels"]
    assert [about["visible"] for _, about, _ in (image, shown)] == [False, True]
    pixels, about, _ = shown
    assert np.array_equal(np.asarray(pixels[0]), labels)
    assert about["scale"] == [0.2512, 0.25]
    assert about["colormap"][2] == [1 / 255, 2 / 255, 1, 1]
    assert "contrast_limits" not in about  # a layer of labels takes none
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["slide"]


@pytest.mark.parametrize("ngff", NGFF)
def test_labels_are_shown_without_asking(tmp_path: Path, ngff: str) -> None:
    path = written(tmp_path / "m.zarr", blobs((1300, 700)), ngff)
    (image,) = metadata_of(path, ngff)["omero"]["channels"]
    (label,) = metadata_of(path / "labels" / "classes", ngff)["omero"]["channels"]
    assert (image["active"], label["active"]) == (False, True)
    assert image["color"] == label["color"] == "C80000"
    assert "window" not in label  # napari gives it to a layer that takes none


@pytest.mark.parametrize("ngff", NGFF)
def test_labels_take_no_space(tmp_path: Path, ngff: str) -> None:
    path = written(tmp_path / "m.zarr", blobs((1300, 700)), ngff)
    pixels = [p for p in files_in(path) if p.parts[0] != "labels" and len(p.parts) > 1]
    assert len(pixels) >= 4
    for name in pixels:
        assert (path / name).samefile(path / "labels" / "classes" / name)


def test_labels_are_copies_where_there_are_no_hard_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = os.link

    def refuse(source: Any, target: Any) -> None:
        if str(source).endswith(".partial"):  # zarr's own
            link(source, target)
        else:
            raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("os.link", refuse)
    labels = blobs((1300, 700))
    path = written(tmp_path / "m.zarr", labels, "0.4")
    copy = path / "labels" / "classes" / "0"
    assert np.array_equal(zarr.open_array(copy, mode="r")[:], labels)
    assert not (copy / "0" / "0").samefile(path / "0" / "0" / "0")


@pytest.mark.parametrize("ngff", NGFF)
@pytest.mark.parametrize("shape", [(1, 1), (1, 5000), (1024, 1024), (1025, 1024), (4097, 4096)])
def test_dry_run_counts_at_least_the_files_of_a_full_mask(
    tmp_path: Path, ngff: Any, shape: tuple[int, int]
) -> None:
    path = written(tmp_path / "m.zarr", np.ones(shape, np.uint8), ngff)
    assert len(files_in(path)) == count_files(shape, ngff)


@pytest.mark.parametrize("ngff", NGFF)
def test_background_is_not_stored(tmp_path: Path, ngff: Any) -> None:
    labels = np.zeros((5000, 5000), np.uint8)
    empty = written(tmp_path / "empty.zarr", labels, ngff)
    labels[4500, 4500] = 1
    dotted = written(tmp_path / "dotted.zarr", labels, ngff)
    every = set(files_in(dotted)) - set(files_in(empty))
    chunks = {chunk for chunk in every if chunk.parts[0] != "labels"}
    assert every == chunks | {Path("labels/classes") / chunk for chunk in chunks}
    assert Path("0/4/4" if ngff == "0.4" else "0/c/1/1") in chunks
    assert len(chunks) == 3  # 4500 is divisible by 2 and 4, but not by 8
    assert not open_mask(empty)[:].any()


@pytest.mark.parametrize("ngff", NGFF)
def test_a_block_done_again_replaces_what_was_there(tmp_path: Path, ngff: Any) -> None:
    path = written(tmp_path / "m.zarr", np.ones((2000, 1500), np.uint8), ngff)
    whole = Block(index=(0, 0), start=(0, 0), stop=(2000, 1500))
    write_block(open_mask(path), whole, np.zeros(whole.shape, np.uint8))
    build_pyramid(path, CLASSES)
    assert not open_mask(path, level=1)[:].any()
    assert not [p for p in files_in(path) if p.name.isdecimal()]  # no chunk is left


def test_empty_blocks_are_known_without_reading(tmp_path: Path) -> None:
    labels = np.zeros((3000, 3000), np.uint8)
    labels[2000, 100] = 1  # in chunk (1, 0)
    mask = open_mask(written(tmp_path / "m.zarr", labels, "0.4"))
    assert not is_empty(mask, Block(index=(0, 0), start=(1500, 0), stop=(1501, 2048)))
    assert is_empty(mask, Block(index=(0, 0), start=(1024, 1024), stop=(3000, 3000)))
    assert is_empty(mask, Block(index=(0, 0), start=(0, 0), stop=(1024, 1024)))
    assert not is_empty(mask, Block(index=(0, 0), start=(0, 0), stop=(1025, 1024)))


@pytest.mark.parametrize("ngff", NGFF)
def test_four_writers_give_what_one_gives(tmp_path: Path, ngff: Any) -> None:
    labels = blobs((8300, 4500))
    path = tmp_path / "m.zarr"
    create_mask(path, labels.shape, classes=CLASSES, mask_mpp=MPP, ngff=ngff, name="m")

    def write(block: Block) -> None:
        write_block(open_mask(path), block, labels[block.slices])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, iter_blocks(labels.shape, (4096, 4096))))
    assert np.array_equal(open_mask(path)[:], labels)


@pytest.mark.parametrize("ngff", NGFF)
def test_blocks_are_the_files_that_zarr_would_write(tmp_path: Path, ngff: Any) -> None:
    labels = blobs((5100, 4500))
    labels[:1100, 2000:3100] = 0  # a chunk without a class, which zarr writes and we leave out
    ours, theirs = (
        create_mask(
            tmp_path / name, labels.shape, classes=CLASSES, mask_mpp=MPP, ngff=ngff, name="m"
        )
        for name in ("ours", "theirs")
    )
    theirs[:] = labels
    for block in iter_blocks(labels.shape, (4096, 4096)):
        write_block(ours, block, labels[block.slices])

    def files(name: str) -> dict[Path, bytes]:
        paths = (path for path in (tmp_path / name).rglob("*") if path.is_file())
        return {path.relative_to(tmp_path / name): path.read_bytes() for path in paths}

    written, expected = files("ours"), files("theirs")
    assert written.items() <= expected.items()
    assert len(expected) - len(written) == (1 if ngff == "0.4" else 0)


def test_a_chunk_that_cannot_take_its_place_leaves_nothing_beside_it(tmp_path: Path) -> None:
    mask = create_mask(
        tmp_path / "m", (1500, 900), classes=CLASSES, mask_mpp=MPP, ngff="0.4", name="m"
    )
    (tmp_path / "m" / "0" / "1" / "0" / "in the way").mkdir(parents=True)
    whole = Block(index=(0, 0), start=(0, 0), stop=(1500, 900))
    with pytest.raises(OSError, match="directory"):
        write_block(mask, whole, np.ones((1500, 900), np.uint8))
    assert list(tmp_path.rglob("*.partial")) == []


def test_a_mask_is_sampled_in_register_with_the_thumbnail(tmp_path: Path) -> None:
    labels = np.zeros((3000, 5000), np.uint8)
    labels[600:1500, 2000:4000] = 1
    path = written(tmp_path / "m.zarr", labels, "0.4")
    small = read_mask(path, (300, 500))
    expected = np.zeros((300, 500), np.uint8)
    expected[60:150, 200:400] = 1
    assert np.array_equal(small, expected)
    assert np.array_equal(read_mask(path, labels.shape), labels)
    assert read_mask(path, (4000, 6000)).shape == (4000, 6000)


@pytest.mark.parametrize("ngff", NGFF)
@pytest.mark.parametrize("width", [8192, 32768])
def test_memory_of_the_pyramid_does_not_grow_with_the_mask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ngff: Any, width: int
) -> None:
    monkeypatch.setattr("wsi_pipeline.files.threads.MOST_THREADS", 1)
    path = tmp_path / "m.zarr"
    mask = create_mask(path, (8192, width), classes=CLASSES, mask_mpp=MPP, ngff=ngff, name="m")
    mask[:, 100] = 1
    mask[4000:4004] = 2  # no column of shards is empty
    tracemalloc.start()
    build_pyramid(path, CLASSES)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # A thread with a shard of 17 MB: it, what is made of it, and that again encoded, of which 38 to
    # 47 MB were seen, as zarr's own thread is ahead or not. Masks have 67 and 268 MB.
    assert peak < 3 * 4096**2


def test_an_existing_mask_is_not_overwritten(tmp_path: Path) -> None:
    path = written(tmp_path / "m.zarr", np.ones((10, 10), np.uint8), "0.4")
    with pytest.raises(FileExistsError):
        create_mask(path, (10, 10), classes=CLASSES, mask_mpp=MPP, ngff="0.4", name="m")
    assert open_mask(path)[:].all()
