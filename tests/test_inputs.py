"""Which slides a command line names."""

import json
import os
import shutil
import socket
from pathlib import Path

import pytest
from bundles import pointwise_bundle

import wsi_pipeline
from wsi_pipeline.errors import SourceError
from wsi_pipeline.evaluation.compare import CompareOptions, compare_all
from wsi_pipeline.evaluation.pairs import pair_up
from wsi_pipeline.files.formats import kind_of
from wsi_pipeline.options import SelectOptions
from wsi_pipeline.run.jobs import Job, find_slides, plan_jobs, read_mpp_table
from wsi_pipeline.run.status import read_status
from wsi_pipeline.sources import open_source
from wsi_pipeline.sources.radiology.discover import find_images, find_volumes
from wsi_pipeline.sources.radiology.preprocess import open_scan


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


def test_runs_are_no_slides_wherever_they_lie(slides):
    results = ["deep/er/mask.ome.tif", "deep/er/overlay.png", "deep/er/mask.new-2.dcm"]
    for name in results:
        (slides / name).write_bytes(b"x")
    (slides / "deep" / "er" / ".store").mkdir()
    every = [str(slides), str(slides / "deep" / "**" / "*.[nTt]*")]
    assert names(find_slides(every, output=slides), slides) == [
        "a.svs", "deep/b.TIFF", "deep/er/c.ndpi", "out/a/mask.ome.tif", "x.mrxs",
    ]  # fmt: skip
    assert names(find_images([str(slides / "deep")], slides), slides) == [
        "deep/b.TIFF", "deep/er/c.ndpi",
    ]  # fmt: skip
    for name in results:  # named itself
        assert names(find_slides([str(slides / name)], output=slides), slides) == [name]


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


def test_no_name_of_a_slide_leads_out_of_the_output(tmp_path):
    slides = [tmp_path / "...svs", tmp_path / "..dcm", tmp_path / "....ome.tif"]
    slides.append("dicomweb://h/studies/1/series/..")
    for slide in slides:
        (job,) = plan_jobs([slide], tmp_path / "out")
        assert job.folder.resolve().parent == tmp_path / "out"


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


# -- lists --------------------------------------------------------------------------------------


