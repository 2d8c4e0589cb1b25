"""What every finished run has that a page shows: its facts, and files to be closed."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wsi_pipeline.annotations import color_of
from wsi_pipeline.errors import SourceError, StoreError, UnreachableError
from wsi_pipeline.report.record import GREY, RUN_FILE, Run


@dataclass(frozen=True, kw_only=True, eq=False)
class ShownRun:
    """A finished run, opened; close it.

    Attributes:
        closing: What closes the files.
        problems: A sentence on each thing that cannot be shown.
    """

    folder: Path
    run: Run
    closing: ExitStack
    problems: tuple[str, ...]
    _stamp: tuple[int, int] = field(init=False)
    _closing: weakref.finalize[[], Any] = field(init=False)

    def __post_init__(self) -> None:
        """Remember which run it is; see to it that its files are closed when nobody holds it."""
        object.__setattr__(self, "_stamp", stamp_of(self.folder))
        object.__setattr__(self, "_closing", weakref.finalize(self, self.closing.close))

    @property
    def classes(self) -> dict[str, tuple[int, ...]]:
        """Return the colour of each class of the mask, in its order, the background first."""
        colors = {name: tuple(color or GREY) for name, color in self.run.colors.items()}
        return {self.run.background: (0, 0, 0), **colors}

    def is_current(self) -> bool:
        """Return whether the run is still the one that was opened."""
        try:
            return stamp_of(self.folder) == self._stamp
        except OSError:
            return False

    def facts(self) -> dict[str, Any]:
        """Return all that the page has to know before it asks for pictures."""
        run = self.run
        spacing = run.slide.get("spacing_mm")
        lesions = {name: found["count"] for name, found in run.lesions.items()}
        return {
            "name": run.slide["name"],
            "path": run.slide.get("path", ""),
            "kind": run.kind,
            "status": run.status,
            "reason": run.reason,
            "size": run.slide.get("size"),
            "mpp": run.slide.get("mpp") or (spacing and [1000 * mm for mm in spacing]),
            "model": run.model.get("name", ""),
            "limits": run.model.get("limits", ""),
            "tissue_mm2": run.tissue_mm2 if run.kind == "slide" else None,
            "unit": run.unit,
            "classes": [
                {
                    **of,
                    "amount": run.amounts.get(of["name"]),
                    "regions": run.regions.get(of["name"]),
                    "lesions": lesions.get(of["name"]),
                }
                for of in self.legend(list(self.classes))
            ],
            "labels": run.labels,
            "problems": self.problems,
            "warnings": run.warnings,
        }

    def legend(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """Return names and colours of classes, those that the mask lacks included."""
        colors = self.classes
        return [{"name": name, "color": colors.get(name) or color_of(name)} for name in names]

    def close(self) -> None:
        """Give the files back."""
        self._closing()


def stamp_of(folder: Path) -> tuple[int, int]:
    """Return what changes when a run is written anew."""
    status = (folder / RUN_FILE).stat()
    return status.st_mtime_ns, status.st_size


@contextmanager
def told_in(problems: list[str], path: Path | None = None) -> Iterator[None]:
    """Add what cannot be opened in the body to `problems`; raise it where a person named `path`.

    Raises:
        SourceError: what lies at `path` cannot be shown; UnreachableError alike.
    """
    try:
        yield
    except (SourceError, UnreachableError) as error:
        if path is not None:
            raise
        problems.append(f"{error}. `view --slide PATH` takes it from where it is now")
    except StoreError as error:
        problems.append(str(error))
