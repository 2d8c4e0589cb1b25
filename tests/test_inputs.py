"""Which slides a command line names."""

import json
import shutil

import pytest

from wsi_pipeline.errors import SourceError
from wsi_pipeline.inputs import find_slides, plan_jobs, read_mpp_table
from wsi_pipeline.options import SelectOptions


@pytest.fixture
def slides(tmp_path):
    for name in (
        "a.svs", "deep/b.TIFF", "deep/er/c.ndpi", "notes.txt", "deep/readme.md", ".hidden.svs",
        "x.mrxs", "x/Data0001.dat", "mask.zarr/0/0.tif", "out/a/mask.ome.tif",
    ):  # fmt: skip
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    return tmp_path


def names(paths, root):
    return [p.relative_to(root).as_posix() for p in paths]


def test_a_folder_gives_its_slides_but_not_its_results(slides):
    found = find_slides([str(slides)], output=slides / "out")
    assert names(found, slides) == ["a.svs", "deep/b.TIFF", "deep/er/c.ndpi", "x.mrxs"]


def test_patterns_files_and_lists(slides):
    listed = slides / "list.txt"
    listed.write_text("a.svs\n\ndeep/b.TIFF\na.svs\n")
    inputs = [str(listed), str(slides / "**" / "*.ndpi"), str(slides / "x.mrxs")]
    found = find_slides(inputs, output=slides / "out")
    assert names(found, slides) == ["a.svs", "deep/b.TIFF", "deep/er/c.ndpi", "x.mrxs"]


def test_a_file_named_itself_is_taken_whatever_its_suffix(slides):
    found = find_slides([str(slides / "deep" / "readme.md")], output=slides / "out")
    assert names(found, slides) == ["deep/readme.md"]


def test_what_is_not_there_is_named(slides):
    with pytest.raises(SourceError, match=r"nothing\.svs: no such file"):
        find_slides([str(slides / "nothing.svs")], output=slides / "out")


def test_slides_of_one_name_get_folders_of_their_own(tmp_path):
    paths = [
        tmp_path / "1" / "a.svs",
        tmp_path / "2" / "a.svs",
        tmp_path / "1" / "A.ndpi",
        tmp_path / "1" / "b.ome.tif",
    ]
    jobs = plan_jobs(paths, tmp_path / "out")
    folders = [job.folder.name.casefold() for job in jobs]
    assert len(set(folders)) == 4
    assert folders[2:] == ["a.ndpi", "b"]
    backwards = plan_jobs(paths[::-1], tmp_path / "out")
    assert [job.folder for job in backwards] == [job.folder for job in jobs[::-1]]


def test_ome_zarr_slides_are_found_and_masks_are_not(tmp_path):
    for name, attributes in {
        "a.ome.zarr": {"multiscales": []},
        "b.zarr": {"ome": {"multiscales": []}},
        "run/mask.ome.zarr": {"multiscales": [], "image-label": {}},
        "run/new.ome.zarr": {"multiscales": [], "wsi_pipeline": {"classes": ["Background"]}},
        "c.zarr": {},
    }.items():
        folder = tmp_path / name
        folder.mkdir(parents=True)
        if "ome" in attributes:
            (folder / "zarr.json").write_text(json.dumps({"attributes": attributes}))
        else:
            (folder / ".zattrs").write_text(json.dumps(attributes))
    (tmp_path / "d.zarr.zip").write_bytes(b"x")
    found = find_slides([str(tmp_path)], output=tmp_path / "out")
    assert names(found, tmp_path) == ["a.ome.zarr", "b.zarr", "d.zarr.zip"]
    assert find_slides([str(tmp_path / "b.zarr")], output=tmp_path / "out") == [tmp_path / "b.zarr"]
    jobs = plan_jobs(found, tmp_path / "out")
    assert [job.folder.name for job in jobs] == ["a", "b", "d"]


def test_of_dicom_files_each_slide_is_taken_once(data_dir, tmp_path):
    import pydicom

    source = pydicom.dcmread(data_dir / "wsi" / "dicom_highdicom" / "sm_image.dcm")
    for name, columns, series in (("1", 50, "1.2.3"), ("2", 100, "1.2.3"), ("3", 50, "1.2.4")):
        source.TotalPixelMatrixColumns, source.SeriesInstanceUID = columns, series
        source.save_as(tmp_path / f"{name}.dcm")
    shutil.copy(data_dir / "wsi" / "dicom" / "test_wsi.dcm", tmp_path / "label.dcm")
    shutil.copy(data_dir / "wsi" / "dicom_highdicom" / "sm_annotations.dcm", tmp_path / "drawn.dcm")
    (tmp_path / "broken.dcm").write_bytes(b"nothing")
    found = find_slides([str(tmp_path)], output=tmp_path / "out")
    assert names(found, tmp_path) == ["2.dcm", "3.dcm", "broken.dcm"]


def test_a_table_gives_each_slide_its_mpp(tmp_path):
    table = tmp_path / "mpp.csv"
    table.write_text("\ufeffslide,stain,mpp\na.svs,H&E,0.25\nb,H&E,0.5\n", encoding="utf-8")
    found = read_mpp_table(table)
    assert found == {"a.svs": 0.25, "b": 0.5}
    slides = [tmp_path / "a.svs", tmp_path / "b.ome.tif", tmp_path / "c.svs"]
    jobs = plan_jobs(slides, tmp_path / "out", found)
    assert [job.mpp for job in jobs] == [0.25, 0.5, None]
    asked = SelectOptions(mpp=0.3)
    assert [job.select(asked).mpp for job in jobs] == [0.25, 0.5, 0.3]
    with pytest.raises(SourceError, match="none of the slides"):
        plan_jobs(slides[2:], tmp_path / "out", found)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no slides"),
        ("slide,mpp\n", "no slides"),
        ("name,mpp\na,1\n", "line 2: expected the columns slide and mpp"),
        ("slide,mpp\na,1\nb\n", "line 3: expected"),
        ("slide,mpp\na,much\n", "line 2: expected"),
        ("slide,mpp\na,-1\n", "line 2: 'a' has -1"),
        ("slide,mpp\na,nan\n", "line 2: 'a' has nan"),
        ("slide,mpp\na,1\na,2\n", r"line 3: a has 1\.0 and 2\.0"),
    ],
)
def test_a_table_that_is_none_is_refused_with_its_line(tmp_path, text, said):
    table = tmp_path / "mpp.csv"
    table.write_text(text)
    with pytest.raises(SourceError, match=said):
        read_mpp_table(table)
