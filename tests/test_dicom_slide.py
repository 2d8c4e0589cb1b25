"""DICOM of slides: segmentations, probabilities and annotations, read back by highdicom."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from urllib import request

import highdicom
import numpy as np
import pytest
import zarr
from bundles import pointwise_bundle
from click.testing import CliRunner
from dicoms import PATIENT, write_slide
from pydicom import dcmread

from wsi_pipeline.bundle import ClassInfo
from wsi_pipeline.cli import group
from wsi_pipeline.export.dicom_slide import Origin, level_headers, write_masks
from wsi_pipeline.files.atomic import sha256_of
from wsi_pipeline.report.record import load_run
from wsi_pipeline.sources import open_source

MPP = (0.25, 0.3)


def call(*args):
    """Run a command; return what it says on the terminal."""
    result = CliRunner().invoke(group, list(map(str, args)))
    assert result.exit_code == 0, result.output
    return result.output


def segment(slide, model, output, *more):
    options = ("--model", model, "--output", output, "--tissue", "none", "--device", "cpu")
    call("segment", slide, *options, "--precision", "fp32", *more)
    return output / slide.stem


@pytest.fixture(scope="module")
def place(tmp_path_factory, slide_path):
    """Return a folder with a model, a DICOM slide, another slide, and in `out` a run of each."""
    found = tmp_path_factory.mktemp("dicom")
    with open_source(slide_path) as slide:
        pixels = slide.at(slide.mpp[0]).read((0, 0), slide.at(slide.mpp[0]).shape)
    write_slide(found / "d.dcm", pixels, MPP)
    shutil.copy(found / "d.dcm", found / "copy.dcm")
    shutil.copy(slide_path, found / f"t{slide_path.suffix}")
    model = pointwise_bundle(found / "model", mpp=0.5)
    for name in ("d.dcm", f"t{slide_path.suffix}"):
        segment(found / name, model, found / "out", "--outputs", "zarr,geojson,dicom")
    return found


@pytest.fixture(params=["d", "t"])
def run(place, request):
    return place / "out" / request.param


def levels_of(path):
    found = zarr.open_group(path, mode="r")
    return [found[str(n)][:] for n in range(len(found.attrs["multiscales"][0]["datasets"]))]


def test_masks_and_probabilities_are_those_of_the_zarrs(run):
    levels = levels_of(run / "mask.ome.zarr")
    assert len(levels) == 2
    for number, level in enumerate(levels):
        found = highdicom.seg.segread(run / (f"mask-{number}.dcm" if number else "mask.dcm"))
        assert [s.SegmentNumber for s in found.SegmentSequence] == [0, 1, 2]
        assert [s.SegmentLabel for s in found.SegmentSequence[1:]] == ["Tumor", "Stroma"]
        assert (found.get_total_pixel_matrix(combine_segments=True) == level).all()
        assert found.file_meta.TransferSyntaxUID.name == "JPEG-LS Lossless Image Compression"
    found = highdicom.seg.segread(run / "probability.dcm")
    pixels = found.get_total_pixel_matrix(rescale_fractional=False)
    assert (np.moveaxis(pixels, -1, 0) == levels_of(run / "probability.ome.zarr")[0]).all()
    assert found.MaximumFractionalValue == 255
    colors = load_run(run).colors
    for segment_of in found.SegmentSequence:
        lab = highdicom.color.CIELabColor.from_dicom_value(segment_of.RecommendedDisplayCIELabValue)
        assert np.abs(np.subtract(lab.to_rgb(), colors[segment_of.SegmentLabel])).max() <= 1


def test_what_the_standard_asks_for_is_there(run):
    tables = Path(highdicom.__file__).parent / "_standard"
    modules, attributes, iods = (
        json.loads((tables / f"{name}_map.json").read_text("utf-8"))
        for name in ("iod_module", "module_attribute", "sop_class_iod")
    )
    missing = set()
    for path in run.glob("*.dcm"):
        found = dcmread(path)
        for module in modules[iods[found.SOPClassUID]]:
            for told in attributes[module["key"]] if module["usage"] == "M" else ():
                items = [found]
                for step in told["path"]:
                    items = [item for one in items if step in one for item in one[step].value]
                if any(told["keyword"] not in item for item in items) and told["type"] in "12":
                    missing.add(told["keyword"])
                if any(told["keyword"] in i and i[told["keyword"]].is_empty for i in items):
                    assert told["type"] != "1", (path, told)
    # These are of frames that say where they lie, and of what; tiled in full they need not.
    assert missing <= {
        "DerivationImageSequence", "FrameContentSequence", "PlanePositionSequence",
        "PlaneOrientationSequence", "PlanePositionSlideSequence", "SegmentIdentificationSequence",
    }  # fmt: skip


@pytest.mark.skipif(not shutil.which("dciodvfy"), reason="no dciodvfy (dicom3tools) on the path")
def test_dciodvfy_finds_nothing_that_it_should(run):
    # It is older than label maps, and than segmentations that are tiled in full.
    known = (
        "PatientOrientation", "Laterality", "CommonZCoordinateValue", "SpecimenMacro",
        "PlanePosition", "PlaneOrientation", "SegmentIdentification", "PerFrameFunctional",
    )  # fmt: skip
    for name in ("annotations.dcm", "probability.dcm"):
        found = subprocess.run(["dciodvfy", run / name], capture_output=True, text=True).stderr
        errors = [line for line in found.splitlines() if line.startswith("Error")]
        assert [line for line in errors if not any(word in line for word in known)] == []


def rings_of(run):
    """Return, by class, each polygon of a run's GeoJSON: rings, area, probability."""
    found = {}
    for feature in json.loads((run / "annotations.geojson").read_text("utf-8"))["features"]:
        told = feature["properties"]
        rings = [
            [tuple(map(float, xy)) for xy in r[:-1]] for r in feature["geometry"]["coordinates"]
        ]
        sizes = told["measurements"]
        found.setdefault(told["classification"]["name"], []).append(
            (rings, sizes["Area mm^2"] * 1e6, sizes.get("Mean probability"))
        )
    return found


