from __future__ import annotations

import csv
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from bundles import pointwise_bundle
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import done, failed

from wsi_pipeline.cli import group
from wsi_pipeline.errors import StoreError
from wsi_pipeline.report.page import write_report
from wsi_pipeline.report.record import Run, find_runs, load_run, write_run_json
from wsi_pipeline.report.summary import write_summary


def refuse(token: str) -> None:
    raise ValueError(token)


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


@pytest.mark.parametrize(
    ("size", "spacing", "kind"),
    [([9, 7], {}, "slide"), ([9, 7], {"spacing_mm": None}, "image"),
     ([9, 7, 5], {"spacing_mm": [1, 1, 2]}, "volume")],
)  # fmt: skip
def test_records_of_the_first_version_are_read_and_those_of_a_later_one_refused(
    tmp_path: Path, size: list[int], spacing: dict[str, Any], kind: str
) -> None:
    path = tmp_path / "run.json"
    write_run_json(path, done())
    record = json.loads(path.read_text("utf-8"))
    assert (record.pop("version"), record.pop("kind")) == (2, "slide")
    record["slide"] |= {"size": size} | spacing
    path.write_text(json.dumps(record), "utf-8")
    assert load_run(path).kind == kind
    path.write_text(json.dumps(record | {"version": 3}), "utf-8")
    with pytest.raises(StoreError, match="version is 3"):
        load_run(path)


def test_a_name_that_is_not_utf8_survives(tmp_path: Path) -> None:
    name = b"n\xffcrose.svs".decode("utf-8", "surrogateescape")
    write_run_json(tmp_path / "run.json", done(name))
    assert load_run(tmp_path / "run.json").slide["name"] == name
    write_summary(tmp_path, {tmp_path / name: done(name)})


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
        "model": "m",
        "weights": "0f",
        "tissue_percent_Tumor": "12.5",
        "tissue_percent_Stroma": "75.0",
        "tissue_percent_Necrosis": "",
        "regions_Tumor": "1234",
        "regions_Stroma": "2",
    }
    assert second["status"] == "failed"
    assert second["reason"] == "cut off in the middle of a tile"
    assert second["tissue_mm2"] == second["width_px"] == second["Tumor_mm2"] == ""
    assert second["tissue_percent_Tumor"] == second["regions_Tumor"] == second["model"] == ""
    assert (third["Tumor_mm2"], third["Necrosis_mm2"]) == ("3.0", "0.125")
    assert (third["tissue_percent_Tumor"], third["tissue_percent_Necrosis"]) == ("150.0", "6.25")


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


# -- what others put there ------------------------------------------------------------------------

GOOD = {
    "status": "done",
    "slide": {"name": "a.svs", "path": "a.svs", "size": [10, 20], "mpp": [0.5, 0.5]},
    "model": {"name": "m", "weights_sha256": ""},
    "settings": {},
    "versions": {},
    "area_mm2": {"Tumor": 1.5},
    "seconds": {"total": 3},
}
ODD: dict[str, bytes | str | dict[str, Any]] = {
    "no slide": {"slide": {}},
    "area a list": {"area_mm2": {"Tumor": [1, 2]}},
    "areas a list": {"area_mm2": [1, 2]},
    "name a number": {"slide": {**GOOD["slide"], "name": 7}},
    "size of one": {"slide": {**GOOD["slide"], "size": [10]}},
    "size of texts": {"slide": {**GOOD["slide"], "size": ["10", "20"]}},
    "mpp nothing": {"slide": {**GOOD["slide"], "mpp": None}},
    "no model": {"model": None},
    "a colour of two": {"colors": {"Tumor": [1, 2]}},
    "warnings a text": {"warnings": "odd"},
    "warnings of numbers": {"warnings": [1]},
    "regions of texts": {"regions": {"Tumor": "1"}},
    "seconds of texts": {"seconds": {"total": "3"}},
    "kept a list": {"patches": {"kept": []}},
    "status odd": {"status": "odd"},
    "status a table": {"status": {}},
    "reason nothing": {"reason": None},
    "lesions odd": {"lesions": {"Tumor": 3}},
    "labels odd": {"labels": {"Benign": None}},
    "too large a number": {"area_mm2": {"Tumor": 10**400}},
    "infinite": json.dumps(GOOD).replace("1.5", "1e999"),
    "not a number": json.dumps(GOOD).replace("1.5", "NaN"),
    "a list": "[]",
    "a text": '"run"',
    "nothing": "",
    "null": "null",
    "nested": "[" * 100_000,
    "deep": json.dumps({**GOOD, "frame": {"a": json.loads("[" * 300 + "]" * 300)}}),
    "latin": json.dumps(GOOD).replace("a.svs", "é.svs").encode("latin-1"),
    "utf-16": json.dumps(GOOD).encode("utf-16"),
    "zeros": bytes(4096),
    "huge": b" " * (1 << 26) + json.dumps(GOOD).encode(),
}


def put(path: Path, content: bytes | str | dict[str, Any]) -> None:
    path.parent.mkdir(parents=True)
    if isinstance(content, dict):
        content = json.dumps({**GOOD, **content})
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


@pytest.mark.parametrize("odd", ODD)
def test_an_odd_run_is_left_out_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, odd: str
) -> None:
    put(tmp_path / "good/run.json", {})
    put(tmp_path / "odd/run.json", ODD[odd])
    with pytest.raises(StoreError, match=r"odd.run\.json is not a run"):
        load_run(tmp_path / "odd/run.json")
    runs = find_runs(tmp_path)
    assert [path.name for path in runs] == ["good"]
    assert "left out of the summary" in caplog.text
    write_summary(tmp_path, runs)
    write_report(tmp_path, runs)
    assert CliRunner().invoke(group, ["status", str(tmp_path)]).exit_code == 0


def test_odd_records_do_not_end_a_command(tmp_path: Path, slide_path: Path) -> None:
    output = tmp_path / "out"
    for number, content in enumerate(ODD.values()):
        put(output / f"odd-{number}" / "run.json", content)
    (output / "folder" / "run.json").mkdir(parents=True)
    if os.name == "posix":
        (output / "pipe").mkdir()
        os.mkfifo(output / "pipe" / "run.json")
    (output / ".slides.json").write_text('{"../../elsewhere": "a", "b": [1]}', "utf-8")
    model = pointwise_bundle(tmp_path / "model", mpp=0.5)
    line = [str(slide_path), "--model", str(model), "--output", str(output), "--device", "cpu"]
    result = CliRunner().invoke(group, ["segment", *line])
    assert result.exit_code == 0, result.output
    with (output / "summary.csv").open(newline="", encoding="utf-8") as file:
        assert [row["folder"] for row in csv.DictReader(file)] == [slide_path.stem]
    result = CliRunner().invoke(group, ["status", str(output)])
    assert result.exit_code == 0, result.output
    assert re.search(r"done +1\n", result.output)
    assert not (tmp_path / "elsewhere").exists()
    result = CliRunner().invoke(group, ["export", str(output), "--simplify", "0"])
    assert isinstance(result.exception, SystemExit | None)
    assert (output / slide_path.stem / "run.json").is_file()
