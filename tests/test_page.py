"""What report.html shows, of what is in the runs' folders."""

from __future__ import annotations

import base64
import csv
import hashlib
import re
import shutil
import subprocess
import urllib.parse
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from runs import HOSTILE, done, failed

from wsi_pipeline.bundle import ClassInfo
from wsi_pipeline.export.overlay import write_overlay
from wsi_pipeline.report.page import MANY_RUNS, write_report
from wsi_pipeline.report.record import Run
from wsi_pipeline.report.summary import write_cohort, write_summary


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
        # a script is no text
        if self.tags and self.tags[-1][0] == "script":
            return
        # spaces and line breaks are one to a browser
        self.text = " ".join([*self.text.split(), *data.split()])

    def values(self, attribute: str) -> list[str]:
        return [value for _, attrs in self.tags if (value := attrs.get(attribute)) is not None]


def add_overlay(folder: Path) -> None:
    folder.mkdir()
    thumbnail = np.random.default_rng(0).integers(100, 255, size=(400, 500, 3), dtype=np.uint8)
    mask = np.zeros((400, 500), np.uint8)
    classes = (ClassInfo(name="Background"), ClassInfo(name="Tumor", color=(200, 0, 0)))
    write_overlay(folder / "overlay.png", thumbnail, mask, classes=classes)


def test_report_stands_alone_and_tells_all(tmp_path: Path) -> None:
    add_overlay(tmp_path / "a")
    runs = {tmp_path / "a": done(warnings=["only 0.1 % tissue"]), tmp_path / "bad": failed()}
    write_summary(tmp_path, runs)
    write_report(tmp_path, runs)
    page = Page(tmp_path / "report.html")
    assert "summary.csv" in page.values("href")
    assert not {"link", "iframe", "object"} & {tag for tag, _ in page.tags}
    (picture,) = page.values("src")
    assert picture.startswith("data:image/jpeg;base64,")
    for link in page.values("href"):
        if link.startswith("#"):
            assert link[1:] in page.values("id")
        else:
            assert (tmp_path / urllib.parse.unquote(link)).is_file()
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
        labels={HOSTILE: 0.5},
        patches={"kept": HOSTILE, HOSTILE: 1},
        frame={"for": HOSTILE},
        warnings=[HOSTILE],
        model={HOSTILE: HOSTILE},
        settings={"select": {"roi": HOSTILE}},
    )
    write_report(tmp_path, {folder: run, tmp_path / "bad": failed(HOSTILE, HOSTILE)})
    page = Page(tmp_path / "report.html")
    assert {tag for tag, _ in page.tags} <= {
        *("html", "head", "meta", "title", "style", "body", "header", "main", "footer", "section"),
        *("div", "article", "details", "summary", "h1", "h2", "h3", "p", "a", "img", "b", "i"),
        *("em", "small", "span", "script", "ul", "li", "table", "tr", "th", "td", "dl", "dt", "dd"),
    }
    # there is one script, and it is ours
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert page.text.count(HOSTILE) >= 15
    (link,) = {h for h in page.values("href") if h.endswith("overlay.png") and "bad" not in h}
    assert (tmp_path / urllib.parse.unquote(link)).samefile(folder / "overlay.png")


def test_the_page_may_load_nothing_and_run_but_what_sorts(tmp_path: Path) -> None:
    write_report(tmp_path, {})
    page = Page(tmp_path / "report.html")
    (policy,) = [a["content"] for _, a in page.tags if a.get("http-equiv")]
    text = (tmp_path / "report.html").read_text("utf-8")
    script = text.partition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    rules = dict(rule.split(maxsplit=1) for rule in str(policy).split(";"))
    assert rules == {
        "default-src": "'none'",
        "img-src": "data:",
        "style-src": "'unsafe-inline'",
        "script-src": f"'sha256-{digest}'",
        "base-uri": "'none'",
        "form-action": "'none'",
    }


def test_a_failure_is_told_once_and_leads_nowhere(tmp_path: Path) -> None:
    runs = {tmp_path / "a": done(), tmp_path / "bad": failed("bad.svs", "cut off")}
    write_report(tmp_path, runs)
    page = Page(tmp_path / "report.html")
    assert page.text.count("cut off") == 1
    assert page.text.count("bad.svs") == 2  # its name and its path
    assert [link for link in page.values("href") if "bad" in link] == []
    assert [tag for tag, _ in page.tags].count("article") == 1
    assert page.text.index("cut off") < page.text.index("a.svs")


def test_a_run_whose_output_failed_still_shows_its_mask(tmp_path: Path) -> None:
    add_overlay(tmp_path / "a")
    write_report(tmp_path, {tmp_path / "a": done(status="failed", reason="mask.ome.tif: no space")})
    page = Page(tmp_path / "report.html")
    assert page.text.count("mask.ome.tif: no space") == 1
    assert len(page.values("src")) == 1
    (card,) = [attrs["id"] for tag, attrs in page.tags if tag == "article"]
    assert page.values("href").count(f"#{card}") == 2  # of the failure, and of the table


