"""Each row of the tables of docs/radiology.md goes through the commands, and holds.

A row without a case fails, as does a case without a row: tables and behaviour change together.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import highdicom
import nibabel
import nrrd
import numpy as np
import pydicom
import pytest
import SimpleITK
import tifffile
from click.testing import CliRunner, Result
from dicoms import make, save, write, write_enhanced, write_series
from PIL import Image
from pydicom import uid
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from scans import blobs, classify, scan_bundle

from wsi_pipeline.cli import group

# what one thread ignores while it opens a picture, another ends: warnings are of the process
pytestmark = pytest.mark.filterwarnings("ignore:Dataset has no geotransform")

DOCS = Path(__file__).parents[1] / "docs" / "radiology.md"
PLANE = (blobs((40, 53)) // 4).astype(np.uint16)
VOXELS = blobs((7, 11, 13))
SPACING = (2.5, 0.7, 0.6)
"""(z, y, x) mm."""
AFFINE = np.diag([*SPACING[::-1], 1.0])

LYING = {
    "FrameOfReferenceUID": uid.generate_uid(),
    "PositionReferenceIndicator": None,
    "ImagePositionPatient": [0, 0, 0],
    "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
    "PixelSpacing": [0.7, 0.6],
    "SliceThickness": 2.5,
}
"""Attributes of a slice that say where it lies."""

Array = np.ndarray[Any, Any]
Opens = Callable[[Path], Iterator[tuple[str, Array]]]
"""Writes files; yields the name of each and what another reader makes of it."""
Refused = Callable[[Path], dict[str, str]]
"""Writes what is refused; returns by name an expression for what is said."""


def rows(column: str) -> list[str]:
    """Return the first cells of the table whose first column is called so."""
    text = DOCS.read_text("utf-8")
    table = text[text.index(f"\n| {column} |") :].partition("\n\n")[0]
    return [line.split(" | ")[0].removeprefix("| ") for line in table.strip().splitlines()[2:]]


def command(*arguments: object) -> Result:
    return CliRunner().invoke(group, [str(a) for a in arguments], catch_exceptions=False)


def itk(path: Path) -> Array:
    return SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path)))


def itk_series(folder: Path) -> Any:
    reader = SimpleITK.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    return reader.Execute()


# -- what opens -------------------------------------------------------------------------------


def pictures(folder: Path) -> Iterator[tuple[str, Array]]:
    for suffix in ("png", "jpg", "tif"):
        path = folder / f"{suffix}.{suffix}"
        Image.fromarray(PLANE.astype(np.uint8)).save(path)
        yield path.name, np.asarray(Image.open(path))


def planar_dicom(folder: Path) -> Iterator[tuple[str, Array]]:
    for name, kind in {
        "us": uid.UltrasoundImageStorage,
        "mg": uid.DigitalMammographyXRayImageStorageForPresentation,
        "cr": uid.ComputedRadiographyImageStorage,
        "dx": uid.DigitalXRayImageStorageForPresentation,
        "ct": uid.CTImageStorage,
        "mr": uid.MRImageStorage,
    }.items():
        about = {"SOPClassUID": kind, "Modality": name.upper(), **LYING}
        path = write(folder / f"{name}.dcm", PLANE, **about)
        yield path.name, itk(path)[0]


def film(folder: Path) -> Iterator[tuple[str, Array]]:
    frames = np.stack([PLANE, PLANE[::-1], PLANE[:, ::-1]])
    kind = uid.UltrasoundMultiFrameImageStorage
    write(folder / "first.dcm", frames, NumberOfFrames=3, SOPClassUID=kind)
    yield "first.dcm", frames[0]
    more = {"RepresentativeFrameNumber": 3, "SOPClassUID": kind}
    write(folder / "named.dcm", frames, NumberOfFrames=3, **more)
    yield "named.dcm", frames[2]


def nifti(folder: Path) -> Iterator[tuple[str, Array]]:
    for kind in (nibabel.Nifti1Image, nibabel.Nifti2Image):
        for suffix in (".nii", ".nii.gz"):
            path = folder / f"{kind.__name__}{len(suffix)}{suffix}"
            image = kind(VOXELS.T, AFFINE)
            image.header.set_slope_inter(0.5, 30)
            nibabel.save(image, path)
            yield path.name, np.asarray(nibabel.load(path).dataobj).T


def nrrds(folder: Path) -> Iterator[tuple[str, Array]]:
    for encoding in ("raw", "gzip", "bzip2"):
        path = folder / f"{encoding}.nrrd"
        about = {"space": "LPS", "space directions": AFFINE[:3, :3], "encoding": encoding}
        nrrd.write(str(path), VOXELS.T, about)
        # SimpleITK reads no bzip2
        yield path.name, itk(folder / "raw.nrrd")


def series(folder: Path) -> Iterator[tuple[str, Array]]:
    write_series(folder / "ct", VOXELS, order=(3, 0, 6, 2, 5, 1, 4), RescaleSlope=2)
    yield "ct", SimpleITK.GetArrayFromImage(itk_series(folder / "ct"))


def enhanced(folder: Path) -> Iterator[tuple[str, Array]]:
    order = (3, 0, 6, 2, 5, 1, 4)
    (folder / "ct").mkdir()
    path = write_enhanced(folder / "ct/e.dcm", VOXELS // 2, order=order, spacing=SPACING)
    volume = highdicom.imread(path).get_volume(dtype=np.float32)
    yield "ct", volume.to_patient_orientation("HPL").array


OPENS: dict[str, Opens] = {
    "PNG, JPEG, TIFF": pictures,
    "DICOM, one frame: ultrasound, mammography, CR, DX, CT, MR": planar_dicom,
    "DICOM film (several frames)": film,
    "NIfTI 1 and 2, `.nii`, `.nii.gz`": nifti,
    "NRRD, raw, gzip or bzip2": nrrds,
    "DICOM series, one file a slice": series,
    "DICOM, enhanced multi-frame": enhanced,
}


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Return a bundle for images and one for volumes, by the number of axes."""
    folder = tmp_path_factory.mktemp("bundles")
    image = f"fit = {list(PLANE.shape)}"
    volume = f"spacing_mm = {list(SPACING)}"
    return {
        2: scan_bundle(folder / "image", modality="image", resolution=image, patch_size=(32, 32),
                       keys="scale = [0.0, 255.0]"),
        3: scan_bundle(folder / "volume", resolution=volume, patch_size=(8, 8, 8),
                       keys="scale = [0.0, 1000.0]"),
    }  # fmt: skip