@pytest.fixture
def named(tmp_path):
    for name in ("in/A.1.tif", "in/Präparat 2.tif", "in/a,b;c.tif", "A.3.tif"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
    return tmp_path


ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1"]


def encoded(text, encoding):
    mark = "\ufeff" if encoding in ("utf-16-le", "utf-16-be") else ""
    return (mark + text).encode(encoding)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lists_of_all_encodings_and_line_ends(named, encoding, end):
    lines = ["in/A.1.tif", "", '"in/Präparat 2.tif"', r"in\A.1.tif", "in/a,b;c.tif", "A.3.tif  "]
    path = named / "list.txt"
    path.write_bytes(encoded(end.join(lines), encoding))
    found = find_slides(path, output=named / "out")
    assert names(found, named) == ["in/A.1.tif", "in/Präparat 2.tif", "in/a,b;c.tif", "A.3.tif"]


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize(
    "text",
    [
        'in/A.1.tif\n"in/Präparat 2.tif"\nin/a,b;c.tif\n',
        'Slide,mpp\nin/A.1.tif,0.25\n"in/Präparat 2.tif",\n"in/a,b;c.tif",0.5\n',
        'mpp;"Path"\r\n0,25;in/A.1.tif\r\n;in/Präparat 2.tif\r\n0,5;"in/a,b;c.tif"\r\n;\r\n',
        "slide\tfile\nx\tin/A.1.tif\ny\tin/Präparat 2.tif\nz\tin/a,b;c.tif\n",
        '"in/A.1.tif",0.25\n"in/Präparat 2.tif",0.5\n"in/a,b;c.tif",1\n',
    ],
)
def test_csv_lists_with_and_without_header(named, encoding, text):
    path = named / "list.csv"
    path.write_bytes(encoded(text, encoding))
    found = find_slides([path], output=named / "out")
    assert names(found, named) == ["in/A.1.tif", "in/Präparat 2.tif", "in/a,b;c.tif"]


def test_a_list_that_is_no_text_is_refused(tmp_path):
    for raw in (b"\x89PNG\0\0", b"\xff\xfea", "a.svs\n".encode("utf-16-le")):
        path = tmp_path / "list.txt"
        path.write_bytes(raw)
        with pytest.raises(SourceError, match=r"list\.txt: .*save it as UTF-8"):
            find_slides(path, output=tmp_path / "out")


@pytest.mark.parametrize("read", [read_mpp_table, lambda path: find_slides(path, output="out")])
def test_a_csv_that_is_none_is_refused_by_name(tmp_path, read):
    path = tmp_path / "list.csv"
    path.write_text("slide,mpp\n" + 200_000 * "a" + ",1\n")
    with pytest.raises(SourceError, match=r"list\.csv: no CSV"):
        read(path)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize(
    "text",
    [
        "slide,mpp\nPräparat.svs,0.25\n\nb,0.5\n",
        '"Slide";"MPP"\r\n"Präparat.svs";"0,25"\r\n;\r\nb;0,5\r\n',
        "stain\tmpp\tslide\nH&E\t0.25\tPräparat.svs\nH&E\t0.5\tb\n",
    ],
)
def test_tables_of_all_encodings_and_separators(tmp_path, encoding, text):
    table = tmp_path / "mpp.csv"
    table.write_bytes(encoded(text, encoding))
    assert read_mpp_table(table) == {"Präparat.svs": 0.25, "b": 0.5}


# -- each once, and each alone ------------------------------------------------------------------


def test_each_slide_is_found_once_whatever_links_lead_there(slides, caplog):
    (slides / "0.svs").symlink_to("a.svs")
    (slides / "loop").symlink_to(".")
    (slides / "deep" / "up").symlink_to("..")
    (slides / "deep" / "er" / "up").symlink_to("../..")
    (slides / "0deep").symlink_to("deep")
    (slides / "hard.svs").hardlink_to(slides / "a.svs")
    (slides / "self.svs").symlink_to("self.svs")
    expected = ["a.svs", "deep/b.TIFF", "deep/er/c.ndpi", "x.mrxs", "self.svs"]
    found = find_slides([str(slides)], output=slides / "out")
    assert sorted(names(found, slides)) == sorted(expected)
    told = [line for line in caplog.messages if "by another name: taken once" in line]
    assert sorted(Path(line.split(" is ")[0]).name for line in told) == ["0.svs", "hard.svs"]
    again = [slides / "a.svs", slides / "0.svs", slides / "deep" / "er" / ".." / ".." / "a.svs"]
    assert find_slides(again, output=slides / "out") == [slides / "a.svs"]
    by_pattern = find_slides(str(slides / "**" / "*.ndpi"), output=slides / "out")
    assert names(by_pattern, slides) == ["deep/er/c.ndpi"]
    assert len(find_slides(str(slides / "**"), output=slides / "out")) >= len(expected)
    linked = find_slides(slides, output=slides / "out", linked=True)
    assert {"a.svs", "0.svs", "hard.svs"} <= set(names(linked, slides))


def test_images_and_volumes_are_found_once_too(slides):
    (slides / "loop").symlink_to(".")
    (slides / "deep" / "up").symlink_to("..")
    (slides / "again.svs").symlink_to("a.svs")
    found = find_images([slides], slides / "out")
    assert names(found, slides) == [
        "a.svs", "deep/b.TIFF", "deep/er/c.ndpi", "mask.zarr/0/0.tif", "x/Data0001.dat", "x.mrxs",
    ]  # fmt: skip
    assert find_volumes(str(slides), str(slides / "out")) == found


def test_what_cannot_be_a_slide_fails_alone(tmp_path, slide_path):
    folder = tmp_path / "in"
    (folder / "nested").mkdir(parents=True)
    for name in ("a.tif", "nested/b.tif", os.fsdecode(b"n\xe9.tif")):
        shutil.copy(slide_path, folder / name)
    for name in ("pipe.svs", "pipe.dcm"):
        os.mkfifo(folder / name)
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(os.path.relpath(folder / "s.tif"))
    (folder / "zero.svs").symlink_to("/dev/zero")
    (folder / "deep.ome.zarr").mkdir()
    for home in (folder / "nested", folder / "deep.ome.zarr"):
        (home / ".zattrs").write_text("[" * 100_000)
    whole = [folder / "a.tif", folder / "nested" / "b.tif", folder / os.fsdecode(b"n\xe9.tif")]
    found = find_slides(folder, output=tmp_path / "out")
    jobs = plan_jobs(found, tmp_path / "out")
    assert len({job.folder for job in jobs}) == 9
    refused = {}
    for path in found:
        try:
            open_source(path).close()
        except SourceError as error:
            refused[path.name] = str(error)
    assert sorted(set(found) - {folder / name for name in refused}) == sorted(whole)
    for name in ("pipe.svs", "pipe.dcm", "s.tif", "zero.svs"):
        assert "a pipe, socket or device" in refused[name]
    for name in ("nested", "deep.ome.zarr"):
        assert "a damaged OME-Zarr" in refused[name]
    with pytest.raises(SourceError, match="pipe, socket or device"):
        kind_of(folder / "pipe.svs")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_without_permission_fails_alone(slides):
    locked = slides / "deep"
    locked.chmod(0)
    try:
        found = find_slides(slides, output=slides / "out")
        assert names(found, slides) == ["a.svs", "deep", "x.mrxs"]
        with pytest.raises(SourceError, match=r"deep: cannot be looked into \(Permission denied\)"):
            open_source(locked)
        for find, axes in ((find_images, 2), (find_volumes, 3)):
            assert locked in find(slides, slides / "out")
            with pytest.raises(SourceError, match="cannot be looked into"):
                open_scan(locked, axes=axes)
        with pytest.raises(SourceError, match=r"cannot be looked at \(Permission denied\)"):
            find_slides(locked / "b.TIFF", output=slides / "out")
    finally:
        locked.chmod(0o755)


def test_texts_and_paths_are_one(slides, monkeypatch):
    monkeypatch.chdir(slides)
    by_text = plan_jobs(find_slides("a.svs", output="out"), "out")
    by_path = plan_jobs(find_slides([Path("a.svs")], output=Path("out")), Path("out"))
    assert by_text == by_path == plan_jobs(["a.svs"], "out")
    assert by_text[0] == Job(path="a.svs", folder="out/a")
    assert by_text[0].folder == Path("out/a")


def test_public_functions_take_texts_as_well_as_paths(tmp_path, slide_path):
    roi, tissue = tmp_path / "roi.geojson", tmp_path / "tissue.geojson"
    for path in (roi, tissue):
        ring = [[400, 300], [900, 300], [900, 900], [400, 900], [400, 300]]
        path.write_text(json.dumps({"type": "Polygon", "coordinates": [ring]}))
    select = SelectOptions(roi=str(roi), tissue=str(tissue))
    assert select == SelectOptions(roi=roi, tissue=tissue)
    (job,) = plan_jobs([str(slide_path)], str(tmp_path / "out"))
    (made,) = wsi_pipeline.segment(
        str(slide_path),
        model=str(pointwise_bundle(tmp_path / "m", mpp=0.5) / "model.toml"),
        output=str(tmp_path / "out"),
        roi=str(roi),
        tissue=str(tissue),
        outputs=("zarr", "geojson"),
    )
    assert 0 < made.tissue_mm2 < 0.05  # a text that is no path of tissue would be all of it
    record = job.folder / "run.json"
    for place in (record, job.folder):
        assert wsi_pipeline.load_run(str(place)) == wsi_pipeline.load_run(place)
        assert wsi_pipeline.load_run(place).area_mm2 == made.area_mm2
        assert wsi_pipeline.export_again(str(place), {"simplify_um": 0.0}).status == "done"
        wsi_pipeline.export_again(place, {"simplify_um": 1.0})
    options = {"mpp": 1.0, "patch_size": 128, "overlap": 0, "select": select}
    wsi_pipeline.tile(str(slide_path), str(tmp_path / "grid.zarr"), **options)
    assert len(wsi_pipeline.open_patch_grid(str(tmp_path / "grid.zarr")).patches) > 0
    (pairing,) = pair_up(str(job.folder), str(job.folder), slide=str(slide_path), size=None)
    (found,) = compare_all([pairing], CompareOptions(roi=str(roi)))
    assert found.confusion.matrix.sum() == 500 * 600
    assert read_status(str(tmp_path / "out")).done == [job.folder.name]


def test_pictures_in_a_folder_are_told(tmp_path, caplog):
    for name in ("a.svs", "b.jpg", "c.PNG", "vms/d.jpg", "vms/d.vms"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = find_slides(tmp_path, output=tmp_path / "out")
    assert {path.name for path in found} == {"a.svs", "d.vms"}
    (told,) = caplog.messages
    assert "b.jpg, c.PNG, as" in told