def test_runs_that_say_little_cost_no_page(tmp_path: Path) -> None:
    odd = {"name": "odd.svs"}
    runs = {
        tmp_path / "a": done(slide=odd, model={"limits": "Four patients."}),
        tmp_path / "bad": Run(
            kind="slide",
            status="failed",
            reason="cut off",
            slide=odd,
            model={},
            settings={},
            versions={},
        ),
    }
    write_report(tmp_path, runs)
    page = Page(tmp_path / "report.html")
    assert "Four patients." in page.text
    assert "odd.svs cut off" in page.text


def test_a_picture_that_is_none_costs_no_page(tmp_path: Path) -> None:
    for name, data in (("a", b"no picture"), ("b", b"")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "overlay.png").write_bytes(data)
    info = PngInfo()
    info.add_text("preview", "no base64")
    (tmp_path / "c").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "c" / "overlay.png", pnginfo=info)
    write_report(tmp_path, {tmp_path / n: done(n) for n in "abc"})
    assert Page(tmp_path / "report.html").values("src") == []


def rows_of(path: Path) -> list[list[str]]:
    """Return the texts of the cells of the page's last table, row by row."""
    table = path.read_text("utf-8").rpartition("<table")[2].partition("</table>")[0]
    rows = re.findall(r"<tr>(.*?)</tr>", table, re.DOTALL)
    cells = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL) for row in rows]
    return [[" ".join(re.sub("<[^>]*>", "", cell).split()) for cell in row] for row in cells]


def test_images_have_their_labels_and_no_tissue(tmp_path: Path) -> None:
    def image(name: str, benign: float) -> Run:
        return done(
            name,
            kind="image",
            slide={"name": name, "path": name, "size": [300, 200], "spacing_mm": None},
            area_mm2={},
            area_px={"Lesion": 1234.0},
            lesions={"Lesion": {"count": 3, "largest_mm": None, "listed": []}},
            tissue_mm2=0.0,
            labels={"Benign": benign, "Malignant": 1 - benign},
        )

    write_report(tmp_path, {tmp_path / "a": image("a.png", 0.25), tmp_path / "b": failed("b.png")})
    assert rows_of(tmp_path / "report.html") == [
        ["image", "Lesion px", "Benign", "Malignant", "time"],
        ["a.png", "1,234", "0.250", "0.750", "1 min 15 s"],
    ]
    text = Page(tmp_path / "report.html").text
    assert "1 of 2 images done" in text
    assert "1,234 px · 3 lesions" in text
    assert "tissue" not in text.split("}")[-1]


def test_slides_have_tissue_and_every_class_a_column(tmp_path: Path) -> None:
    other = done("b.svs", area_mm2={"Necrosis": 0.0}, regions={}, tissue_mm2=0.0, warnings=["none"])
    write_report(tmp_path, {tmp_path / "a": done(largest={"Tumor": 0.124}), tmp_path / "b": other})
    assert rows_of(tmp_path / "report.html") == [
        [
            *("slide", "patches", "tissue mm²"),
            *("Tumor mm²", "Tumor % of tissue", "Tumor regions", "Tumor largest mm²"),
            *("Stroma mm²", "Stroma % of tissue", "Stroma regions", "Stroma largest mm²"),
            *("Necrosis mm²", "Necrosis % of tissue", "Necrosis regions", "Necrosis largest mm²"),
            "time",
        ],
        [
            *("a.svs", "37", "2.00", "0.25", "12.5", "1234", "0.12", "1.50", "75.0", "2", ""),
            *("", "", "", "", "1 min 15 s"),
        ],
        ["b.svs warning", "37", "0", *[""] * 8, "0", "", "", "", "1 min 15 s"],
    ]


def test_volumes_are_called_volumes(tmp_path: Path) -> None:
    volume = done(
        "v.nii.gz",
        kind="volume",
        slide={"name": "v", "path": "v", "size": [4, 5, 6], "spacing_mm": [1, 1, 2]},
        area_mm2={},
        volume_ml={"Tumor": 2.5},
        lesions={"Tumor": {"count": 1, "largest_mm": 12.34, "listed": []}},
    )
    write_report(tmp_path, {tmp_path / "v": volume})
    text = Page(tmp_path / "report.html").text
    assert "1 of 1 volumes done" in text
    assert "2.50 ml · 1 lesion, the largest 12.3 mm" in text


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


def test_a_name_that_is_not_utf8_has_its_page(tmp_path: Path) -> None:
    name = b"n\xffcrose.svs".decode("utf-8", "surrogateescape")
    write_report(tmp_path, {tmp_path / name: done(name)})
    assert "crose.svs" in Page(tmp_path / "report.html").text


