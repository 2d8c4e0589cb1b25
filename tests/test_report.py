from __future__ import annotations

import csv
import json
import urllib.parse
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wsi_pipeline.bundle import ClassInfo
from wsi_pipeline.errors import StoreError
from wsi_pipeline.export.overlay import write_overlay
from wsi_pipeline.report import (
    MANY_RUNS,
    Run,
    find_runs,
    load_run,
    write_report,
    write_run_json,
    write_summary,
)

HOSTILE = "<script>alert('1')</script>&\"{x}.svs"


def done(name: str = "a.svs", **changes: Any) -> Run:
    fields: dict[str, Any] = {
        "status": "done",
        "slide": {
            "name": name,
            "path": f"/data/{name}",
            "size": [1931, 1487],
            "mpp": [0.25, 0.2512],
            "bounds": None,
        },
        "model": {"name": "m", "weights_sha256": "0f"},
        "settings": {"predict": {"overlap": 128}, "export": {"outputs": ["zarr", "tiff"]}},
        "versions": {"wsi-pipeline": "0.1.0"},
        "patches": {"grid": 48, "kept": 37, "predicted": 37},
        "seconds": {"predict": 3.5, "total": 75.25},
        "area_mm2": {"Tumor": 0.25, "Stroma": 1.5},
        "colors": {"Tumor": [200, 0, 0]},
        "tissue_mm2": 2.0,
        "regions": {"Tumor": 1234, "Stroma": 2},
        "frame": {"for": "qupath", "offset": [0, 0]},
    }
    return Run(**fields | changes)


def failed(name: str = "bad.svs", reason: str = "cut off in the middle of a tile") -> Run:
    slide = {"name": name, "path": f"/data/{name}"}
    return Run(status="failed", reason=reason, slide=slide, model={}, settings={}, versions={})


def refuse(token: str) -> None:
    raise ValueError(token)


