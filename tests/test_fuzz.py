"""Damaged inputs of every kind end in one sentence or in a mask, never otherwise.

WSI_PIPELINE_FUZZ_CASES says how many the slow test does, WSI_PIPELINE_FUZZ_FIRST where it begins.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("resource", reason="the memory of the processes is measured as on POSIX")

from fuzz import OTHERS, Case, Outcome, choose_cases, originals, run_cases
from mutate import mutate

FOUND = [
    ("TIFF, ZSTD", 69),  # directories that go round in a circle: tifffile never ended
    ("patch grid", 143),  # a chunk of its metadata that zstd does not take: a traceback
    ("OME-TIFF, several files", 394),  # 65,535 rows, 24 strips: hours in a list of bad ones
    ("DICOM WSI, large", 29),  # a UID that is none: pydicom's warning quoted it
    ("DICOM WSI, large", 500285),  # the same of a file that is looked at as a volume
    ("DICOM WSI", 500236),  # pydicom's log beside the sentence
    ("TIFF, turned", 4242500),  # a list of tiles that is too short: a traceback
    ("DICOM series", 910308),  # a place that is no number: a traceback for all of the folder
    ("NIfTI, gzip", 700045),  # other voxels, though their checksum says so
    ("run", 9100049),  # hashes of what was written that are no text: a traceback
    ("mask, PNG", 700011),  # cut off: a traceback, and zeros without a word where GDAL gave those
]
"""Kinds and seeds for which there was a defect."""


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return originals(tmp_path_factory.mktemp("originals"))


def fuzz(cases: list[Case], folder: Path) -> list[Outcome]:
    """Do the cases; return what became of them, all of which must be right."""
    outcomes = list(run_cases(cases, folder, workers=2))
    wrong = [f"{o.case}\n{o.ended}: {o.said}" for o in outcomes if not o.is_right]
    assert not wrong, "\n\n".join(wrong)
    return outcomes


@pytest.mark.parametrize(("count", "each"), [(48, 1), pytest.param(100, 4, marks=pytest.mark.slow)])
def test_damaged_slides_and_some_of_all_else(
    slides: dict[str, Path], tmp_path: Path, count: int, each: int
) -> None:
    found = [Case(kind=k, original=slides[k], seed=seed) for k, seed in FOUND if k in slides]
    real = {kind: path for kind, path in slides.items() if kind not in OTHERS}
    rest = {kind: path for kind, path in slides.items() if kind in OTHERS}
    cases = [*found, *choose_cases(real, count), *choose_cases(rest, each * len(rest))]
    outcomes = fuzz(cases, tmp_path)
    ended = Counter(outcome.ended for outcome in outcomes)
    # damage that is always fatal, or never, would show nothing
    assert min(ended[end] for end in ("refused", "read", "segmented")) >= 3


@pytest.mark.slow
@pytest.mark.timeout(0)  # each case has its own
def test_many_damaged_slides(slides: dict[str, Path], tmp_path: Path) -> None:
    count = int(os.environ.get("WSI_PIPELINE_FUZZ_CASES", "1200"))
    first = int(os.environ.get("WSI_PIPELINE_FUZZ_FIRST", "100"))
    outcomes = fuzz(choose_cases(slides, count, first=first), tmp_path)
    confusion = Counter((outcome.case.kind, outcome.ended) for outcome in outcomes)
    for (kind, ended), number in sorted(confusion.items()):
        print(f"{kind:45} {ended:10} {number:5}")
    assert len({kind for kind, _ in confusion}) >= 4
    assert len(outcomes) == count


def test_a_seed_gives_the_same_damage(slides: dict[str, Path], tmp_path: Path) -> None:
    for kind, original in slides.items():
        if original.is_dir() or kind == "MIRAX" or original.suffix == ".zip":
            continue
        written = []
        for name in "ab":
            (tmp_path / kind.replace("/", "") / name).mkdir(parents=True)
            folder = tmp_path / kind.replace("/", "") / name
            written.append(mutate(original, folder, random.Random(f"{kind} 7")).read_bytes())
        assert written[0] == written[1] != original.read_bytes()


@pytest.mark.slow
def test_a_crash_and_a_hang_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = Case(kind="none", original=tmp_path / "none.tif", seed=0)
    assert [o.ended for o in run_cases([missing], tmp_path, workers=1)] == ["crash"]
    os.mkfifo(tmp_path / "pipe.tif")  # to which nobody writes
    monkeypatch.setattr("fuzz.SECONDS", 5)
    hangs = Case(kind="none", original=tmp_path / "pipe.tif", seed=0)
    assert [o.ended for o in run_cases([hangs], tmp_path, workers=1)] == ["hang"]
