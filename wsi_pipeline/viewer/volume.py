"""A finished run of a volume as a page asks for it: slices of its values and of its mask."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy.typing as npt

from wsi_pipeline.errors import SourceError, StoreError
from wsi_pipeline.export import MaskLike
from wsi_pipeline.export.planes import PLANES, Body, Reader, mask_reader, volume_reader
from wsi_pipeline.report.record import Run
from wsi_pipeline.run.finished import FileMask, open_mask_of, open_scan_of
from wsi_pipeline.sources.radiology.volume import Volume
from wsi_pipeline.viewer.base import ShownRun, told_in
from wsi_pipeline.viewer.cut import COLORS, Cut, Thresholds, open_cut

LAYERS = {"values": "<f4", "classes": "u1", "cut": "u1"}
"""What of a slice is sent, and as numbers of which kind."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ShownVolume(ShownRun):
    """A finished run of a volume, opened: slices are read when they are asked for.

    Attributes:
        source: what was segmented, where it was found.
        mask: (z, y, x) class indices, where there is one.
        lying: what says how it lies in the body: the source, or the file of the mask.
    """

    source: Volume | None
    mask: MaskLike | None
    lying: Volume

    def facts(self) -> dict[str, Any]:
        """Return all that the page has to know before it asks for slices."""
        volume, body = self.lying, Body.of(self.lying.affine)
        every = (entry for of in self.run.lesions.values() for entry in of.get("listed", ()))
        largest = max(every, key=lambda entry: entry["pixels"], default=None)

        def middle(of: dict[str, Any]) -> list[int]:
            return [(a + b - 1) // 2 for a, b in zip(of["start"], of["stop"], strict=True)]

        return super().facts() | {
            "planes": [plane._asdict() for plane in PLANES],
            # its axes: to the right, to the front and to the top
            "body": [
                {
                    "axis": 2 - axis,
                    "size": volume.shape[axis],
                    "mm": volume.spacing_mm[axis],
                    "is_forward": is_forward,
                }
                for axis, is_forward in zip(body.axes, body.is_forward, strict=True)
            ],
            "start": middle(largest) if largest else [n // 2 for n in reversed(volume.shape)],
            "lesions": [
                {"class": 1 + n, "size": entry.get("volume_ml"), "middle": middle(entry)}
                for n, name in enumerate(self.run.colors)
                if name in self.run.lesions
                for entry in self.run.lesions[name].get("listed", ())
            ],
            "window": self.source and self.source.window,
            "layers": [layer for layer in ("values", "classes") if self._reader(layer) is not None],
            "probability": self.cut and {"classes": self.cut.values, "colors": COLORS},
        }

    @cached_property
    def cut(self) -> Cut | None:
        """Return what cuts the mask anew, where the run keeps probabilities and has its volume."""
        return open_cut(self, self.source.shape, (1.0, 1.0, 1.0)) if self.source else None

    def slice_of(
        self, layer: str, plane: str, at: int, what: int | Thresholds = ()
    ) -> npt.NDArray[Any]:
        """Return a slice as radiologists look at it, float32 values or uint8 class indices.

        Args:
            layer: "values", "classes", or "cut", by what of the probabilities.
            plane: name of one of `PLANES`.
            at: number of the slice along the volume's own axis, from 0.
            what: channel of the probabilities, in 1/255, or thresholds of all.

        Raises:
            SourceError: there is none, or the file cannot be read there.
            StoreError: the mask is damaged there.
        """
        found = next((p for p in PLANES if p.name == plane), None)
        read = self._reader(layer, what)
        body, shape = Body.of(self.lying.affine), self.lying.shape
        if found is None or read is None or not 0 <= at < shape[body.axes[found.across]]:
            raise SourceError(f"no slice {at} of {plane} {layer} here")
        try:
            return body.cut(read, shape, found, at).astype(LAYERS[layer])
        except (SourceError, StoreError):
            raise
        except Exception as error:
            # codecs raise anything
            raise StoreError(f"the mask is damaged here ({error}); segment again") from error

    def _reader(self, layer: str, what: int | Thresholds = ()) -> Reader | None:
        if layer == "cut" and (cut := self.cut):
            return lambda start, shape: cut.at_pixels(
                start, tuple(a + n for a, n in zip(start, shape, strict=True)), what
            )
        if layer == "values":
            return volume_reader(self.source) if self.source else None
        return mask_reader(self.mask) if layer == "classes" and self.mask is not None else None


def open_shown_volume(folder: Path, run: Run, path: Path | None) -> ShownVolume:
    """Open a run of a volume; return it with what of it can be shown.

    Args:
        path: where the volume is now; None = where it was. It must then be the right one.

    Raises:
        StoreError: nothing of it can be shown.
        SourceError: `path` is no volume, or another one.
    """
    problems: list[str] = []
    source, mask = None, None
    with ExitStack() as closing:
        with told_in(problems, path):
            scan = open_scan_of(folder, run, path)
            closing.callback(scan.close)
            source = scan if isinstance(scan, Volume) else None
        with told_in(problems):
            mask = open_mask_of(folder, run, closing, source)
        lying = source or (mask.volume if isinstance(mask, FileMask) else None)
        if lying is None:
            raise StoreError("; ".join(problems))
        return ShownVolume(
            folder=folder,
            run=run,
            closing=closing.pop_all(),
            problems=tuple(problems),
            source=source,
            mask=mask,
            lying=lying,
        )
