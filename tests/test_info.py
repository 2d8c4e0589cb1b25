from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
import pytest
import tifffile
from click.testing import CliRunner
from PIL import Image
from pydicom.encaps import encapsulate, get_frame
from pydicom.uid import generate_uid
from scans import blobs, write_series

from wsi_pipeline.cli import group
from wsi_pipeline.errors import SourceError
from wsi_pipeline.run.jobs import find_slides
from wsi_pipeline.sources import open_source


def info(*arguments: str | Path) -> str:
    result = CliRunner().invoke(group, ["info", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def facts(*arguments: str | Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(info(*arguments, "--json"))
    return found


def test_a_slide_is_described(slide_path: Path) -> None:
    found = facts(slide_path)
    assert found["size"] == [1931, 1487]
    assert found["levels"][1] == {"size": [482, 371], "downsample": [4.0, 4.0]}
    assert found["mpp"] == pytest.approx([0.25, 0.25])
    assert found["mpp_source"] == "TIFF resolution tags"
    assert found["contradictions"] == []
    assert found["bounds"] is None
    assert found["compression"] == "DEFLATE"
    assert found["backend"] == "tiffslide"
    assert len(found["fingerprint"]) == 64
    text = info(slide_path)
    assert "1931 × 1487 px, 0.48 × 0.37 mm" in text
    assert "0.25 × 0.25, from TIFF resolution tags" in text
    assert "level 1      482 × 371 px, downsample 4" in text


def test_a_slide_without_mpp_is_still_described(
    make_slide: Callable[..., Path], tmp_path: Path
) -> None:
    path = make_slide(tmp_path / "a.tif", np.zeros((400, 300, 3), dtype=np.uint8), None)
    found = facts(path)
    assert found["mpp"] is None
    assert found["size"] == [300, 400]
    assert "--mpp" in info(path)
    assert facts(path, "--mpp", "0.3")["mpp"] == [0.3, 0.3]


def test_resolutions_that_are_not_believed_are_shown(
    make_slide: Callable[..., Path], tmp_path: Path
) -> None:
    pixels = np.zeros((400, 300, 3), dtype=np.uint8)
    path = make_slide(tmp_path / "a.tif", pixels, 25400 / 72)
    assert facts(path)["mpp"] is None
    assert "72 dpi" in info(path)


def test_contradictions_are_shown(tmp_path: Path) -> None:
    path = tmp_path / "a.svs"
    description = "Aperio Image Library v1.0\r\n300x400 [0,0 300x400]|AppMag = 20|MPP = 0.5"
    tifffile.imwrite(
        path,
        np.zeros((400, 300, 3), dtype=np.uint8),
        tile=(128, 128),
        photometric="rgb",
        description=description,
        metadata=None,
        resolution=(40000, 40000),
        resolutionunit="CENTIMETER",
    )
    found = facts(path)
    assert found["mpp"] == [0.5, 0.5]
    assert found["mpp_source"] == "aperio.MPP"
    assert found["contradictions"] == ["TIFF resolution tags"]
    said = "aperio.MPP says 0.5 × 0.5 µm per pixel, TIFF resolution tags 0.25 × 0.25"
    assert f"but          {said}" in info(path)
    assert said not in info(path, "--mpp", "0.4")


def test_bounds_of_a_real_mrxs_are_shown(data_dir: Path) -> None:
    path = data_dir / "wsi" / "mrxs_partial" / "Mirax2-Fluorescence-2.mrxs"
    bounds = {"x": 9153, "y": 102664, "width": 10439, "height": 7641}
    assert facts(path)["bounds"] == bounds
    assert "10439 × 7641 px at x 9153, y 102664" in info(path)


def test_a_bad_file_ends_in_one_line_and_exit_code_1(tmp_path: Path) -> None:
    path = tmp_path / "a.svs"
    path.write_bytes(b"")
    command = [sys.executable, "-m", "wsi_pipeline", "info", str(path)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 1
    assert ran.stdout == ""
    assert ran.stderr.count("\n") == 1
    assert str(path) in ran.stderr
    assert CliRunner().invoke(group, ["info", str(path), "--mpp", "0"]).exit_code == 2


def test_an_image_and_a_volume_are_described(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((20, 30), np.uint8)).save(tmp_path / "us.png")
    found = facts(tmp_path / "us.png")
    assert (found["size"], found["channels"], found["spacing_mm"]) == ([30, 20], 1, None)
    assert "spacing      not known" in info(tmp_path / "us.png")
    affine = np.diag([0.5, 2.0, 3.0, 1.0])
    nibabel.save(nibabel.Nifti1Image(np.zeros((4, 5, 6), np.int16), affine), tmp_path / "mr.nii")
    found = facts(tmp_path / "mr.nii")
    assert (found["size"], found["spacing_mm"]) == ([4, 5, 6], [0.5, 2.0, 3.0])
    assert found["affine"] == affine.tolist()
    assert "0.5 × 2 × 3 mm" in info(tmp_path / "mr.nii")
    write_series(tmp_path / "ct", blobs((5, 9, 8)), spacing=(2.0, 1.0, 1.0), seed=0)
    for path in (tmp_path / "ct", tmp_path / "ct" / "000.dcm"):
        assert facts(path)["size"] == [8, 9, 5]


def test_all_files_of_a_dicom_slide_are_told_by_one_rule(data_dir: Path, tmp_path: Path) -> None:
    source = data_dir / "wsi" / "dicom" / "multiframe_camelyon_challenge_image.dcm"
    slide = tmp_path / "slide"
    slide.mkdir()
    shutil.copy(source, slide / "volume.opt")
    header = pydicom.dcmread(source)
    header.ImageType = ["DERIVED", "PRIMARY", "THUMBNAIL", "RESAMPLED"]
    header.NumberOfFrames, header.TotalPixelMatrixRows, header.TotalPixelMatrixColumns = 1, 256, 256
    header.PixelData = encapsulate([get_frame(header.PixelData, 0, number_of_frames=15)])
    header.SOPInstanceUID = header.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    header.save_as(slide / "thumbnail")
    for path in (slide, slide / "volume.opt", slide / "thumbnail"):
        assert facts(path)["size"] == [1152, 700]
        with open_source(path) as opened:
            assert opened.size == (1152, 700)
    assert find_slides([str(slide)], output=tmp_path / "out") == [slide / "volume.opt"]
    alone = shutil.copy(slide / "thumbnail", tmp_path / "alone.dcm")
    result = CliRunner().invoke(group, ["info", str(alone)])
    with pytest.raises(SourceError) as error:
        open_source(alone)
    assert result.exit_code == 1
    assert str(error.value) in result.output


def test_what_begins_like_nothing_known_is_said_in_words(tmp_path: Path) -> None:
    path = tmp_path / "a.svs"
    path.write_bytes(b"IJrE" + bytes(1000))
    result = CliRunner().invoke(group, ["info", str(path)])
    assert "it begins like no kind of slide" in result.output
    assert "b'" not in result.output


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_the_extra_that_is_lacking_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    nibabel.save(nibabel.Nifti1Image(blobs((6, 7, 8)), np.eye(4)), tmp_path / name)
    monkeypatch.setitem(sys.modules, "nibabel", None)
    result = CliRunner().invoke(group, ["info", str(tmp_path / name)])
    assert result.exit_code == 1
    assert 'NIfTI needs nibabel: pip install "wsi-pipeline[radiology]"' in result.output