@pytest.mark.parametrize("row", rows("format"))
def test_what_opens_is_what_another_reader_has(
    tmp_path: Path, bundles: dict[int, Path], row: str
) -> None:
    given = tmp_path / "in"
    given.mkdir()
    others = dict(OPENS[row](given))
    axes = {values.ndim for values in others.values()}.pop()
    inputs = [given / name for name in others]
    result = command("segment", *inputs, "-m", bundles[axes], "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    for name, values in others.items():
        folder = tmp_path / "out" / name.partition(".")[0]
        if axes == 2:
            mask = np.asarray(Image.open(folder / "mask.png"))
        else:
            mask = np.asarray(nibabel.load(folder / "mask.nii.gz").dataobj).T
        expected = classify(values.astype(np.float32) / (255 if axes == 2 else 1000))
        assert (mask == expected).all(), name
        assert expected.any()


# -- where spacing is taken from --------------------------------------------------------------


def region(y: float, x: float) -> Dataset:
    """Return an ultrasound region of tissue, of (y, x) cm a pixel."""
    found = Dataset()
    found.RegionSpatialFormat = 1
    found.PhysicalUnitsXDirection = found.PhysicalUnitsYDirection = 3
    found.PhysicalDeltaY, found.PhysicalDeltaX = y, x
    return found


RULED = {
    "SequenceOfUltrasoundRegions": [region(0.02, 0.01), region(0.0200001, 0.01)],
    "PixelSpacing": [0.4, 0.3],
    "NominalScannedPixelSpacing": [0.6, 0.5],
    "ImagerPixelSpacing": [0.8, 0.7],
}
"""All that a planar DICOM may say, the first first."""


def planar(folder: Path, *names: str, **more: Any) -> Path:
    return write(folder / "a.dcm", PLANE, **{name: RULED[name] for name in names}, **more)


Said = tuple[Path, tuple[float, ...] | None, str]
"""A file, its mm in the order of its axes from x on, and an expression for what is said."""


def of_ultrasound(folder: Path) -> Iterator[Said]:
    yield planar(folder, *RULED), (0.1, 0.2), ""
    apart = [region(0.02, 0.01), region(0.03, 0.01)]
    yield planar(folder, SequenceOfUltrasoundRegions=apart), None, "different sizes"


def of_pixels(folder: Path) -> Iterator[Said]:
    yield planar(folder, *[*RULED][1:]), (0.3, 0.4), ""


def of_film(folder: Path) -> Iterator[Said]:
    yield planar(folder, *[*RULED][2:]), (0.5, 0.6), "film"


def of_detector(folder: Path) -> Iterator[Said]:
    yield planar(folder, "ImagerPixelSpacing"), (0.7, 0.8), "detector"
    larger = {"EstimatedRadiographicMagnificationFactor": 2}
    yield planar(folder, "ImagerPixelSpacing", **larger), (0.35, 0.4), "magnification"


def of_pictures(folder: Path) -> Iterator[Said]:
    for suffix in ("png", "jpg", "tif"):
        path = folder / f"a.{suffix}"
        Image.fromarray(PLANE.astype(np.uint8)).save(path, dpi=(254, 254))
        yield path, None, ""


def of_nifti(folder: Path) -> Iterator[Said]:
    for unit, mm in {"mm": 1.0, "micron": 1e-3, "meter": 1e3}.items():
        image = nibabel.Nifti1Image(VOXELS.T, AFFINE)
        image.header.set_xyzt_units(unit)
        nibabel.save(image, folder / f"{unit}.nii")
        zooms = nibabel.load(folder / f"{unit}.nii").header.get_zooms()
        yield folder / f"{unit}.nii", tuple(float(z) * mm for z in zooms), ""
    path = folder / "apart.nii"
    nibabel.save(nibabel.Nifti1Image(VOXELS.T, AFFINE), path)
    header = bytearray(path.read_bytes())
    header[80:84] = np.float32(0.9).tobytes()  # pixdim[1]
    path.write_bytes(header)
    yield path, SPACING[::-1], "by its affine, .* by its header; the first count"
    header[80:84], header[123] = np.float32(0.6).tobytes(), 5
    path.write_bytes(header)
    yield path, SPACING[::-1], "none of NIfTI's"


def of_nrrd(folder: Path) -> Iterator[Said]:
    path = folder / "a.nrrd"
    about = {"space": "LPS", "space directions": AFFINE[:3, :3]}
    nrrd.write(str(path), VOXELS.T, about)
    yield path, SimpleITK.ReadImage(str(path)).GetSpacing(), ""
    nrrd.write(str(path), VOXELS.T, about | {"space units": ["cm"] * 3})
    yield path, tuple(10 * mm for mm in SPACING[::-1]), ""
    nrrd.write(str(path), VOXELS.T, {"spacings": SPACING[::-1]})
    yield path, SimpleITK.ReadImage(str(path)).GetSpacing(), "how it lies"


def of_dicom_volume(folder: Path) -> Iterator[Said]:
    path = write_series(folder / "ct", VOXELS, SliceThickness=9, spacing=SPACING)
    yield path, itk_series(path).GetSpacing(), ""
    path = write_enhanced(folder / "e.dcm", VOXELS, order=range(7), spacing=SPACING)
    spacing = highdicom.imread(path).get_volume().spacing
    yield path, tuple(spacing[::-1]), ""
    rounded = [round(30 + 0.625 * z, 1) for z in range(7)]
    path = write_series(folder / "r", VOXELS, spacing=SPACING, change=at(*rounded))
    yield path, (0.6, 0.7, float(np.polyfit(range(7), rounded, 1)[0])), "rounded"


def of_one_slice(folder: Path) -> Iterator[Said]:
    yield write_series(folder / "a", VOXELS[:1], spacing=SPACING), SPACING[::-1], "thickness"
    path = write_series(folder / "b", VOXELS[:1], spacing=SPACING, SpacingBetweenSlices=4)
    yield path, (0.6, 0.7, 4.0), "thickness"


SPACINGS: dict[str, Callable[[Path], Iterator[Said]]] = {
    "ultrasound": of_ultrasound,
    "DICOM image with PixelSpacing": of_pixels,
    "DICOM image with NominalScannedPixelSpacing": of_film,
    "DICOM image with ImagerPixelSpacing": of_detector,
    "PNG, JPEG, TIFF": of_pictures,
    "NIfTI": of_nifti,
    "NRRD": of_nrrd,
    "DICOM volume": of_dicom_volume,
    "a single slice of a volume": of_one_slice,
}


@pytest.mark.parametrize("row", rows("spacing"))
def test_spacing_is_taken_from_what_the_row_says(
    tmp_path: Path, bundles: dict[int, Path], row: str
) -> None:
    for path, spacing, said in SPACINGS[row](tmp_path):
        axes = 2 if spacing is None else len(spacing)
        result = command("info", path, "-m", bundles[axes], "--json")
        assert result.exit_code == 0, result.output
        facts = json.loads(result.stdout)
        assert facts["spacing_mm"] == (spacing and pytest.approx(list(spacing), rel=1e-5)), path
        assert re.search(said, " ".join(facts["doubts"])), facts["doubts"]
        assert bool(facts["doubts"]) == bool(said)


# -- what is refused --------------------------------------------------------------------------


def at(*places: float) -> dict[int, dict[str, Any]]:
    """Return where the slices of a series lie along the body."""
    return {z: {"ImagePositionPatient": [-10.0, 20.0, place]} for z, place in enumerate(places)}


def no_volumes(folder: Path) -> dict[str, str]:
    (folder / "text.nii").write_text("no volume")
    (folder / "empty.nii").write_bytes(b"")
    nibabel.save(nibabel.Nifti1Image(VOXELS.T, AFFINE), folder / "cut.nii")
    data = bytearray((folder / "cut.nii").read_bytes())
    (folder / "cut.nii").write_bytes(data[:-10])
    nrrd.write(str(folder / "damaged.nrrd"), VOXELS.T, {"spacings": SPACING, "encoding": "gzip"})
    packed = bytearray((folder / "damaged.nrrd").read_bytes())
    packed[-20:] = bytes(20)
    (folder / "damaged.nrrd").write_bytes(packed)
    data[42:48] = np.array([30000] * 3, "<i2").tobytes()
    (folder / "huge.nii").write_bytes(data)
    return {
        "text.nii": "no volume that is known here; expected NIfTI, NRRD or a series of DICOM",
        "empty.nii": "no volume that is known here|empty",
        "cut.nii": r"is cut off: 2,344 bytes, of 2,354 that its header says",
        "damaged.nrrd": "cannot be (read|unpacked)",
        "huge.nii": "of 54,000,000,000,352 that its header says|cannot hold",
    }


def missing(folder: Path) -> dict[str, str]:
    write_series(folder / "ct", VOXELS)
    for z in (2, 3):
        (folder / f"ct/slice00{z}").unlink()
    return {
        "ct": r"slices are missing: between 32\.50 and 40\.00 mm lie 7\.50 mm, "
        r"between others 2\.50 \(2 missing\)"
    }


def uneven(folder: Path) -> dict[str, str]:
    write_series(folder / "ct", VOXELS, change=at(30, 32.5, 35, 37.5, 40.7, 42.5, 45))
    return {"ct": "not equally spaced: between 37.50 and 40.70 mm lie 3.20 mm, between others 2.50"}


def several_times(folder: Path) -> dict[str, str]:
    one = {name: uid.generate_uid() for name in ("SeriesInstanceUID", "FrameOfReferenceUID")}
    for time in (1, 2):
        write_series(folder / f"t{time}", VOXELS, TemporalPositionIdentifier=time, **one)
        for path in (folder / f"t{time}").iterdir():
            (folder / "series").mkdir(exist_ok=True)
            path.rename(folder / "series" / f"{path.name}_{time}")
    four = np.stack([VOXELS] * 3).T
    nibabel.save(nibabel.Nifti1Image(four, AFFINE), folder / "four.nii")
    about = {
        "kinds": ["domain"] * 3 + ["list"],
        "space": "LPS",
        "space directions": [*AFFINE[:3, :3], [np.nan] * 3],
    }
    nrrd.write(str(folder / "five.nrrd"), four, about)
    twice = np.concatenate([VOXELS, VOXELS])
    (folder / "e").mkdir()
    write_enhanced(folder / "e/e.dcm", twice, order=range(14), spacing=SPACING, times=2)
    chosen = r"choose one with --time-point, 0 to"
    return {
        "series": f"2 time points .* by TemporalPositionIdentifier; {chosen} 1",
        "four.nii": f"3 time points .* by the fourth axis; {chosen} 2",
        "five.nrrd": f"3 time points .* by the fourth axis; {chosen} 2",
        "e": f"2 time points .* by TemporalPositionIndex; {chosen} 1",
    }


def doubled(folder: Path) -> dict[str, str]:
    write_series(folder / "ct", VOXELS, change=at(30, 32.5, 35, 37.5, 37.5, 42.5, 45))
    return {"ct": "7 slices, of which 1 lie where another does; .*SeriesInstanceUID of its own"}


def unreadable(folder: Path) -> dict[str, str]:
    write_series(folder / "pixels", VOXELS)
    cut = folder / "pixels/slice004"
    cut.write_bytes(cut.read_bytes()[:-50])
    write_series(folder / "named", VOXELS)
    (folder / "named/slice006").write_bytes(b"")
    return {
        "pixels": "slice004: its pixels .* damaged or cut off",
        "named": "slice006 beside its slices cannot be read .*copy them again, or take them out",
    }


def mixed(folder: Path) -> dict[str, str]:
    oblique = [0.8, 0.6, 0.0, -0.36, 0.48, 0.8]
    for name, change in {
        "sizes": {"Rows": 10, "PixelData": VOXELS[3, :10].tobytes()},
        "spacings": {"PixelSpacing": [0.9, 0.9]},
        "orientations": {"ImageOrientationPatient": oblique},
        "bodies": {"FrameOfReferenceUID": uid.generate_uid()},
    }.items():
        write_series(folder / name, VOXELS)
        path = folder / name / "slice003"
        slice_ = pydicom.dcmread(path)
        for attribute, value in change.items():
            setattr(slice_, attribute, value)
        slice_.save_as(path)
    shares = r"in one series \(6 and 1 slices\)"
    return {
        "sizes": f"slices of 2 sizes {shares}",
        "spacings": rf"slices of 2 (pixel )?spacings {shares}",
        "orientations": f"slices of 2 orientations {shares}",
        "bodies": f"slices of 2 frames of reference {shares}",
    }


def slanted(folder: Path) -> dict[str, str]:
    change = at(*(30 + 2.5 * z for z in range(7)))
    for z in range(7):
        change[z]["ImagePositionPatient"][1] += 0.4 * z
    write_series(folder / "tilted", VOXELS, change=change)
    sheared = AFFINE.copy()
    sheared[1, 2] = 0.8
    nibabel.save(nibabel.Nifti1Image(VOXELS.T, sheared), folder / "sheared.nii")
    return {
        "tilted": r"shifted sideways by up to 2\.40 mm \(a tilted gantry\); resample it",
        "sheared.nii": "right angles .*resample it",
    }


def axes_too_many(folder: Path) -> dict[str, str]:
    five = np.zeros((3, 4, 5, 2, 2), np.int16)
    nibabel.save(nibabel.Nifti1Image(five, AFFINE), folder / "five.nii")
    nrrd.write(str(folder / "v.nrrd"), VOXELS.T, {"kinds": ["vector", "domain", "domain"]})
    write_series(folder / "colour", np.zeros((3, 5, 6, 3), np.uint8))
    return {
        "five.nii": "3 × 4 × 5 × 2 × 2 voxels on 5 axes; expected one volume, on three",
        "v.nrrd": "axes of vector, domain, domain; expected three of space",
        "colour": "slices in colour; expected one value a voxel",
    }


def no_numbers(folder: Path) -> dict[str, str]:
    for name, value in {"nan.nii": np.nan, "inf.nii": np.inf}.items():
        values = VOXELS.astype(np.float32)
        values[3, 4, 5] = value
        nibabel.save(nibabel.Nifti1Image(values.T, AFFINE), folder / name)
    values = PLANE.astype(np.float32)
    values[3, 4] = np.nan
    tifffile.imwrite(folder / "nan.tif", values, photometric="minisblack")
    said = r"values that are no numbers \(NaN or infinite\)"
    return dict.fromkeys(("nan.nii", "inf.nii", "nan.tif"), said)


def no_images(folder: Path) -> dict[str, str]:
    grey = PLANE.astype(np.uint8)
    for name, kind in {
        "seg.dcm": uid.SegmentationStorage,
        "dose.dcm": uid.RTDoseStorage,
        "map.dcm": uid.ParametricMapStorage,
        "slide.dcm": uid.VLWholeSlideMicroscopyImageStorage,
    }.items():
        write(folder / name, grey, SOPClassUID=kind)
    report = make(grey, SOPClassUID=uid.BasicTextSRStorage)
    for attribute in ("PixelData", "Rows", "Columns", "BitsAllocated"):
        del report[attribute]
    save(folder / "report.dcm", report)
    return {
        "seg.dcm": "DICOM's Segmentation Storage; name the image it was made of",
        "dose.dcm": "DICOM's RT Dose Storage",
        "map.dcm": "DICOM's Parametric Map Storage",
        "slide.dcm": "a DICOM whole-slide image; segment it with a bundle for slides",
        "report.dcm": r"without pixels \(Basic Text SR Storage\)",
    }


def undecoded(folder: Path) -> dict[str, str]:
    film = make(PLANE.astype(np.uint8))
    film.file_meta.TransferSyntaxUID = uid.MPEG2MPML
    film.PixelData = encapsulate([bytes(64)])
    save(folder / "mpeg.dcm", film)
    return {"mpeg.dcm": "MPEG2 Main Profile"}


PLANAR = ("values that are no numbers", "segmentations, doses", "a transfer syntax")
REFUSED: dict[str, Refused] = {
    "no image or volume, damaged, cut off, empty, or too small for what its header says": (
        no_volumes
    ),
    "missing slices": missing,
    "unequal spacing (by more than 2 %, and more than the rounding of positions explains)": uneven,
    "several time points or kinds of contrast in one series or file": several_times,
    "some slices in the place of others": doubled,
    "a slice, or what is named as one, that cannot be read": unreadable,
    "different sizes, spacings, orientations or frames of reference in one series": mixed,
    "slices shifted sideways by more than half a pixel (tilted gantry), sheared affines": slanted,
    "a fifth axis longer than 1, vectors, colours in a volume": axes_too_many,
    "values that are no numbers": no_numbers,
    "segmentations, doses, maps, reports, whole-slide images of DICOM": no_images,
    "a transfer syntax that cannot be decoded": undecoded,
}


@pytest.mark.parametrize("row", rows("found"))
def test_what_is_refused_is_told_in_one_sentence(
    tmp_path: Path, bundles: dict[int, Path], row: str
) -> None:
    given = tmp_path / "in"
    given.mkdir()
    for name, says in REFUSED[row](given).items():
        axes = 2 if name.endswith((".dcm", ".tif")) and row.startswith(PLANAR) else 3
        line = ("segment", given / name, "-m", bundles[axes], "-o", tmp_path / "out")
        result = command(*line)
        assert result.exit_code == 1, result.output
        (told,) = (line for line in result.stderr.splitlines() if "failed: " in line)
        assert re.search(f"{re.escape(str(given / name))}.*: .*({says})", told), told
        assert "Traceback" not in result.output
        if "--time-point" in says:
            result = command(*line, "--time-point", 1)
            assert result.exit_code == 0, result.output


def test_no_case_is_without_its_row() -> None:
    for column, cases in {"format": OPENS, "spacing": SPACINGS, "found": REFUSED}.items():
        assert list(cases) == rows(column)