def polygons_of(path):
    """Return, by class, each polygon of annotations with its holes put back, and measurements."""
    found = {}
    groups = highdicom.ann.annread(path).get_annotation_groups()
    assert [each.AnnotationGroupNumber for each in groups] == list(range(1, len(groups) + 1))
    for each in groups:
        rings = [list(map(tuple, xy)) for xy in each.get_graphic_data("2D")]
        names, values, _ = each.get_measurements()
        if each.label.startswith("holes in "):
            assert [name.meaning for name in names] == [
                "Number of the annotation that it is a hole of"
            ]
            for ring, number in zip(rings, values[:, 0].astype(int), strict=True):
                found[each.label.removeprefix("holes in ")][number - 1][0].append(ring)
            continue
        measured = dict(zip([name.meaning for name in names], values.T, strict=True))
        chance = measured.get("Mean probability", [None] * len(rings))
        found[each.label] = [
            ([ring], area, p) for ring, area, p in zip(rings, measured["Area"], chance, strict=True)
        ]
    return found


def test_vertices_are_those_of_the_geojson(run):
    expected, found = rings_of(run), polygons_of(run / "annotations.dcm")
    assert found.keys() == expected.keys() == {"Tumor", "Stroma"}
    for name, polygons in expected.items():
        assert [rings for rings, *_ in found[name]] == [rings for rings, *_ in polygons]
        for column in (1, 2):
            own, its = ([p[column] for p in of[name]] for of in (found, expected))
            assert np.allclose(own, its, rtol=1e-5, atol=1e-4)
    assert any(len(rings) > 1 for polygons in expected.values() for rings, *_ in polygons)
    told = dcmread(run / "annotations.dcm")
    (image,) = told.ReferencedImageSequence
    named = run / "mask.dcm" if run.name == "t" else run.parents[1] / "d.dcm"
    assert image.ReferencedSOPInstanceUID == dcmread(named).SOPInstanceUID
    assert image.ReferencedSOPClassUID == dcmread(named).SOPClassUID
    colors = load_run(run).colors
    for group_of in told.AnnotationGroupSequence:
        lab = highdicom.color.CIELabColor.from_dicom_value(group_of.RecommendedDisplayCIELabValue)
        name = group_of.AnnotationGroupLabel.removeprefix("holes in ")
        assert np.abs(np.subtract(lab.to_rgb(), colors[name])).max() <= 1