class Page(HTMLParser):
    """Tags with their attributes, and the text, of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data + " "

    def values(self, attribute: str) -> list[str]:
        return [value for _, attrs in self.tags if (value := attrs.get(attribute)) is not None]


# --- run.json


texts = st.text(max_size=20)
numbers = st.floats(allow_nan=False, allow_infinity=False)


@settings(max_examples=40, deadline=None)
@given(name=texts, areas=st.dictionaries(texts, numbers), warnings=st.lists(texts), tissue=numbers)
def test_a_run_comes_back_as_it_was(
    name: str,
    areas: dict[str, float],
    warnings: list[str],
    tissue: float,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    run = done(name, area_mm2=areas, warnings=warnings, tissue_mm2=tissue)
    path = tmp_path_factory.mktemp("r") / "run.json"
    write_run_json(path, run)
    assert load_run(path) == run
    json.loads(path.read_bytes().decode("utf-8"), parse_constant=refuse)
    assert [p.name for p in path.parent.iterdir()] == ["run.json"]


def test_a_name_that_is_not_utf8_survives(tmp_path: Path) -> None:
    name = b"n\xffcrose.svs".decode("utf-8", "surrogateescape")
    write_run_json(tmp_path / "run.json", done(name))
    assert load_run(tmp_path / "run.json").slide["name"] == name
    write_summary(tmp_path, {tmp_path / name: done(name)})
    write_report(tmp_path, {tmp_path / name: done(name)})


def test_what_is_no_number_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_run_json(tmp_path / "run.json", done(tissue_mm2=float("nan")))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"status": "done", "colour": 1}', "\xff"])
def test_a_file_that_is_no_run_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(StoreError, match=r"run\.json is not a run of this version"):
        load_run(path)


def test_runs_are_found_and_unreadable_ones_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name, run in (("b", done()), ("a", failed())):
        (tmp_path / name).mkdir()
        write_run_json(tmp_path / name / "run.json", run)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "run.json").write_text("{")
    assert find_runs(tmp_path) == {tmp_path / "a": failed(), tmp_path / "b": done()}
    assert "broken" in caplog.text


# --- summary.csv


def summary_of(folder: Path, runs: dict[Path, Run]) -> list[dict[str, str]]:
    write_summary(folder, runs)
    with (folder / "summary.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, strict=True))


def test_summary_has_a_row_for_each_slide_and_a_column_for_each_class(tmp_path: Path) -> None:
    other = done("b.svs", area_mm2={"Necrosis": 0.125, "Tumor": 3.0})
    runs = {tmp_path / "a": done(), tmp_path / "bad": failed(), tmp_path / "b": other}
    first, second, third = summary_of(tmp_path, runs)
    assert [key for key in first if key.endswith("_mm2")] == [
        "tissue_mm2",
        "Tumor_mm2",
        "Stroma_mm2",
        "Necrosis_mm2",
    ]
    assert first == {
        "folder": "a",
        "slide": "a.svs",
        "status": "done",
        "reason": "",
        "width_px": "1931",
        "height_px": "1487",
        "mpp_x": "0.25",
        "mpp_y": "0.2512",
        "patches": "37",
        "tissue_mm2": "2.0",
        "Tumor_mm2": "0.25",
        "Stroma_mm2": "1.5",
        "Necrosis_mm2": "",
        "seconds": "75.25",
    }
    assert second["status"] == "failed"
    assert second["reason"] == "cut off in the middle of a tile"
    assert second["tissue_mm2"] == second["width_px"] == second["Tumor_mm2"] == ""
    assert (third["Tumor_mm2"], third["Necrosis_mm2"]) == ("3.0", "0.125")


def test_texts_of_the_summary_survive_quoting(tmp_path: Path) -> None:
    reason = 'says "no", twice\nand ends; here, too'
    name = "Nécrose, µ.svs"
    (row,) = summary_of(tmp_path, {tmp_path / name: failed(name, reason)})
    assert (row["folder"], row["slide"], row["reason"]) == (name, name, reason)
    assert (tmp_path / "summary.csv").read_bytes().count(b"\r\n") == 2


@pytest.mark.parametrize("name", ["=1+1.svs", "+a", "-2.svs", "@SUM(A1)", "\tx"])
def test_no_text_of_the_summary_is_a_formula(tmp_path: Path, name: str) -> None:
    (row,) = summary_of(
        tmp_path, {tmp_path / name: failed(name, name), tmp_path / "a": done(area_mm2={name: 1.0})}
    )[:1]
    assert row["folder"] == row["slide"] == row["reason"] == f"'{name}"
    assert f"'{name}_mm2" in row


# --- report.html


def add_overlay(folder: Path) -> None:
    folder.mkdir()
    thumbnail = np.random.default_rng(0).integers(100, 255, size=(400, 500, 3), dtype=np.uint8)
    mask = np.zeros((400, 500), np.uint8)
    classes = (ClassInfo(name="Background"), ClassInfo(name="Tumor", color=(200, 0, 0)))
    write_overlay(folder / "overlay.png", thumbnail, mask, classes=classes)


def test_report_stands_alone_and_tells_all(tmp_path: Path) -> None:
    add_overlay(tmp_path / "a")
    runs = {tmp_path / "a": done(warnings=["only 0.1 % tissue"]), tmp_path / "bad": failed()}
    write_report(tmp_path, runs)
    page = Page(tmp_path / "report.html")
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    (picture,) = page.values("src")
    assert picture.startswith("data:image/jpeg;base64,")
    for link in page.values("href"):
        if link.startswith("#"):
            assert link[1:] in page.values("id")
        else:
            assert not urllib.parse.urlparse(link).scheme
    for text in (
        "1 of 2", "cut off in the middle of a tile", "only 0.1 % tissue", "1 min 15 s",
        "0.25 mm² · 12.5 % · 1,234 regions", "not a medical device", "0.1.0",
    ):  # fmt: skip
        assert text in page.text
    assert page.text.index("cut off") < page.text.index("a.svs")  # failures come first
    assert "rgb(200,0,0)" in (tmp_path / "report.html").read_text("utf-8")


def test_names_are_text_wherever_they_stand(tmp_path: Path) -> None:
    folder = tmp_path / "a %2F#'&"
    add_overlay(folder)
    run = done(
        HOSTILE,
        area_mm2={HOSTILE: 1.0},
        warnings=[HOSTILE],
        model={HOSTILE: HOSTILE},
        settings={"select": {"roi": HOSTILE}},
    )
    write_report(tmp_path, {folder: run, tmp_path / "bad": failed(HOSTILE, HOSTILE)})
    page = Page(tmp_path / "report.html")
    assert {tag for tag, _ in page.tags} <= {
        *("html", "head", "meta", "title", "style", "body", "header", "footer", "section"),
        *("div", "article", "details", "summary", "h1", "h2", "h3", "p", "a", "img", "b", "i"),
        *("em", "span", "ul", "li", "table", "tr", "th", "td", "dl", "dt", "dd"),
    }
    assert page.text.count(HOSTILE) >= 10
    (link,) = {h for h in page.values("href") if h.endswith("overlay.png") and "bad" not in h}
    assert (tmp_path / urllib.parse.unquote(link)).samefile(folder / "overlay.png")


def test_what_all_slides_share_is_told_once(tmp_path: Path) -> None:
    runs = {tmp_path / n: done(n, settings={"overlap": 128, "key": f"key-{n}"}) for n in "abc"}
    write_report(tmp_path, runs)
    text = Page(tmp_path / "report.html").text
    assert text.count("settings overlap") == 1
    assert [text.count(f"key-{n}") for n in "abc"] == [1, 1, 1]
    assert text.index("key-c") < text.index("settings overlap")


def test_a_report_of_nothing_and_of_failures_only(tmp_path: Path) -> None:
    write_report(tmp_path, {})
    assert "0 of 0" in Page(tmp_path / "report.html").text
    write_report(tmp_path, {tmp_path / "bad": failed()})
    assert "0 of 1" in Page(tmp_path / "report.html").text


def test_a_report_of_many_slides_stays_modest(tmp_path: Path) -> None:
    add_overlay(tmp_path / "a")
    runs = {}
    for i in range(MANY_RUNS + 1):
        folder = tmp_path / f"slide {i}"
        folder.mkdir()
        (folder / "overlay.png").hardlink_to(tmp_path / "a" / "overlay.png")
        runs[folder] = done(f"slide {i}.svs")
    write_report(tmp_path, runs)
    page = Page(tmp_path / "report.html")
    assert len(page.values("src")) == len(runs)
    # noise is the worst that a picture can be
    assert (tmp_path / "report.html").stat().st_size < 40_000 * len(runs)