def cohort() -> dict[str, Run]:
    """Return runs whose figures differ, one without regions, and one that failed."""
    tumor = {"a 2.svs": 0.5, "a 10.svs": 0.05, "b.svs": 1.75}
    runs = {
        name: done(
            name,
            area_mm2={"Tumor": mm2, "Stroma": 0.0},
            regions={"Tumor": int(100 * mm2), "Stroma": 0},
            largest={"Tumor": mm2 / 2, "Stroma": 0.0},
        )
        for name, mm2 in tumor.items()
    }
    runs["none.svs"] = done("none.svs", area_mm2={"Tumor": 0.25}, regions={}, tissue_mm2=0.0)
    return runs | {"bad": failed()}


def test_the_cohort_is_what_numpy_says_of_the_summary(tmp_path: Path) -> None:
    runs = {tmp_path / name: run for name, run in cohort().items()}
    write_summary(tmp_path, runs)
    write_cohort(tmp_path, runs.values())
    with (tmp_path / "summary.csv").open(encoding="utf-8", newline="") as file:
        summary = [row for row in csv.DictReader(file) if row["status"] == "done"]
    with (tmp_path / "cohort.csv").open(encoding="utf-8", newline="") as file:
        found = list(csv.DictReader(file))
    figures = [row["figure"] for row in found]
    assert len(set(figures)) == len(figures)
    assert {
        *("tissue_mm2", "Tumor_mm2", "tissue_percent_Tumor", "regions_Tumor"),
        "largest_mm2_Tumor",
    } < set(figures)
    for row in found:
        values = [float(v) for each in summary if (v := each[row["figure"]])]
        assert (row["model"], int(row["runs"])) == ("m", len(values))
        expected = {"sum": np.sum(values), "mean": np.mean(values)}
        expected |= {"min": min(values), "max": max(values)}
        expected |= {f"p{p}": np.percentile(values, p) for p in (5, 25, 50, 75, 95)}
        told = {name: float(row[name]) for name in expected}
        assert told == pytest.approx(expected, abs=1e-4)


def test_a_histogram_counts_every_run_once(tmp_path: Path) -> None:
    runs = {tmp_path / f"{i}": done(f"{i}", area_mm2={"Tumor": i / 50}) for i in range(101)}
    write_report(tmp_path, runs)
    text = (tmp_path / "report.html").read_text("utf-8")
    titles = re.findall(r"<title>(\S+) to (\S+) % of tissue: (\d+)</title>", text)
    # from 0 to 100 % of the tissue, each of the runs 1 % more; the last bar has both its ends
    assert [int(n) for *_, n in titles] == [5] * 19 + [6]
    assert [float(low) for low, *_ in titles] == [5 * i for i in range(20)]
    page = Page(tmp_path / "report.html")
    assert "Tumor: median of 101; 5 % to 95 % of them: 5.00 to 95.0" in page.text


@pytest.mark.slow
def test_a_click_on_a_head_sorts_the_table(tmp_path: Path) -> None:
    names = ("chromium", "chromium-browser", "google-chrome")
    if (browser := next(filter(None, map(shutil.which, names)), None)) is None:
        pytest.skip("no chromium to look at the page with")
    write_report(tmp_path, {tmp_path / name: run for name, run in cohort().items()})
    path = tmp_path / "report.html"

    def shown(place: Path) -> str:
        switches = ("--headless", "--no-sandbox", "--disable-gpu", "--dump-dom")
        command = [str(browser), *switches, f"--user-data-dir={tmp_path}/u", place.as_uri()]
        return subprocess.run(command, capture_output=True, check=True).stdout.decode()

    # the policy lets it run
    assert 'tabindex="0"' in shown(path)

    def after(*clicks: str) -> list[str]:
        """Return the slides in the table's order, after clicks on heads of columns."""
        script = "".join(
            "[...document.querySelectorAll('.sorted th')].find((th) => th.innerText.trim() === "
            f"{head!r}).click();"
            for head in clicks
        )
        # the page as it is lets no other script run
        text = re.sub(r"<meta http-equiv.*?>", "", path.read_text("utf-8"), flags=re.S)
        other = tmp_path / "clicked.html"
        other.write_text(text.replace("</body>", f"<script>{script}</script></body>"), "utf-8")
        return re.findall(r'<tr><td data-value="([^"]*)"', shown(other))

    assert after() == ["a 2.svs", "a 10.svs", "b.svs", "none.svs"]
    assert after("Tumor mm²") == ["b.svs", "a 2.svs", "none.svs", "a 10.svs"]
    assert after("Tumor mm²", "Tumor mm²") == ["a 10.svs", "none.svs", "a 2.svs", "b.svs"]
    # what has no value is last both ways
    assert after("Tumor regions") == ["b.svs", "a 2.svs", "a 10.svs", "none.svs"]
    assert after("Tumor regions", "Tumor regions") == ["a 10.svs", "a 2.svs", "b.svs", "none.svs"]
    assert after("Tumor mm²", "slide") == ["a 2.svs", "a 10.svs", "b.svs", "none.svs"]
