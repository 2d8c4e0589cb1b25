"""Which backend reads which format: each file's pixels equal an independent reader's."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tracemalloc
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import numpy.typing as npt
import openslide
import pydicom
import pytest
import tifffile
import zarr
from bundles import pointwise_bundle
from click.testing import CliRunner
from PIL import Image
from pydicom.pixels import iter_pixels
from skimage.data import immunohistochemistry

from wsi_pipeline.cli import group
from wsi_pipeline.errors import MissingMppError, SourceError, UnreachableError
from wsi_pipeline.geometry import Region
from wsi_pipeline.run.jobs import find_slides, plan_jobs
from wsi_pipeline.sources import Slide, open_source

Pixels = npt.NDArray[np.uint8]
ROOT = Path(__file__).parents[1]
DATA = Path(os.environ.get("WSI_PIPELINE_TEST_DATA") or ROOT.parent / "shared" / "data")
TISSUE: Pixels = immunohistochemistry()  # (512, 512, 3)
APERIO = "Aperio Image Library v1.0\r\n512x512 [0,0 512x512]|AppMag = 40|MPP = 0.25"
MPP = {"resolution": (40000, 40000), "resolutionunit": "CENTIMETER"}


def level_0(slide: Slide) -> Pixels:
    width, height = slide.size
    return slide.pixels.read_level(0, 0, 0, width, height)


# --- independent readers -----------------------------------------------------------------------


def by_tifffile(path: Path) -> Pixels:
    with tifffile.TiffFile(path, _multifile=False) as file:
        pixels = file.pages.first.asarray()
    return np.repeat(pixels[..., None], 3, axis=-1) if pixels.ndim == 2 else pixels


def by_openslide(path: Path) -> Pixels:
    with openslide.OpenSlide(path) as slide:
        region = slide.read_region((0, 0), 0, slide.dimensions)
    return on_white(region)


def on_white(image: Image.Image) -> Pixels:
    white = Image.new("RGBA", image.size, "white")
    return np.asarray(Image.alpha_composite(white, image))[..., :3]


def by_pillow(path: Path) -> Pixels:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def by_pydicom(path: Path) -> Pixels:
    """Put the frames of a TILED_FULL instance side by side."""
    header = pydicom.dcmread(path)
    width, height = header.TotalPixelMatrixColumns, header.TotalPixelMatrixRows
    across = -(-width // header.Columns)
    canvas = np.zeros((-(-height // header.Rows) * header.Rows, across * header.Columns, 3), "u1")
    for index, frame in enumerate(iter_pixels(path)):
        y, x = (n * side for n, side in zip(divmod(index, across), frame.shape, strict=False))
        canvas[y : y + frame.shape[0], x : x + frame.shape[1]] = frame
    return canvas[:height, :width]


def by_zarr(path: Path) -> Pixels:
    store = zarr.storage.ZipStore(path) if path.is_file() else path
    pixels = np.asarray(zarr.open_group(store, mode="r")["0"][:])
    return np.moveaxis(pixels.reshape(-1, *pixels.shape[-2:]), 0, -1)


# --- the files there are -----------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Real:
    """A file of the real data, or several, and what is to come of it.

    Attributes:
        files: pattern below the folder `wsi`.
        kind: as the docs call it; "" where they do not.
        backend: that reads it; "" where it is refused.
        oracle: the independent reader.
        tolerance: grey values by which decoders may differ.
        refusal: what the reason must hold.
    """

    files: str
    kind: str = ""
    backend: str = ""
    oracle: Callable[[Path], Pixels] | None = None
    tolerance: int = 0
    refusal: str = ""


REAL = [
    Real(files="svs/*.svs", kind="Aperio SVS, JPEG", backend="tiffslide", oracle=by_openslide),
    Real(files="ndpi/*.ndpi", kind="Hamamatsu NDPI", backend="openslide", oracle=by_tifffile),
    Real(files="mrxs_partial/*.mrxs", kind="MIRAX (MRXS)", backend="openslide"),
    Real(
        files="dicom/multiframe*.dcm",
        kind="DICOM WSI, JPEG",
        backend="openslide",
        oracle=by_pydicom,
    ),
    Real(files="dicom/test_wsi.dcm", refusal="associated image"),
    *(
        Real(
            files=f"dicom_highdicom/sm_image{name}.dcm",
            kind="DICOM WSI, uncompressed",
            backend="openslide",
            oracle=by_pydicom,
        )
        for name in ("", "_control", "_dots", "_numbers")
    ),
    Real(files="dicom_highdicom/sm_image_grayscale.dcm", refusal="BitsAllocated value 16"),
    Real(files="dicom_highdicom/sm_image_jpegls*.dcm", refusal="Unsupported transfer syntax"),
    Real(files="dicom_highdicom/seg_*.dcm", refusal="a DICOM file that is no slide"),
    Real(files="dicom_highdicom/sm_annotations.dcm", refusal="a DICOM file that is no slide"),
    Real(files="dicom_panimg/*.dcm", backend="openslide", oracle=by_pydicom),
    Real(
        files="large_image/yb10kx5k.zstd.tiff",
        kind="BigTIFF, ZSTD",
        backend="tiffslide",
        oracle=by_tifffile,
    ),
    Real(
        files="large_image/grey10kx5k.tif",
        kind="TIFF in strips, deflate",
        backend="tiffslide",
        oracle=by_tifffile,
    ),
    Real(files="large_image/test_orient*.tif", backend="tiffslide", oracle=by_tifffile),
    Real(files="large_image/small_la.tiff", refusal="2 samples of uint8"),
    Real(files="large_image/*.zarr.zip", refusal="float32"),
    Real(
        files="panimg_tiff/no_dzi.tif",
        kind="BigTIFF, LZW",
        backend="tiffslide",
        oracle=by_openslide,
    ),
    Real(files="panimg_tiff/valid_tiff.tif", backend="tiffslide", oracle=by_tifffile),
    Real(files="ome_viv/multi-channel.ome.tif", refusal="3 planes .* of int8"),
    Real(files="ome_viv/multifile-Z*.ome.tiff", backend="tiffslide", oracle=by_tifffile),
    Real(files="wsidicom_tiles/*.png", kind="PNG", backend="gdal", oracle=by_pillow),
    Real(
        files="wsidicom_tiles/JPEG_Baseline*.jpg",
        kind="JPEG",
        backend="gdal",
        oracle=by_pillow,
        tolerance=1,
    ),
    Real(files="wsidicom_tiles/JPEG_Lossless*.jpg", refusal="cannot be read"),
    Real(files="wsidicom_tiles/*.jls", refusal="none that is read"),
    Real(files="wsidicom_tiles/*.jp2", refusal="JPEG 2000 picture"),
    Real(files="wsidicom_tiles/*.rle", refusal="not a slide"),
]


def real_files(folder: str) -> list[Path]:
    parts = {".dat", ".ini"}  # of the MIRAX slide
    return sorted(p for p in (DATA / folder).rglob("*") if p.is_file() and p.suffix not in parts)


def name_of(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


@pytest.mark.parametrize("path", real_files("wsi"), ids=name_of)
def test_real_files_are_read_as_others_read_them_or_refused(path: Path) -> None:
    cases = [case for case in REAL if path.relative_to(DATA / "wsi").match(case.files)]
    assert cases, "a new file: say in REAL what is to come of it"
    case = cases[0]
    if case.refusal:
        with pytest.raises(SourceError, match=case.refusal) as error, open_source(path, mpp=1) as s:
            s.thumbnail(100)
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)
        return
    with open_source(path, mpp=1) as slide:
        assert slide.backend == case.backend
        if case.oracle is not None:
            found, expected = level_0(slide), case.oracle(path)
            assert found.shape == expected.shape
            assert abs(found.astype(np.int16) - expected).max() <= case.tolerance


def test_every_real_file_is_accounted_for(data_dir: Path) -> None:
    refused = read = 0
    for path in real_files("wsi"):
        case = next(c for c in REAL if path.relative_to(DATA / "wsi").match(c.files))
        read, refused = read + (not case.refusal), refused + bool(case.refusal)
    assert (read, refused) == (28, 20)


def test_a_mirax_is_read_at_its_bounds_as_by_openslide(data_dir: Path) -> None:
    path = data_dir / "wsi" / "mrxs_partial" / "Mirax2-Fluorescence-2.mrxs"
    with open_source(path) as slide, openslide.OpenSlide(path) as reference:
        bounds = slide.bounds
        assert bounds is not None
        size = (bounds.width // 8, bounds.height // 8)
        found = slide.pixels.read_level(3, bounds.x // 8, bounds.y // 8, *size)
        location = (bounds.x // 8 * 8, bounds.y // 8 * 8)
        expected = on_white(reference.read_region(location, 3, size))
    assert abs(found.astype(int) - expected).max() <= 1


# --- the files that there are none of ----------------------------------------------------------


def write_tiff(path: Path, pixels: Pixels = TISSUE, **options: Any) -> Path:
    options = {"tile": (128, 128), "photometric": "rgb", "metadata": None, **MPP, **options}
    tifffile.imwrite(path, pixels, **options)
    return path


def write_svs(compression: int | str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        options = {"compression": compression, "description": APERIO}
        return write_tiff(folder / "a.svs", resolution=(1, 1), resolutionunit="NONE", **options)

    return write


def write_striped(folder: Path) -> Path:
    return write_tiff(folder / "a.tif", tile=None, rowsperstrip=37, compression="lzw")


def write_planar(folder: Path) -> Path:
    planes = np.ascontiguousarray(np.moveaxis(TISSUE, -1, 0))
    return write_tiff(folder / "a.tif", planes, planarconfig="separate", compression="deflate")


def write_bigtiff(folder: Path) -> Path:
    return write_tiff(folder / "a.tif", bigtiff=True, compression="jpeg")


def write_ome_tiff(folder: Path) -> Path:
    """Write a pyramid in sub-directories, and before it a larger stack of fluorescence."""
    path = folder / "a.ome.tif"
    options: dict[str, Any] = {"tile": (128, 128), "compression": "deflate"}
    metadata = {"PhysicalSizeX": 0.25, "PhysicalSizeY": 250, "PhysicalSizeYUnit": "nm"}
    with tifffile.TiffWriter(path) as file:
        channels = np.zeros((2, 900, 900), np.uint16)
        file.write(channels, photometric="minisblack", metadata={"axes": "CYX"}, **options)
        small = TISSUE[:128, :128]
        file.write(small, photometric="rgb", metadata={"axes": "YXS"}, **options)
        options["photometric"] = "rgb"
        file.write(TISSUE, subifds=1, metadata={"axes": "YXS", **metadata}, **options)
        file.write(TISSUE[::2, ::2], subfiletype=1, **options)
    return path


def write_philips(folder: Path) -> Path:
    def level(number: int) -> str:
        side, spacing = 512 >> number, 0.00025 * 2**number
        return (
            '<DataObject ObjectType="PixelDataRepresentation">'
            f'<Attribute Name="DICOM_PIXEL_SPACING">"{spacing}" "{spacing}"</Attribute>'
            f'<Attribute Name="PIIM_PIXEL_DATA_REPRESENTATION_COLUMNS">{side}</Attribute>'
            f'<Attribute Name="PIIM_PIXEL_DATA_REPRESENTATION_NUMBER">{number}</Attribute>'
            f'<Attribute Name="PIIM_PIXEL_DATA_REPRESENTATION_ROWS">{side}</Attribute>'
            "</DataObject>"
        )

    description = (
        '<?xml version="1.0" encoding="UTF-8" ?><DataObject ObjectType="DPUfsImport">'
        '<Attribute Name="DICOM_MANUFACTURER">PHILIPS</Attribute>'
        '<Attribute Name="PIM_DP_SCANNED_IMAGES"><Array><DataObject ObjectType="DPScannedImage">'
        '<Attribute Name="PIM_DP_IMAGE_TYPE">WSI</Attribute>'
        '<Attribute Name="DICOM_PIXEL_SPACING">"0.00025" "0.00025"</Attribute>'
        '<Attribute Name="PIIM_PIXEL_DATA_REPRESENTATION_SEQUENCE">'
        f"<Array>{level(0)}{level(1)}</Array></Attribute></DataObject></Array></Attribute>"
        "</DataObject>"
    )
    path = folder / "a.tiff"
    with tifffile.TiffWriter(path, bigtiff=True) as file:
        for number in (0, 1):
            file.write(
                np.ascontiguousarray(TISSUE[:: 1 << number, :: 1 << number]),
                tile=(256, 256),
                compression="jpeg",
                photometric="ycbcr",
                description="level=1" if number else description,
                software="Philips DP v1.0",
                subfiletype=number,
                metadata=None,
            )
    return path


SCN_NM, SCN_SIZE, SCN_OFFSET = 250, (1500, 1200), (300, 200)
"""nm per pixel; of the synthetic SCN, whose 512² px of tissue lie somewhere on a larger slide."""


def write_scn(folder: Path) -> Path:
    def image(name: str, size: tuple[int, int], offset: tuple[int, int], levels: str) -> str:
        width, height, x, y = (n * SCN_NM for n in (*size, *offset))
        return (
            f'<image name="{name}" uuid="urn:uuid:{name}"><creationDate>2020</creationDate>'
            f'<device model="m" version="1"/><pixels sizeX="{size[0]}" sizeY="{size[1]}">{levels}'
            f'</pixels><view sizeX="{width}" sizeY="{height}" offsetX="{x}" offsetY="{y}"/>'
            "<scanSettings><objectiveSettings><objective>40</objective></objectiveSettings>"
            "<illuminationSettings><numericalAperture>0.7</numericalAperture>"
            "<illuminationSource>brightfield</illuminationSource></illuminationSettings>"
            "</scanSettings></image>"
        )

    width, height = (n * SCN_NM for n in SCN_SIZE)
    levels = "".join(
        f'<dimension sizeX="{512 // n}" sizeY="{512 // n}" r="{r}" ifd="{r}"/>'
        for r, n in enumerate((1, 4))
    )
    macro = '<dimension sizeX="150" sizeY="120" r="0" ifd="2"/>'
    description = (
        '<?xml version="1.0"?><scn xmlns="http://www.leica-microsystems.com/scn/2010/10/01">'
        f'<collection name="c" uuid="urn:uuid:c" sizeX="{width}" sizeY="{height}">'
        "<barcode></barcode>"
        + image("main", (512, 512), SCN_OFFSET, levels)
        + image("macro", SCN_SIZE, (0, 0), macro)
        + "</collection></scn>"
    )
    path = folder / "a.scn"
    with tifffile.TiffWriter(path, bigtiff=True) as file:
        for number, pixels in enumerate((TISSUE, TISSUE[::4, ::4], TISSUE[:120, :150])):
            file.write(
                np.ascontiguousarray(pixels),
                tile=(128, 128),
                compression="jpeg",
                photometric="ycbcr",
                description=None if number else description,
                metadata=None,
                resolution=(40000 / (1, 4, 10)[number],) * 2,
                resolutionunit="CENTIMETER",
            )
    return path


def write_ome_zarr(ngff: str, pixels: Pixels = TISSUE) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        path = folder / "a.ome.zarr"
        axes = [{"name": "c", "type": "channel"}] + [
            {"name": axis, "type": "space", "unit": "micrometer"} for axis in "yx"
        ]
        datasets = [
            {"path": str(n), "coordinateTransformations": [{"type": "scale", "scale": [1.0, s, s]}]}
            for n, s in enumerate((0.25, 0.5))
        ]
        multiscales = [{"version": ngff, "name": "a", "axes": axes, "datasets": datasets}]
        group = zarr.create_group(path, zarr_format=2 if ngff == "0.4" else 3)
        attributes: dict[str, Any] = {"multiscales": multiscales}
        group.attrs.update(
            attributes if ngff == "0.4" else {"ome": {"version": ngff, **attributes}}
        )
        for n in (0, 1):
            planes = np.moveaxis(pixels[:: 1 << n, :: 1 << n], -1, 0)
            shards = None if ngff == "0.4" else (3, 256, 256)
            group.create_array(
                str(n), data=np.ascontiguousarray(planes), chunks=(1, 128, 128), shards=shards
            )
        return path

    return write


def write_zip(ngff: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        source = write_ome_zarr(ngff)(folder)
        path = folder / "a.zarr.zip"
        with zipfile.ZipFile(path, "w") as archive:
            for file in sorted(p for p in source.rglob("*") if p.is_file()):
                archive.write(file, file.relative_to(source).as_posix())
        return path

    return write


def write_dicom_folder(folder: Path) -> Path:
    path = folder / "dicom"
    path.mkdir()
    source = DATA / "wsi"
    if not source.is_dir():
        pytest.skip(f"no real data: {source} does not exist")
    shutil.copy(source / "dicom" / "multiframe_camelyon_challenge_image.dcm", path / "0001")
    shutil.copy(source / "dicom" / "test_wsi.dcm", path / "0002")  # a label
    (path / "DICOMDIR.txt").write_text("not DICOM")
    return path


def whole(_: Path) -> Pixels:
    return TISSUE


def scn_canvas(path: Path) -> Pixels:
    (width, height), (x, y) = SCN_SIZE, SCN_OFFSET
    canvas = np.full((height, width, 3), 255, np.uint8)
    canvas[y : y + 512, x : x + 512] = by_tifffile(path)
    return canvas


@dataclass(frozen=True, kw_only=True)
class Made:
    """A file made for the test, of a format of which there is no real one.

    Attributes:
        kind: as the docs call it.
        write: makes it in a folder; returns its path.
        backend: that reads it.
        oracle: the independent reader.
        tolerance: grey values by which decoders may differ.
        mpp_source: where µm per pixel, 0.25, come from; "" where the file does not say.
    """

    kind: str
    write: Callable[[Path], Path]
    backend: str
    oracle: Callable[[Path], Pixels]
    tolerance: int = 0
    mpp_source: str = ""


TAGS = "TIFF resolution tags"
MADE = [
    Made(
        kind="Aperio SVS, JPEG 2000",
        write=write_svs(33005),
        backend="tiffslide",
        oracle=by_openslide,
        mpp_source="aperio.MPP",
    ),
    Made(
        kind="Aperio SVS, LZW",
        write=write_svs("lzw"),
        backend="tiffslide",
        oracle=whole,
        mpp_source="aperio.MPP",
    ),
    Made(
        kind="Leica SCN",
        write=write_scn,
        backend="openslide",
        oracle=scn_canvas,
        mpp_source="openslide.mpp",
    ),
    Made(
        kind="Philips TIFF",
        write=write_philips,
        backend="openslide",
        oracle=by_tifffile,
        mpp_source="openslide.mpp",
    ),
    Made(
        kind="TIFF in strips, LZW",
        write=write_striped,
        backend="tiffslide",
        oracle=whole,
        mpp_source=TAGS,
    ),
    Made(
        kind="TIFF with separate planes",
        write=write_planar,
        backend="tiffslide",
        oracle=whole,
        mpp_source=TAGS,
    ),
    Made(
        kind="BigTIFF, JPEG",
        write=write_bigtiff,
        backend="tiffslide",
        oracle=by_tifffile,
        mpp_source=TAGS,
    ),
    Made(
        kind="OME-TIFF, sub-directories, several series",
        write=write_ome_tiff,
        backend="tiffslide",
        oracle=whole,
        mpp_source="OME-XML",
    ),
    Made(
        kind="OME-Zarr 0.4",
        write=write_ome_zarr("0.4"),
        backend="zarr",
        oracle=by_zarr,
        mpp_source="OME-Zarr",
    ),
    Made(
        kind="OME-Zarr 0.5, shards",
        write=write_ome_zarr("0.5"),
        backend="zarr",
        oracle=by_zarr,
        mpp_source="OME-Zarr",
    ),
    Made(
        kind="OME-Zarr 0.4, zipped",
        write=write_zip("0.4"),
        backend="zarr",
        oracle=by_zarr,
        mpp_source="OME-Zarr",
    ),
    Made(
        kind="OME-Zarr 0.5, zipped",
        write=write_zip("0.5"),
        backend="zarr",
        oracle=by_zarr,
        mpp_source="OME-Zarr",
    ),
    Made(
        kind="DICOM WSI, a folder",
        write=write_dicom_folder,
        backend="openslide",
        oracle=lambda folder: by_pydicom(folder / "0001"),
        mpp_source="openslide.mpp",
    ),
]


@pytest.mark.parametrize("case", MADE, ids=lambda case: case.kind)
def test_made_files_are_read_as_others_read_them(case: Made, tmp_path: Path) -> None:
    path = case.write(tmp_path)
    with open_source(path, mpp=None if case.mpp_source else 0.25) as slide:
        assert slide.backend == case.backend
        assert slide.mpp_source == (case.mpp_source or "--mpp")
        if "DICOM" not in case.kind:
            assert slide.mpp == pytest.approx((0.25, 0.25))
        assert slide.doubts == ()
        found, expected = level_0(slide), case.oracle(path)
        assert found.shape == expected.shape
        assert abs(found.astype(np.int16) - expected).max() <= case.tolerance


def test_the_bounds_of_a_slide_are_where_its_picture_lies(tmp_path: Path) -> None:
    path = write_scn(tmp_path)
    with open_source(path) as slide:
        x, y = SCN_OFFSET
        assert slide.size == SCN_SIZE
        assert slide.bounds == Region(x=x, y=y, width=512, height=512)
        view = slide.at(0.5)
        inside = view.read((y // 2, x // 2), (256, 256))
        around = view.read((y // 2 - 9, x // 2 - 9), (274, 274))
    means = by_tifffile(path).reshape(256, 2, 256, 2, 3).mean(axis=(1, 3))
    assert abs(inside - means).max() <= 1
    np.testing.assert_array_equal(around[9:265, 9:265], inside)
    around[9:265, 9:265] = 255
    assert (around == 255).all()


def test_one_series_of_several_is_chosen_by_number(tmp_path: Path) -> None:
    path = write_ome_tiff(tmp_path)
    with open_source(path) as slide:
        assert slide.size == (512, 512)
        assert slide.level_downsamples == ((1, 1), (2, 2))
        assert slide.mpp == pytest.approx((0.25, 0.25))
    with open_source(path, series=1, mpp=1) as slide:
        np.testing.assert_array_equal(level_0(slide), TISSUE[:128, :128])
    with pytest.raises(SourceError, match=r"2 planes .* of uint16"):
        open_source(path, series=0, mpp=1)
    with pytest.raises(SourceError, match=r"series 0 to 2, not 3; change --series"):
        open_source(path, series=3, mpp=1)
    with pytest.raises(SourceError, match="no series"):
        open_source(write_scn(tmp_path), series=0)


def test_the_largest_of_several_zarr_images_is_taken(tmp_path: Path) -> None:
    root = zarr.create_group(tmp_path / "several.zarr", zarr_format=2)
    root.attrs["bioformats2raw.layout"] = 3
    for name, side in (("0", 100), ("1", 300), ("2", 200)):
        (tmp_path / name).mkdir()
        image = write_ome_zarr("0.4", TISSUE[:side, :side])(tmp_path / name)
        shutil.move(image, tmp_path / "several.zarr" / name)
    with open_source(tmp_path / "several.zarr") as slide:
        np.testing.assert_array_equal(level_0(slide), TISSUE[:300, :300])
    with open_source(tmp_path / "several.zarr", series=2) as slide:
        assert slide.size == (200, 200)
    with pytest.raises(SourceError, match="series 0 to 2, not 5"):
        open_source(tmp_path / "several.zarr", series=5)


# --- which picture is the slide ----------------------------------------------------------------

THUMBNAIL: Pixels = np.full((192, 256, 3), 200, np.uint8)
TILED: dict[str, Any] = {"tile": (128, 128), **MPP}


def write_pages(path: Path, *pages: tuple[Pixels, dict[str, Any]]) -> Path:
    with tifffile.TiffWriter(path) as file:
        for pixels, options in pages:
            file.write(pixels, **{"metadata": None, "photometric": "rgb", **options})
    return path


@pytest.mark.parametrize("first", [{}, {"tile": (64, 64)}], ids=["strips", "tiles"])
@pytest.mark.parametrize("where", ["pages", "sub-directories", "Aperio", "OME"])
def test_the_largest_picture_is_the_slide_wherever_it_stands(
    tmp_path: Path, where: str, first: dict[str, Any]
) -> None:
    first = {"resolution": (72, 72), "resolutionunit": "INCH", **first}
    slide: dict[str, Any] = dict(TILED)
    level: dict[str, Any] = {"tile": (128, 128), "subfiletype": 1}
    path = tmp_path / ("a.ome.tif" if where == "OME" else "a.tif")
    if where == "sub-directories":
        first["subifds"] = 2
    elif where == "Aperio":
        first["description"] = "Aperio Image Library v1.0\r\n256x192 -> thumbnail"
        slide["description"] = APERIO
    elif where == "OME":
        size = {"axes": "YXS", "PhysicalSizeX": 0.25, "PhysicalSizeY": 0.25}
        first["metadata"] = {"axes": "YXS", "PhysicalSizeX": 7, "PhysicalSizeY": 7}
        slide |= {"subifds": 1, "metadata": size}
    write_pages(path, (THUMBNAIL, first), (TISSUE, slide), (TISSUE[::2, ::2], level))
    with open_source(path) as found:
        assert found.size == (512, 512)
        assert found.mpp == pytest.approx((0.25, 0.25))
        np.testing.assert_array_equal(level_0(found), TISSUE)
        said = "; ".join(found.doubts)
    try:
        with openslide.OpenSlide(path) as other:
            is_other = other.dimensions != (512, 512) and where != "OME"
    except openslide.OpenSlideError:
        is_other = False
    assert ("shows another picture of the file" in said) == is_other


def test_tags_of_the_thumbnail_say_nothing_of_the_slide(tmp_path: Path) -> None:
    thumbnail = {"resolution": (50800, 50800), "resolutionunit": "INCH", "tile": (64, 64)}
    path = write_pages(tmp_path / "a.tif", (THUMBNAIL, thumbnail), (TISSUE, {"tile": (128, 128)}))
    with pytest.raises(MissingMppError):
        open_source(path)


def test_a_slide_that_is_not_read_is_refused_not_its_thumbnail_read(tmp_path: Path) -> None:
    deep = TISSUE.astype(np.uint16) * 257
    path = write_pages(tmp_path / "a.tif", (THUMBNAIL, {"tile": (64, 64)}), (deep, TILED))
    with pytest.raises(SourceError, match="3 samples of uint16"):
        open_source(path)
    with open_source(path, series=0, mpp=1) as slide:
        assert slide.size == (256, 192)


def test_a_small_region_is_the_slide_beside_larger_pictures_of_its_glass(tmp_path: Path) -> None:
    path = write_pages(
        tmp_path / "a.svs",
        (TISSUE[:200, :200], {"tile": (128, 128), "description": APERIO}),
        (THUMBNAIL, {}),
        (TISSUE, {"subfiletype": 1, "description": "label"}),
    )
    with open_source(path) as slide:
        np.testing.assert_array_equal(level_0(slide), TISSUE[:200, :200])


# --- colours -----------------------------------------------------------------------------------


def jpeg(tile: Pixels, colours: str) -> bytes:
    """Return a JPEG of YCbCr or RGB that says so in one way."""
    if colours == "RGB":
        return bytes(imagecodecs.jpeg_encode(tile, level=95, colorspace="RGB", outcolorspace="RGB"))
    found = bytes(imagecodecs.jpeg_encode(tile, level=95))
    return found[:2] + found[20:] if colours == "coarse" else found  # without JFIF


def write_jpeg_tiles(path: Path, colours: str, **options: Any) -> Path:
    tiles = (
        jpeg(np.ascontiguousarray(TISSUE[y : y + 128, x : x + 128]), colours)
        for y in range(0, 512, 128)
        for x in range(0, 512, 128)
    )
    options = {"metadata": None, "tile": (128, 128), "compression": "jpeg", **MPP, **options}
    tifffile.imwrite(path, tiles, shape=TISSUE.shape, dtype=np.uint8, **options)
    return path


@pytest.mark.parametrize("description", [None, APERIO], ids=["TIFF", "SVS"])
@pytest.mark.parametrize("tag", ["rgb", "ycbcr"])
@pytest.mark.parametrize("colours", ["RGB", "JFIF", "coarse"])
def test_the_colours_are_those_that_the_tiles_have(
    tmp_path: Path, colours: str, tag: str, description: str | None
) -> None:
    path = tmp_path / "a.svs"
    write_jpeg_tiles(path, colours, photometric="ycbcr", description=description)
    with tifffile.TiffFile(path, mode="r+") as file:
        file.pages.first.tags["PhotometricInterpretation"].overwrite(2 if tag == "rgb" else 6)
    with open_source(path) as slide:
        assert abs(level_0(slide).astype(int) - TISSUE).mean() < 3
        said = "; ".join(slide.doubts)
    is_contradiction = (colours == "RGB") != (tag == "rgb")
    assert ("colours are stored as" in said) == is_contradiction
    assert bool(said) == is_contradiction


@pytest.mark.parametrize("marker", ["jfif", "adobe"])
def test_a_contradiction_about_colours_reaches_the_user(
    data_dir: Path, tmp_path: Path, marker: str
) -> None:
    path = data_dir / "faults" / f"rgb_tag_{marker}_ycbcr.tif"
    with tifffile.TiffFile(path) as file:
        page = file.pages.first
        file.filehandle.seek(page.dataoffsets[0])
        stream = file.filehandle.read(page.databytecounts[0])
    expected = np.asarray(Image.open(io.BytesIO(stream)).convert("RGB"))
    with open_source(path) as slide:
        found = slide.pixels.read_level(0, 0, 0, *expected.shape[1::-1])
    assert abs(found.astype(int) - expected).max() <= 1
    bundle = pointwise_bundle(tmp_path / "bundle", mpp=0.5)
    arguments = ["segment", path, "--model", bundle, "--output", tmp_path / "out"]
    result = CliRunner().invoke(group, [*map(str, arguments), "--outputs", "zarr"])
    assert result.exit_code == 0, result.output
    run = json.loads((tmp_path / "out" / path.stem / "run.json").read_text("utf-8"))
    said = "its header says that colours are stored as RGB, its tiles that they are YCbCr"
    assert any(said in warning for warning in run["warnings"])
    assert said in result.output
    arguments = ["tile", path, "--mpp", "0.5", "--patch-size", "256", "--output", tmp_path]
    result = CliRunner().invoke(group, [*map(str, arguments), "--tissue", "none"])
    assert f"warning: {path.name}: {said}" in result.output
    with open_source(tmp_path / f"{path.stem}.zarr") as grid:
        assert any(said in doubt for doubt in grid.doubts)


def test_a_contradiction_about_colours_in_dicom_is_told(tmp_path: Path) -> None:
    source = DATA / "wsi" / "dicom" / "multiframe_camelyon_challenge_image.dcm"
    if not source.is_file():
        pytest.skip(f"no real data: {source} does not exist")
    header = pydicom.dcmread(source)
    header.PhotometricInterpretation = "RGB"
    header.save_as(tmp_path / "a.dcm")
    with open_source(tmp_path / "a.dcm") as slide:
        assert "stored as RGB, its frames that they are YCbCr" in "; ".join(slide.doubts)
    with open_source(source) as slide:
        assert slide.doubts == ()


# --- OME-Zarr ----------------------------------------------------------------------------------


@pytest.mark.parametrize("ngff", ["0.1", "0.2", "0.3"])
def test_old_ome_zarrs_are_read(tmp_path: Path, ngff: str) -> None:
    path = write_ome_zarr("0.4")(tmp_path)
    group = zarr.open_group(path)
    multiscale = dict(group.attrs)["multiscales"][0]
    datasets = [{"path": dataset["path"]} for dataset in multiscale["datasets"]]
    old = {"version": ngff, "datasets": datasets}
    if ngff == "0.3":
        old["axes"] = ["c", "y", "x"]
    else:  # always of five axes
        for n in ("0", "1"):
            pixels = np.asarray(group[n])[None, :, None]
            group.create_array(n, data=pixels, chunks=(1, 1, 1, 128, 128), overwrite=True)
    group.attrs["multiscales"] = [old]
    with pytest.raises(MissingMppError):  # they have no place for it
        open_source(path)
    with open_source(path, mpp=0.25) as slide:
        np.testing.assert_array_equal(level_0(slide), TISSUE)
    group.attrs["multiscales"] = [{**old, "version": "0.7"}]
    with pytest.raises(SourceError, match=r"OME-Zarr 0\.7 is not read; expected 0\.1 to 0\.5"):
        open_source(path, mpp=0.25)


@pytest.mark.parametrize(
    ("unit", "um"),
    [("micron", 1), ("µm", 1), ("micrometer", 1), ("nanometer", 1e-3), ("millimeter", 1e3)],
)
def test_an_ome_zarr_says_how_large_a_pixel_is(tmp_path: Path, unit: str, um: float) -> None:
    path = write_ome_zarr("0.4")(tmp_path)
    text = (path / ".zattrs").read_text("utf-8").replace("micrometer", unit)
    (path / ".zattrs").write_text(text.replace("0.25", str(0.25 / um)), "utf-8")
    with open_source(path) as slide:
        assert slide.mpp == pytest.approx((0.25, 0.25))
        assert slide.mpp_source == "OME-Zarr"
    (path / ".zattrs").write_text(text.replace(unit, "furlong"), "utf-8")
    with pytest.raises(MissingMppError, match=r'OME-Zarr: 0\.25 × 0\.25, in "furlong"'):
        open_source(path)


def test_a_fourth_channel_is_left_out_and_told(tmp_path: Path) -> None:
    path = write_ome_zarr("0.4", np.dstack([TISSUE, np.zeros((512, 512), np.uint8)]))(tmp_path)
    with open_source(path) as slide:
        np.testing.assert_array_equal(level_0(slide), TISSUE)
        assert "fourth channel" in slide.doubts[0]


def test_the_largest_of_several_multiscales_is_the_slide(tmp_path: Path) -> None:
    path = write_ome_zarr("0.4")(tmp_path)
    group = zarr.open_group(path)
    (multiscale,) = dict(group.attrs)["multiscales"]
    small = {**multiscale, "name": "thumbnail", "datasets": multiscale["datasets"][1:]}
    group.attrs["multiscales"] = [small, multiscale]
    with open_source(path) as slide:
        assert slide.size == (512, 512)
        assert slide.mpp == (0.25, 0.25)
    with open_source(path, series=0) as slide:
        assert slide.size == (256, 256)
        assert slide.mpp == (0.5, 0.5)
    group.attrs["multiscales"] = [{**multiscale, "datasets": multiscale["datasets"][::-1]}]
    with open_source(path) as slide:
        assert slide.size == (512, 512)
        assert slide.mpp == (0.25, 0.25)


def test_series_of_a_zarr_are_counted_as_it_lists_them(tmp_path: Path) -> None:
    root = zarr.create_group(tmp_path / "several.zarr", zarr_format=2)
    root.attrs["bioformats2raw.layout"] = 3
    root.create_group("OME").attrs["series"] = ["b", "a"]
    for name, side in (("a", 100), ("b", 200)):
        (tmp_path / name).mkdir()
        image = write_ome_zarr("0.4", TISSUE[:side, :side])(tmp_path / name)
        shutil.move(image, tmp_path / "several.zarr" / name)
    for series, side in ((0, 200), (1, 100)):
        with open_source(tmp_path / "several.zarr", series=series) as slide:
            assert slide.size == (side, side)


@pytest.mark.parametrize("damage", ["axes", "level", "chunk shape", "bits", "metadata"])
def test_damaged_zarrs_are_refused_in_one_line(tmp_path: Path, damage: str) -> None:
    path = write_ome_zarr("0.4")(tmp_path)
    attributes, array = path / ".zattrs", path / "0" / ".zarray"
    if damage == "axes":
        attributes.write_text(attributes.read_text().replace('"y"', '"q"'))
    elif damage == "level":
        shutil.rmtree(path / "1")
    elif damage == "metadata":
        attributes.write_text('{"multiscales": [{"datasets": 7}]}')
    else:
        meta = json.loads(array.read_text())
        meta |= {"chunks": [3, 1 << 20, 1 << 20]} if damage == "chunk shape" else {"dtype": "<u2"}
        array.write_text(json.dumps(meta))
    with pytest.raises(SourceError) as error:
        open_source(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_zarr_that_lists_no_arrays_is_said_to(tmp_path: Path) -> None:
    path = write_ome_zarr("0.4")(tmp_path)
    attributes = json.loads((path / ".zattrs").read_text())
    attributes["multiscales"][0]["datasets"] = []
    (path / ".zattrs").write_text(json.dumps(attributes))
    with pytest.raises(SourceError, match="lists no arrays"):
        open_source(path)


def test_scales_beyond_all_bounds_say_nothing(tmp_path: Path) -> None:
    path = write_ome_zarr("0.4")(tmp_path)
    with open_source(path) as slide:
        expected = slide.level_downsamples
    attributes = json.loads((path / ".zattrs").read_text())
    for dataset, scale in zip(
        attributes["multiscales"][0]["datasets"], (1e-300, 1e300), strict=True
    ):
        (transformation,) = dataset["coordinateTransformations"]
        transformation["scale"] = [scale] * len(transformation["scale"])
    (path / ".zattrs").write_text(json.dumps(attributes))
    with open_source(path, mpp=0.5) as slide:
        assert slide.level_downsamples == expected


# --- levels ------------------------------------------------------------------------------------

SIDE = 128
"""Of the tiles of `write_levels`."""


@pytest.fixture(scope="module")
def scene(slide_pixels: Pixels) -> Pixels:
    """Return a picture whose levels of 2, 4, 8 and 16 have the same shape when padded."""
    return np.asarray(Image.fromarray(slide_pixels).resize((2000, 1500)))


def box_means(pixels: Pixels, factor: int) -> Pixels:
    height, width = (n // factor for n in pixels.shape[:2])
    squares = pixels[: height * factor, : width * factor].reshape(height, factor, width, factor, 3)
    return np.round(squares.mean(axis=(1, 3))).astype(np.uint8)


def in_whole_tiles(pixels: Pixels) -> Pixels:
    below, right = (-n % SIDE for n in pixels.shape[:2])
    return np.pad(pixels, ((0, below), (0, right), (0, 0)), constant_values=255)


def write_levels(kind: str, folder: Path, levels: list[Pixels], *, stated: bool = False) -> Path:
    """Write level 0 of 0.5 µm, and what is to count as its levels; return the path.

    Args:
        kind: "TIFF", "SubIFD", "OME-TIFF", "SVS", "DICOM" or "OME-Zarr".
        folder: for the file.
        levels: level 0 and others.
        stated: whether the file says that the others are of 2, 4, 8 … where its kind can.
    """
    if kind == "OME-Zarr":
        return write_zarr_levels(folder / "a.zarr", levels, stated=stated)
    if kind == "DICOM":
        return write_dicom_levels(folder, levels, stated=stated)
    path = folder / {"SVS": "a.svs", "OME-TIFF": "a.ome.tif"}.get(kind, "a.tif")
    full = levels[0].shape
    with tifffile.TiffWriter(path) as file:
        for number, level in enumerate(levels):
            is_below = kind in ("SubIFD", "OME-TIFF")
            options: dict[str, Any] = {"metadata": None, "subfiletype": int(number > 0)}
            if kind == "SVS":
                height, width = (n >> number for n in full[:2])
                aim = f" -> {width}x{height}" if number and stated else ""
                text = (
                    f"Aperio Image Library\r\n{full[1]}x{full[0]} ({SIDE}x{SIDE}){aim} |MPP = 0.5"
                )
                options |= {"description": text, "subfiletype": 0}
            elif stated or not number:
                options["resolution"] = (20000 / 2**number,) * 2
                options["resolutionunit"] = "CENTIMETER"
            if kind == "OME-TIFF" and not number:
                options["metadata"] = {"axes": "YXS", "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5}
            if is_below and not number:
                options["subifds"] = len(levels) - 1
            tiles: dict[str, Any] = {"tile": (SIDE, SIDE), "photometric": "rgb"}
            file.write(level, compression="deflate", **tiles, **options)
            if kind == "SVS" and not number:
                file.write(levels[-1], photometric="rgb", metadata=None)  # a thumbnail, always
    return path


def write_zarr_levels(path: Path, levels: list[Pixels], *, stated: bool) -> Path:
    axes = [{"name": axis, "type": "space", "unit": "micrometer"} for axis in "yx"]
    scales = [0.5 * 2**n if stated or not n else 0.5 for n in range(len(levels))]
    datasets = [
        {"path": str(n), "coordinateTransformations": [{"type": "scale", "scale": [s, s, 1]}]}
        for n, s in enumerate(scales)
    ]
    axes.append({"name": "c", "type": "channel"})
    group = zarr.create_group(path, zarr_format=2)
    group.attrs["multiscales"] = [{"version": "0.4", "axes": axes, "datasets": datasets}]
    for n, level in enumerate(levels):
        group.create_array(str(n), data=level, chunks=(SIDE, SIDE, 3), fill_value=255)
    return path


def write_dicom_levels(
    folder: Path,
    levels: list[Pixels],
    *,
    stated: bool,
    left_out: Callable[[int, int, int], bool] | None = None,
) -> Path:
    """Write one instance a level, of whole frames; return the path of level 0.

    Args:
        folder: for the files.
        levels: that are written.
        stated: whether PixelSpacing says that they are of 1, 2, 4 …; else their sizes do.
        left_out: tells by level, row and column which frames are not there.
    """
    series, study, frame_of_reference = (pydicom.uid.generate_uid() for _ in range(3))
    for number, level in enumerate(levels):
        height, width = level.shape[:2]
        whole = in_whole_tiles(level)
        corners = [
            (y, x)
            for y in range(0, height, SIDE)
            for x in range(0, width, SIDE)
            if left_out is None or not left_out(number, y // SIDE, x // SIDE)
        ]
        frames = [whole[y : y + SIDE, x : x + SIDE].tobytes() for y, x in corners]
        data = pydicom.Dataset()
        data.SOPClassUID = "1.2.840.10008.5.1.4.1.1.77.1.6"
        data.SOPInstanceUID = pydicom.uid.generate_uid()
        data.SeriesInstanceUID, data.StudyInstanceUID = series, study
        data.FrameOfReferenceUID = frame_of_reference
        data.Modality = "SM"
        data.ImageType = ["ORIGINAL" if number == 0 else "DERIVED", "PRIMARY", "VOLUME", "NONE"]
        data.TotalPixelMatrixColumns, data.TotalPixelMatrixRows = width, height
        data.Rows = data.Columns = SIDE
        data.SamplesPerPixel, data.PhotometricInterpretation = 3, "RGB"
        data.PlanarConfiguration = data.PixelRepresentation = 0
        data.BitsAllocated = data.BitsStored = 8
        data.HighBit, data.NumberOfFrames = 7, len(frames)
        data.TotalPixelMatrixFocalPlanes, data.NumberOfOpticalPaths = 1, 1
        data.DimensionOrganizationType = "TILED_FULL" if left_out is None else "TILED_SPARSE"
        data.ImagedVolumeWidth = levels[0].shape[1] * 0.0005
        data.ImagedVolumeHeight = levels[0].shape[0] * 0.0005
        measures, shared = pydicom.Dataset(), pydicom.Dataset()
        x, y = (
            0.0005 * (2**number if stated else full / own)
            for full, own in zip(levels[0].shape[1::-1], (width, height), strict=True)
        )
        measures.PixelSpacing, measures.SliceThickness = [round(y, 9), round(x, 9)], 0.001
        shared.PixelMeasuresSequence = [measures]
        data.SharedFunctionalGroupsSequence = [shared]
        if left_out is not None:
            data.PerFrameFunctionalGroupsSequence = []
            for top, left in corners:
                place, group = pydicom.Dataset(), pydicom.Dataset()
                place.ColumnPositionInTotalImagePixelMatrix = left + 1
                place.RowPositionInTotalImagePixelMatrix = top + 1
                group.PlanePositionSlideSequence = [place]
                data.PerFrameFunctionalGroupsSequence.append(group)
        data.PixelData = b"".join(frames)
        data.file_meta = pydicom.dataset.FileMetaDataset()
        data.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        data.save_as(folder / f"{number}.dcm", enforce_file_format=True)
    return folder / "0.dcm"


KINDS = ["TIFF", "SubIFD", "OME-TIFF", "SVS", "DICOM", "OME-Zarr"]


def test_a_factor_that_the_file_states_wrongly_is_not_believed(
    tmp_path: Path, scene: Pixels
) -> None:
    path = tmp_path / "a.tif"
    with tifffile.TiffWriter(path) as file:
        for factor, said in ((1, 1), (8, 10), (16, 8)):  # could be padded, and could not
            file.write(
                box_means(scene, factor),
                tile=(256, 256),
                photometric="rgb",
                resolution=(20000 / said,) * 2,
                resolutionunit="CENTIMETER",
                metadata=None,
                subfiletype=int(factor > 1),
            )
    with open_source(path) as slide:
        assert slide.level_downsamples == ((1, 1), (8, 8), (16, 16))
        assert slide.at(8.0).level == 2
        assert differing(slide, scene) == 0
        assert slide.doubts == ()


def test_a_deflated_file_beside_a_dicom_slide_is_not_unpacked(
    tmp_path: Path, scene: Pixels
) -> None:
    path = write_dicom_levels(tmp_path, [scene, box_means(scene, 4)], stated=False)
    other = pydicom.Dataset()
    other.SOPClassUID = pydicom.uid.CTImageStorage
    other.SOPInstanceUID = pydicom.uid.generate_uid()
    other.file_meta = pydicom.dataset.FileMetaDataset()
    other.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
    other["PixelData"] = pydicom.DataElement("PixelData", "OB", bytes(1 << 27))
    other.save_as(tmp_path / "other.dcm", enforce_file_format=True)
    tracemalloc.start()
    try:
        with open_source(path) as slide:
            assert slide.level_downsamples == ((1, 1), (4, 4))
        assert tracemalloc.get_traced_memory()[1] < 1 << 26
    finally:
        tracemalloc.stop()


def differing(slide: Slide, scene: Pixels) -> float:
    """Return which share of the pixels at 8 µm is not the mean of 16 × 16 of level 0."""
    expected = box_means(scene, 16).astype(int)
    found = slide.at(8.0).read((0, 0), expected.shape[:2])
    return float((abs(found - expected).max(axis=-1) > 8).mean())


@pytest.mark.parametrize("stated", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_levels_padded_to_whole_tiles_count_as_what_they_show(
    tmp_path: Path, scene: Pixels, kind: str, stated: bool
) -> None:
    levels = [scene, *(in_whole_tiles(box_means(scene, f)) for f in (2, 4, 8, 16))]
    with open_source(write_levels(kind, tmp_path, levels, stated=stated)) as slide:
        assert slide.mpp == pytest.approx((0.5, 0.5))
        assert differing(slide, scene) == 0
        # tifffile itself leaves out what it does not take for levels
        factors = [x for x, y in slide.level_downsamples if x == y]
        assert factors == [1, 2, 4, 8, 16][: len(factors)]
        assert len(factors) == len(slide.level_sizes)
        assert slide.at(8.0).level > 0 or slide.backend == "tiffslide"
        found = slide.thumbnail(125)[0][:93].astype(int)
        assert (abs(found - box_means(scene, 16)).max(axis=-1) <= 8).all()


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        *((kind, "squeezed") for kind in KINDS),
        *(("TIFF", what) for what in ("cropped", "cut off", "black")),
        *((kind, "turned") for kind in KINDS),
    ],
)
def test_what_is_no_level_is_left_out_and_said(
    tmp_path: Path, scene: Pixels, kind: str, what: str
) -> None:
    eighth = box_means(scene, 8)
    other = {
        "squeezed": np.asarray(Image.fromarray(scene).resize((SIDE, SIDE))),
        "cropped": box_means(scene, 4)[100 : 100 + SIDE, 200 : 200 + SIDE],
        "cut off": eighth[:SIDE],
        "turned": eighth[::-1, ::-1],
        "black": np.zeros_like(eighth),
    }[what]
    levels = [scene, box_means(scene, 2), np.ascontiguousarray(other)]
    with open_source(write_levels(kind, tmp_path, levels)) as slide:
        assert differing(slide, scene) == 0
        assert slide.level_downsamples == ((1, 1), (2, 2))
        if len(slide.pixels.level_sizes) > 2:
            (said,) = slide.doubts
            assert f"level 2 ({other.shape[1]} × {other.shape[0]} px)" in said
            assert "not used" in said


@pytest.mark.filterwarnings("error")
def test_a_level_with_an_empty_middle_is_used(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (240, 248, 3), np.uint8)
    pixels[24:-24, 24:-24] = 200
    with open_source(write_levels("TIFF", tmp_path, [pixels, box_means(pixels, 4)])) as slide:
        assert slide.at(2.0).level == 1
        assert slide.doubts == ()


@pytest.mark.parametrize(
    ("kind", "kernel"),
    [
        *((kind, "mean") for kind in KINDS),
        *(("TIFF", kernel) for kernel in ("nearest", "centre", "BILINEAR", "LANCZOS")),
    ],
)
def test_levels_by_any_kernel_are_used(
    tmp_path: Path, scene: Pixels, kind: str, kernel: str
) -> None:
    def reduced(factor: int) -> Pixels:
        if kernel == "mean":
            return box_means(scene, factor)
        if kernel in ("nearest", "centre"):
            first = factor // 2 if kernel == "centre" else 0
            return np.ascontiguousarray(scene[first::factor, first::factor])
        size = (round(2000 / factor), round(1500 / factor))
        return np.asarray(Image.fromarray(scene).resize(size, Image.Resampling[kernel]))

    levels = [scene, *map(reduced, (2, 4, 8, 16))]
    with open_source(write_levels(kind, tmp_path, levels)) as slide:
        for level, mpp in enumerate((0.5, 1, 2, 4, 8)):
            assert slide.at(mpp).level == level
        assert slide.doubts == ()


@pytest.mark.parametrize("kind", KINDS)
def test_tiles_missing_in_a_coarse_level_come_from_the_finer_one(
    tmp_path: Path, scene: Pixels, kind: str
) -> None:
    def left_out(level: int, row: int, column: int) -> bool:
        # nowhere scanned; not written at either level; not written at the second
        return (row << level >> 2, column << level >> 2) in ((0, 3), *((1, 1), (2, 2))[:level])

    levels = [np.ascontiguousarray(scene[:1024]), *(box_means(scene[:1024], f) for f in (2, 4))]
    if kind == "DICOM":
        path = write_dicom_levels(tmp_path, levels, stated=True, left_out=left_out)
    else:
        path = write_levels(kind, tmp_path, levels)
        forget(path, kind, left_out)
    expected = levels[0].copy()
    expected[:512, 1536:] = 255
    with open_source(path) as slide:
        assert slide.level_downsamples[-1] == (4, 4)
        for factor in (2, 4, 8):
            view = slide.at(0.5 * factor)
            assert view.level == min(factor, 4) // 2
            found = view.read((0, 0), (1024 // factor, 2000 // factor)).astype(int)
            assert abs(found - box_means(expected, factor)).max() <= 2
            part = view.read((150 // factor, 700 // factor), (300 // factor, 400 // factor))
            y, x = 150 // factor, 700 // factor
            np.testing.assert_array_equal(part, found[y : y + len(part), x : x + part.shape[1]])
        assert (slide.at(0.5).read((0, 0), (512, 2000))[:, 1536:] == 255).all()
        assert slide.doubts == ()


def forget(path: Path, kind: str, left_out: Callable[[int, int, int], bool]) -> None:
    """Take tiles out of a file that `write_levels` wrote."""
    if kind == "OME-Zarr":
        for chunk in path.glob("[0-9]/[0-9]*"):
            row, column = chunk.name.split(".")[:2]
            if left_out(int(chunk.parent.name), int(row), int(column)):
                chunk.unlink()
        return
    with tifffile.TiffFile(path) as file, path.open("r+b") as handle:
        for number, level in enumerate(file.series[0].levels):
            page = level.pages[0]
            across = -(-page.imagewidth // SIDE)
            for index in range(len(page.databytecounts)):
                if left_out(number, *divmod(index, across)):
                    for name in ("TileOffsets", "TileByteCounts"):
                        tag = page.tags[name]
                        size = {3: 2, 4: 4, 16: 8}[tag.dtype]
                        handle.seek(tag.valueoffset + index * size)
                        handle.write(bytes(size))


def test_levels_without_any_tile_are_computed_from_level_0(data_dir: Path) -> None:
    with open_source(data_dir / "faults" / "left_out_level_tiles.svs") as slide:
        level_0 = slide.at(0.5).read((0, 0), (3000, 4000))
        for mpp in (2.0, 8.0):
            view = slide.at(mpp)
            assert view.read((0, 0), view.shape).mean() == pytest.approx(230.8, abs=0.05)
        expected = box_means(level_0[:2992], 16).astype(int)
        assert abs(slide.at(8.0).read((0, 0), (187, 250)) - expected).max() <= 1
        assert slide.level_downsamples == ((1, 1),)
        assert [said.split(";")[0] for said in slide.doubts] == [
            "level 1 (1000 × 750 px) holds no pixels",
            "level 2 (250 × 187 px) holds no pixels",
        ]


# --- elsewhere ---------------------------------------------------------------------------------


def upload(path: Path) -> None:
    import boto3
    import s3fs

    s3fs.S3FileSystem().invalidate_cache()  # it remembers what was there
    client = boto3.client("s3")
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    for file in files:
        key = file.relative_to(path.parent).as_posix()
        client.upload_file(str(file), "slides", key, ExtraArgs={"ACL": "public-read"})
    client.close()


@pytest.mark.parametrize("scheme", ["s3", "http"])
@pytest.mark.parametrize(
    "write",
    [write_svs("jpeg"), write_ome_tiff, write_ome_zarr("0.5"), write_zip("0.4")],
    ids=["svs", "ome-tiff", "ome-zarr", "zip"],
)
def test_a_remote_slide_is_read_as_from_disk(
    bucket: str, tmp_path: Path, write: Callable[[Path], Path], scheme: str
) -> None:
    path = write(tmp_path)
    upload(path)
    if scheme == "http" and path.is_dir():
        pytest.skip("a folder has no listing by HTTP")
    url = f"s3://slides/{path.name}" if scheme == "s3" else f"{bucket}/slides/{path.name}"
    with open_source(url) as remote, open_source(path) as local:
        assert remote.fingerprint == local.fingerprint
        assert (remote.size, remote.mpp, remote.level_sizes) == (
            local.size,
            local.mpp,
            local.level_sizes,
        )
        np.testing.assert_array_equal(level_0(remote), level_0(local))
        found = remote.at(0.6).read((-5, 30), (100, 120))
        np.testing.assert_array_equal(found, local.at(0.6).read((-5, 30), (100, 120)))


def test_a_server_that_is_gone_makes_no_tissue_unreadable(bucket: str, tmp_path: Path) -> None:
    from moto.server import ThreadedMotoServer

    path = write_svs("jpeg")(tmp_path)
    destroyed = path.with_name("destroyed.svs")
    with tifffile.TiffFile(path) as file:
        first, count = file.pages[0].dataoffsets[0], file.pages[0].databytecounts[0]
    data = path.read_bytes()
    destroyed.write_bytes(data[:first] + bytes(count) + data[first + count :])
    for file in (path, destroyed):
        upload(file)
    # one more, of the same buckets, which can be stopped
    server = ThreadedMotoServer("127.0.0.1", 0)
    server.start()
    url = "http://{}:{}/slides/".format(*server.get_host_and_port())
    with open_source(f"{url}{path.name}") as slide, open_source(f"{url}destroyed.svs") as damaged:
        bad: list[Region] = []
        damaged.at(0.5).read((0, 0), (200, 200), bad=bad)
        assert bad
        server.stop()
        with pytest.raises(UnreachableError, match=r"cannot be reached any more: .* goes on"):
            slide.at(0.5).read((0, 0), (200, 200), bad=[])


def test_the_real_slide_is_the_same_from_s3(bucket: str, cmu_path: Path) -> None:
    upload(cmu_path)
    with open_source(f"s3://slides/{cmu_path.name}") as remote, open_source(cmu_path) as local:
        assert remote.fingerprint == local.fingerprint
        np.testing.assert_array_equal(level_0(remote), level_0(local))


def test_remote_slides_are_found_and_named(bucket: str, tmp_path: Path) -> None:
    upload(write_svs("lzw")(tmp_path))
    (tmp_path / "list.txt").write_text("s3://slides/a.svs\n")
    for text in ("s3://slides/a.svs", str(tmp_path / "list.txt")):
        (path,) = find_slides([text], output=tmp_path / "out")
        (job,) = plan_jobs([path], tmp_path / "out")
        assert job.folder == tmp_path / "out" / "a"
        with open_source(job.path) as slide:
            assert str(slide.path) == "s3://slides/a.svs"
    found = find_slides(["s3://slides/"], output=tmp_path / "out")
    assert "s3://slides/a.svs" in map(str, found)
    (path,) = find_slides([f"{bucket}/slides/a.svs?signature=x"], output=tmp_path / "out")
    assert plan_jobs([path], tmp_path / "out")[0].folder.name == "a"


def test_the_real_slide_gives_the_same_mask_from_s3(
    bucket: str, cmu_path: Path, tmp_path: Path
) -> None:
    upload(cmu_path)
    bundle = pointwise_bundle(tmp_path / "bundle", mpp=0.499)
    for name, source in (("here", str(cmu_path)), ("there", f"s3://slides/{cmu_path.name}")):
        arguments = [source, "--model", bundle, "--output", tmp_path / name]
        arguments += ["--outputs", "zarr,geojson", "--precision", "fp32"]
        result = CliRunner().invoke(group, ["segment", *map(str, arguments)])
        assert result.exit_code == 0, result.output
    masks = [
        np.asarray(zarr.open_group(tmp_path / name / cmu_path.stem / "mask.ome.zarr")["0"])
        for name in ("here", "there")
    ]
    assert len(np.unique(masks[0])) == 3
    np.testing.assert_array_equal(*masks)


def test_what_must_be_local_is_said_to_be(bucket: str, data_dir: Path, tmp_path: Path) -> None:
    upload(write_scn(tmp_path))
    with pytest.raises(SourceError, match=r"s3://slides/a\.scn: .*SCN.*OpenSlide"):
        open_source("s3://slides/a.scn")
    mirax = data_dir / "wsi" / "mrxs_partial" / "Mirax2-Fluorescence-2.mrxs"
    upload(mirax)
    with pytest.raises(SourceError, match="copy the slide here first"):
        open_source(f"s3://slides/{mirax.name}")
    with pytest.raises(SourceError, match="no such file"):
        open_source("s3://slides/nothing.svs")
    with pytest.raises(SourceError, match="remote"):
        open_source("nowhere://slides/nothing.svs")


def test_a_picture_of_192_million_pixels_is_opened_without_a_warning(tmp_path: Path) -> None:
    pixels = np.zeros((12_000, 16_000), np.uint8)
    pixels[:64] = np.random.default_rng(0).integers(0, 256, (64, 16_000))
    path = tmp_path / "large.png"
    Image.fromarray(pixels).save(path)
    with warnings.catch_warnings(action="error"), open_source(path, mpp=0.5) as slide:
        assert slide.size == (16_000, 12_000)


# --- broken files ------------------------------------------------------------------------------


def test_malformed_files_are_refused_in_one_line(data_dir: Path) -> None:
    """In a process of their own, with a time limit: none may crash or hang."""
    program = """