def test_annotations_follow_what_was_asked_for_and_may_be_none(place, tmp_path):
    folder = Path(shutil.copytree(place / "out" / "d", tmp_path / "d"))
    before = dcmread(folder / "annotations.dcm"), sha256_of(folder / "mask.dcm")
    call("export", folder, "--simplify", "0")
    assert polygons_of(folder / "annotations.dcm").keys() == rings_of(folder).keys()
    exact = dcmread(folder / "annotations.dcm")
    assert exact.SOPInstanceUID != before[0].SOPInstanceUID
    assert sha256_of(folder / "mask.dcm") == before[1]
    call("export", folder, "--min-area", "1e9")
    none = highdicom.ann.annread(folder / "annotations.dcm")
    assert [group.number_of_annotations for group in none.get_annotation_groups()] == [0]


def test_of_a_coarse_mask_vertices_are_in_pixels_of_the_image_that_is_named(place, tmp_path):
    for slide in (place / "d.dcm", *place.glob("t.*")):
        outputs = ("--outputs", "zarr,geojson,dicom", "--mask-mpp", "1")
        folder = segment(slide, place / "model", tmp_path, *outputs)
        scale = np.ones(2)
        if slide.stem == "t":
            whole, mask = load_run(folder).slide["size"], dcmread(folder / "mask.dcm")
            scale = np.array(whole) / (mask.TotalPixelMatrixColumns, mask.TotalPixelMatrixRows)
        expected, found = rings_of(folder), polygons_of(folder / "annotations.dcm")
        for name, polygons in expected.items():
            for (rings, *_), (own, *_) in zip(polygons, found[name], strict=True):
                for ring, its in zip(rings, own, strict=True):
                    assert np.allclose(np.array(its) * scale, ring, atol=2)


def test_of_a_dicom_slide_all_is_told_as_the_slide_has_it(place):
    source, run = dcmread(place / "d.dcm"), place / "out" / "d"
    series = set()
    for path in run.glob("*.dcm"):
        found = dcmread(path)
        for name in (*PATIENT, "StudyInstanceUID"):
            assert found[name].value == source[name].value
        (referenced,) = found.ReferencedSeriesSequence
        assert referenced.SeriesInstanceUID == source.SeriesInstanceUID
        (instance,) = referenced.ReferencedInstanceSequence
        assert instance.ReferencedSOPInstanceUID == source.SOPInstanceUID
        assert found.SeriesInstanceUID != source.SeriesInstanceUID
        series.add(found.SeriesInstanceUID)
        if found.Modality == "ANN":
            continue
        for name in ("FrameOfReferenceUID", "ImageOrientationSlide", "ContainerIdentifier"):
            assert found[name].value == source[name].value
        (corner,) = found.TotalPixelMatrixOriginSequence
        assert corner == source.TotalPixelMatrixOriginSequence[0]
        measures = found.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
        size = (found.TotalPixelMatrixRows, found.TotalPixelMatrixColumns)
        whole = (source.TotalPixelMatrixRows, source.TotalPixelMatrixColumns)
        # The last pixels of reduced levels lie over the edge, by less than one of them.
        for mm, n, full, of_all in zip(measures.PixelSpacing, size, MPP, whole, strict=True):
            assert 0 <= mm * n - full * of_all / 1000 < mm
    ours, its = (
        highdicom.imread(path).get_volume_geometry() for path in (run / "mask.dcm", place / "d.dcm")
    )
    assert np.allclose(ours.affine, its.affine)
    assert len(series) == len({dcmread(path).Modality for path in run.glob("*.dcm")}) + 1


def test_another_slide_gets_a_study_and_a_frame_of_its_own_once(place, tmp_path):
    (slide,) = place.glob("t.*")
    again = segment(slide, place / "model", tmp_path, "--outputs", "dicom", "--mask-mpp", "1")
    own, other = (dcmread(path / "mask.dcm") for path in (place / "out" / "t", again))
    for name in ("StudyInstanceUID", "FrameOfReferenceUID"):
        assert own[name].value == other[name].value
    assert own.SOPInstanceUID != other.SOPInstanceUID
    assert own.SOPInstanceUID.startswith("2.25.")
    assert "ReferencedSeriesSequence" not in own
    # One corner of the slide lies at (0, 0) of the slide's axes.
    (corner,), mm = own.TotalPixelMatrixOriginSequence, load_run(place / "out" / "t").slide["mpp"]
    assert corner.XOffsetInSlideCoordinateSystem == pytest.approx(
        own.TotalPixelMatrixRows * mm[1] / 1000
    )
    assert corner.YOffsetInSlideCoordinateSystem == pytest.approx(
        own.TotalPixelMatrixColumns * mm[0] / 1000
    )


