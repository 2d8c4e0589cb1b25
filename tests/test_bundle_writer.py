from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest

from wsi_pipeline.errors import BundleError
from wsi_pipeline.networks.bundle_writer import written_folder


def write(folder: Path, text: str, *, overwrite: bool = False) -> None:
    with written_folder(folder, overwrite=overwrite) as partial:
        (partial / "model.toml").write_text(text, "utf-8")


def test_a_folder_comes_whole_or_not_at_all(tmp_path: Path) -> None:
    with suppress(RuntimeError), written_folder(tmp_path / "a", overwrite=False) as partial:
        (partial / "model.toml").touch()
        assert not (tmp_path / "a").exists()
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    write(tmp_path / "deep" / "a", "1")
    assert (tmp_path / "deep" / "a" / "model.toml").read_text("utf-8") == "1"
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["a"]


def test_an_empty_folder_may_be_there(tmp_path: Path) -> None:
    write(tmp_path, "1")
    assert (tmp_path / "model.toml").is_file()


def test_a_bundle_is_replaced_on_request_only(tmp_path: Path) -> None:
    write(tmp_path / "a", "1")
    (tmp_path / "a" / "program.pt2").touch()
    with pytest.raises(BundleError, match=r"is there already; .*--overwrite"):
        write(tmp_path / "a", "2")
    write(tmp_path / "a", "2", overwrite=True)
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["model.toml"]


@pytest.mark.parametrize("other", ["notes.txt", ".git/config", "sub/model.toml"])
def test_what_is_no_bundle_is_never_replaced(tmp_path: Path, other: str) -> None:
    write(tmp_path / "a", "1")
    (tmp_path / "a" / other).parent.mkdir(exist_ok=True)
    (tmp_path / "a" / other).write_text("mine", "utf-8")
    with pytest.raises(BundleError, match="which no bundle has"):
        write(tmp_path / "a", "2", overwrite=True)
    assert (tmp_path / "a" / other).read_text("utf-8") == "mine"


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    with pytest.raises(BundleError, match="is a file"):
        write(tmp_path / "a", "1", overwrite=True)
    with pytest.raises(BundleError, match="cannot write"):
        write(tmp_path / "a" / "b", "1")


def test_a_card_that_was_filled_in_stays_beside_the_new_one(tmp_path: Path) -> None:
    def write_card(text: str) -> None:
        with written_folder(tmp_path / "a", overwrite=True) as partial:
            (partial / "README.md").write_text(text, "utf-8")

    for text in ("1", "1", "2"):
        write_card(text)
    (tmp_path / "a" / "README.md").write_text("mine", "utf-8")
    for _ in range(2):
        write_card("2")
    assert {p.name: p.read_text("utf-8") for p in (tmp_path / "a").iterdir()} == {
        "README.md": "2", "README.old.md": "1", "README.old-2.md": "mine",
    }  # fmt: skip