import sys
from wsi_pipeline.cli import group
from wsi_pipeline.errors import SourceError
from wsi_pipeline.sources import open_source
for path in sys.argv[1:]:
    try:
        with open_source(path, mpp=1) as slide:
            slide.thumbnail(100)
        print("read", path, flush=True)
    except SourceError as error:
        print("refused" if str(error).startswith(path) else "nameless", error, flush=True)
"""
    files = [str(path) for path in real_files("malformed")]
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", program, *files],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert (ran.returncode, ran.stderr) == (0, "")
    lines = ran.stdout.splitlines()
    assert len(lines) == len(files) == 22
    assert all(line.startswith("refused ") for line in lines)


# --- the options -------------------------------------------------------------------------------


def dry_run(tmp_path: Path, *arguments: str | Path) -> str:
    bundle = pointwise_bundle(tmp_path / "bundle", mpp=0.25)
    every = ["segment", *arguments, "--model", bundle, "--output", tmp_path / "out", "--dry-run"]
    result = CliRunner().invoke(group, [str(a) for a in every], catch_exceptions=False)
    return result.output


def test_fluorescence_is_refused_by_a_bundle_for_colours(data_dir: Path, tmp_path: Path) -> None:
    said = dry_run(tmp_path, data_dir / "wsi" / "ndpi" / "test3-DAPI-2-_387_.ndpi")
    assert "would fail: " in said
    assert "its background is dark, as in fluorescence; " in said


def test_a_table_gives_slides_their_mpp_and_a_number_their_series(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "plain.tif", resolution=(1, 1), resolutionunit="NONE")
    assert "--mpp" in dry_run(tmp_path, path)
    table = tmp_path / "mpp.csv"
    table.write_text("slide,mpp\nplain,0.25\n")
    assert "512 × 512 px mask" in dry_run(tmp_path, path, "--mpp-table", table)
    series = write_ome_tiff(tmp_path)
    assert "512 × 512 px mask" in dry_run(tmp_path, series)
    assert "128 × 128 px mask" in dry_run(tmp_path, series, "--series", "1", "--mpp", "0.25")
    arguments = ["tile", path, "--mpp", "0.5", "--patch-size", "64", "--output", tmp_path / "grids"]
    arguments += ["--mpp-table", table, "--tissue", "none"]
    result = CliRunner().invoke(group, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    with open_source(tmp_path / "grids" / "plain.zarr") as grid:
        assert grid.mpp == (0.25, 0.25)


def docs_table() -> str:
    """Return the docs' table of what is read by what, made of the cases above."""
    names = {by_tifffile: "tifffile", by_openslide: "OpenSlide", by_pillow: "Pillow"}
    names |= {by_pydicom: "pydicom", by_zarr: "zarr", whole: "the array written"}
    rows: dict[str, tuple[str, str, str]] = {}
    for case in REAL:
        if case.kind:
            oracle = names.get(case.oracle, "OpenSlide") if case.oracle else "OpenSlide"
            rows[case.kind] = (case.backend, "real", oracle)
    for made in MADE:
        oracle = names.get(made.oracle, "pydicom" if "DICOM" in made.kind else "tifffile")
        rows[made.kind] = (made.backend, "made by the test", oracle)
    rows["patch grid of `tile`"] = ("patch grid", "made by the test", "the slide it came from")
    lines = [f"| {kind} | {' | '.join(row)} |" for kind, row in sorted(rows.items())]
    return "\n".join(["| format | read by | file | compared with |", "|---|---|---|---|", *lines])


def test_the_table_of_the_docs_is_that_of_the_tests() -> None:
    page = (ROOT / "docs" / "slides.md").read_text("utf-8")
    assert docs_table() in page, f"put this into docs/slides.md:\n{docs_table()}"