def test_the_same_run_gives_the_same_bytes_and_lists_them(run, place, tmp_path):
    folder = Path(shutil.copytree(run, tmp_path / run.name))
    written = {path.name: sha256_of(path) for path in folder.glob("*.dcm")}
    assert {"mask.dcm", "mask-1.dcm", "probability.dcm", "annotations.dcm"} == written.keys()
    assert written.items() <= load_run(folder).files.items()
    for lost in ("mask-1.dcm", "annotations.dcm", "mask.dcm"):
        (folder / lost).unlink()
        call("export", folder)
        assert {path.name: sha256_of(path) for path in folder.glob("*.dcm")} == written
    (slide,) = place.glob(f"{run.name}.*")
    (folder / "mask-1.dcm").unlink()
    assert segment(slide, place / "model", tmp_path, "--outputs", "zarr,geojson,dicom") == folder
    assert {path.name: sha256_of(path) for path in folder.glob("*.dcm")} == written
    # What is no longer wanted goes, but for what somebody has changed.
    (folder / "probability.dcm").write_bytes(b"mine")
    segment(slide, place / "model", tmp_path, "--outputs", "zarr", "--mask-mpp", "1")
    assert [path.name for path in folder.glob("*.dcm")] == ["probability.dcm"]


def test_behind_a_url_lie_the_same_bytes(place, bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (slide,) = place.glob("t.*")
    for _ in range(2):
        call(
            *("segment", slide, "--model", place / "model", "--output", "s3://slides/dicom"),
            *("--outputs", "zarr,geojson,dicom", "--tissue", "none", "--device", "cpu"),
            *("--precision", "fp32"),
        )
        for path in (place / "out" / "t").glob("*.dcm"):
            with request.urlopen(f"{bucket}/slides/dicom/t/{path.name}") as answer:
                assert answer.read() == path.read_bytes()


def test_export_writes_it_besides_and_needs_a_slide_that_may_be_dicom(place, tmp_path):
    slide = tmp_path / "d.dcm"
    shutil.copy(place / "d.dcm", slide)
    folder = segment(slide, place / "model", tmp_path / "out", "--outputs", "zarr,tiff")
    slide.rename(tmp_path / "away.dcm")
    before = (folder / "run.json").read_bytes()
    result = CliRunner().invoke(group, ["export", str(folder), "--outputs", "dicom"])
    assert result.exit_code == 1
    assert "the slide was not found at" in result.output
    assert (folder / "run.json").read_bytes() == before
    (tmp_path / "away.dcm").rename(slide)
    call("export", folder, "--outputs", "dicom")
    own, other = (sha256_of(p / "mask.dcm") for p in (folder, place / "out" / "d"))
    assert own == other
    assert not (folder / "probability.dcm").exists()


@pytest.mark.parametrize(
    ("charset", "name"),
    [("ISO_IR 100", "Müller^Jörg"), (["", "ISO 2022 IR 87"], "Yamada^Tarou=山田^太郎")],
)
def test_names_of_patients_classes_and_models_are_texts_of_any_alphabet(tmp_path, charset, name):
    path = write_slide(tmp_path / "s.dcm", np.zeros((300, 500, 3), np.uint8), MPP)
    source = dcmread(path)
    source.SpecificCharacterSet, source.PatientName = charset, name
    source.save_as(path)
    origin = Origin(
        headers=level_headers(path, (500, 300)),
        facts={"name": "s", "fingerprint": "f", "size": [500, 300], "mpp": [0.3, 0.25]},
        model={"name": "größer\\kleiner", "weights_sha256": "1"},
        key="k",
        classes=[ClassInfo(name="B"), ClassInfo(name="Tumör\\Rand" * 9, color=(1, 2, 3))],
    )
    write_masks(tmp_path / "mask.dcm", [np.zeros((300, 500), np.uint8)], origin, (1.0, 1.0))
    found = dcmread(tmp_path / "mask.dcm")
    assert found.PatientName == source.PatientName == name
    assert found.ContentDescription == "Made by größer/kleiner"
    assert found.SegmentSequence[1].SegmentLabel == ("Tumör/Rand" * 9)[:63]


def test_a_folder_stands_for_its_slide(place, tmp_path):
    (tmp_path / "slide").mkdir()
    shutil.copy(place / "d.dcm", tmp_path / "slide" / "0001")
    size = (dcmread(place / "d.dcm").TotalPixelMatrixColumns,) * 2
    assert level_headers(tmp_path / "slide", size) == []
    with open_source(tmp_path / "slide") as slide:
        (header,) = level_headers(slide.path, slide.size)
        assert header.SOPInstanceUID == dcmread(place / "d.dcm").SOPInstanceUID
        (tmp_path / "slide" / "0002").write_bytes(bytes(128) + b"DICM and no more")
        assert level_headers(tmp_path / "slide" / "0001", slide.size) == [header]
    (other,) = place.glob("t.*")
    assert level_headers(other, size) == []


MEASURE = """
import resource, sys, zarr
from pathlib import Path
from wsi_pipeline.bundle import ClassInfo
from wsi_pipeline.export.dicom_slide import Origin, write_annotations, write_masks
from wsi_pipeline.export.features import FeatureOptions
from wsi_pipeline.export.polygons.trace import find_outlines, trace_mask
from wsi_pipeline.geometry import iter_blocks

def peak():
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)

folder = Path(sys.argv[1])
mask = zarr.open_array(folder / "mask", mode="r")
classes = (ClassInfo(name="Background"), ClassInfo(name="Tumor", color=(200, 0, 0)))
facts = {"name": "s", "fingerprint": "f", "size": mask.shape[::-1], "mpp": (0.25, 0.25)}
model = {"name": "m", "weights_sha256": "1"}
origin = Origin(headers=[], facts=facts, model=model, key="k", classes=classes)
write_masks(folder / "mask.dcm", [mask], origin, (1.0, 1.0))
peak()
blocks = trace_mask(mask, iter_blocks(mask.shape, (2048, 2048)))
outlines = find_outlines(mask, blocks, block_size=2048, tolerance=0, min_pixels=0)
options = FeatureOptions(classes=classes, downsample=(1.0, 1.0), mpp=(0.25, 0.25), crop=None,
                         simplify_um=0, min_area_um2=0, namespace="n")
peak()
write_annotations(folder / "annotations.dcm", outlines, options, origin)
peak()
"""


def peaks(folder, shape):
    """Write a mask of a shape, and return the peak MiB of it, its outlines and annotations."""
    folder.mkdir()
    chess = np.add.outer(np.arange(2048) // 64, np.arange(2048) // 128) % 2
    mask = zarr.create_array(
        folder / "mask", shape=shape, chunks=(1024, 1024), dtype="uint8", fill_value=0
    )
    for y in range(0, shape[0], 2048):
        for x in range(0, shape[1], 4096):
            mask[y : y + 2048, x : x + 2048] = chess
    command = [sys.executable, "-c", MEASURE, str(folder)]
    found = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return [float(line) for line in found.split()]


@pytest.mark.slow
def test_memory_does_not_grow_with_the_slide(tmp_path):
    small, _, _ = peaks(tmp_path / "small", (8192, 8192))
    large, outlines, annotations = peaks(tmp_path / "large", (32768, 40960))
    assert large < small + 50
    assert annotations < outlines + 50
    found = highdicom.seg.segread(tmp_path / "large" / "mask.dcm", lazy_frame_retrieval=True)
    assert found.NumberOfFrames == 64 * 80
    mask = zarr.open_array(tmp_path / "large" / "mask", mode="r")
    for y, x in ((0, 0), (16_000, 20_001), (31_768, 39_960)):
        corner = {"row_start": y + 1, "row_end": y + 1001}
        corner |= {"column_start": x + 1, "column_end": x + 1001}
        pixels = found.get_total_pixel_matrix(combine_segments=True, **corner)
        assert (pixels == mask[y : y + 1000, x : x + 1000]).all()
    (group_of,) = highdicom.ann.annread(
        tmp_path / "large" / "annotations.dcm"
    ).get_annotation_groups()
    # Squares of 64 × 128 on every second column of blocks.
    assert group_of.number_of_annotations == 16 * 10 * 32 * 16 // 2
    assert {len(ring) for ring in group_of.get_graphic_data("2D")} == {4}
