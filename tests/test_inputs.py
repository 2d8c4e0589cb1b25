"""Which slides a command line names."""

import pytest

from wsi_pipeline.errors import SourceError
from wsi_pipeline.inputs import find_slides, plan_jobs


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
