"""A finished mask and what is written from it, whether just made or opened again from its run."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from datetime import date
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt
from PIL import Image as Pictures

from wsi_pipeline.bundle import ClassInfo
from wsi_pipeline.errors import SourceError, WsiPipelineError
from wsi_pipeline.export import MaskLike, ome_tiff, ome_zarr, overlay
from wsi_pipeline.export.features import FeatureOptions
from wsi_pipeline.export.geojson import Written, write_geojson
from wsi_pipeline.export.geoparquet import write_geoparquet
from wsi_pipeline.export.png import write_mask_png
from wsi_pipeline.export.polygons.components import BlockComponents
from wsi_pipeline.export.polygons.trace import Outlines, find_outlines, trace_mask
from wsi_pipeline.export.scverse import write_anndata, write_spatialdata
from wsi_pipeline.files.clock import Clock
from wsi_pipeline.files.locks import why_not_written
from wsi_pipeline.geometry import Block, Region, Shape
from wsi_pipeline.options import OUTPUTS, ExportOptions, Output, Settings
from wsi_pipeline.patch_grid import StoredGrid
from wsi_pipeline.report.record import ASAP_FILE, FILES, REGIONS_FILE, ModelFacts, SourceFacts
from wsi_pipeline.run.facts import lesion_facts, made_by, stamp_of
from wsi_pipeline.run.probability import Probability, open_probability
from wsi_pipeline.run.quality import FLAWS, with_flaws, write_quality
from wsi_pipeline.run.written import WrittenFiles

if TYPE_CHECKING:
    # What is for images and volumes is loaded for them alone.
    from pydicom import Dataset

    from wsi_pipeline.export.lesions import Lesions
    from wsi_pipeline.sources.radiology.image import Image
    from wsi_pipeline.sources.radiology.preprocess import Scan
    from wsi_pipeline.sources.radiology.volume import Volume

logger = logging.getLogger(__name__)

BLOCK_SIDE = {2: 2048, 3: 256}
"""Of a block in grid pixels, by the number of axes, where nothing else is asked for."""
NOTHING = Written(regions={}, largest={}, vertices=0, dropped=[])
PICTURE_SIDE, SMALLEST_SIDE = 1600, 600
"""Longest side of an image's overlay, px, and what a smaller one is enlarged to, whole times."""
Ledger = Mapping[Shape, Mapping[str, npt.NDArray[Any]]]
"""What is known of blocks, by their index."""
Writers = Mapping[Output, Callable[[Path], object]]
"""What writes each output, in their order."""


@dataclass(frozen=True, kw_only=True)
class Result(ABC):
    """A whole mask, and what its files tell of it.

    Attributes:
        facts: what `run.json` says of the source.
        model: what it says of the model.
        key: of the run.
        classes: in the mask's order.
        mask: (y, x) or (z, y, x) class indices.
        blocks: all that may hold anything.
        side: of a block in two dimensions, mask pixels.
        ledger: as far as it is true of this mask; pieces of other blocks are looked for in it.
        probability: that of the classes, where the ledger does not tell it; None = nobody knows.
        write_probability: puts together what blocks have kept, where users look; None = they do
            not keep anything any more.
    """

    facts: SourceFacts
    model: ModelFacts
    key: str
    classes: tuple[ClassInfo, ...]
    mask: MaskLike
    blocks: list[Block]
    side: int
    ledger: Ledger
    probability: Probability | None = None
    write_probability: Callable[[], None] | None = None

    @property
    @abstractmethod
    def features(self) -> FeatureOptions:
        """Return how regions become features."""

    @abstractmethod
    def _writers(self) -> Writers:
        """Return what writes each output but polygons."""

    def write(
        self, wanted: Collection[Output], folder: Path, files: WrittenFiles, clock: Clock
    ) -> tuple[list[str], Written]:
        """Write files; return a sentence for each that failed, and what polygons were written.

        Args:
            clock: gets a lap for each.
        """
        failures, polygons = list[str](), [NOTHING]
        writers: dict[Output, Callable[[Path], object]] = {
            "geojson": lambda path: polygons.append(
                write_geojson(path, path.with_name(REGIONS_FILE), self._outlines, self.features)
            ),
            "geoparquet": lambda path: write_geoparquet(path, self._outlines, self.features),
            "anndata": lambda path: write_anndata(path, self._outlines, self.features),
            **self._writers(),
        }
        if (put_together := self.write_probability) is not None:
            # A folder, which takes its place by itself.
            writers["probability"] = lambda path: put_together()
        # DICOM is made of probabilities, too, and regions tell the quality of their pixels.
        for output, write in sorted(
            writers.items(), key=lambda w: (w[0] == "dicom") - (w[0] == "quality")
        ):
            if output not in wanted:
                continue
            path = folder / FILES[output]
            files.tell(path.name)
            try:
                with files.staged() as stage:
                    write(stage / path.name)
            except Exception as error:
                # The mask is whole: whatever fails here must not cost it.
                logger.debug("writing %s failed", path, exc_info=True)
                failures.append(
                    why_not_written(path, error)
                    if isinstance(error, OSError)
                    else f"{path.name} could not be written: {error}"
                )
            clock.lap(output)
        # They may be large, and no other output needs them.
        vars(self).pop("_outlines", None)
        return failures, polygons[-1]

    @cached_property
    def _outlines(self) -> Outlines:
        features = self.features
        traced = {i: BlockComponents.from_arrays(a) for i, a in self.ledger.items() if "top" in a}
        rest = [block for block in self.blocks if block.index not in traced]
        sure = self.probability.of_classes if self.probability else None
        return find_outlines(
            self.mask,
            {**traced, **trace_mask(self.mask, rest, sure=sure)},
            block_size=self.side,
            tolerance=features.tolerance,
            min_pixels=features.min_pixels,
        )

    @property
    def _notes(self) -> list[str]:
        """Return what stands below a picture."""
        told = (self.facts["name"], self.model["name"], str(date.today()), stamp_of(self.model))
        return [note for note in told if note]

    @property
    def _namespace(self) -> str:
        return f"{self.facts['fingerprint']}/{self.model['weights_sha256']}"


@dataclass(frozen=True, kw_only=True)
class SlideResult(Result):
    """The mask of a slide.

    Attributes:
        mask_path: the finished OME-Zarr.
        downsample: level-0 pixels per mask pixel, (y, x).
        folder: of the run.
        headers: what the level-0 files of a DICOM slide say; none = another slide.
        options: how to write.
        stored: the patch grid, with tissue and thumbnail; None = it is not kept any more.
        judged: ledger of the mask itself, with the quality of its cells.
        ruled_path: OME-Zarr by other thresholds, of which polygons and overlay are made; None =
            they are made of the mask.
    """

    mask_path: Path
    downsample: tuple[float, float]
    folder: Path
    headers: list[Dataset]
    options: ExportOptions
    stored: StoredGrid | None
    judged: Ledger
    ruled_path: Path | None = None

    @property
    def crop(self) -> Region | None:
        """Return the part of the slide that the viewer shows, in level-0 pixels; None = all."""
        bounds = self.facts["bounds"]
        return Region(**bounds) if bounds and self.options.frame == "qupath" else None

    @property
    def frame(self) -> dict[str, Any]:
        """Return what `run.json` says of the frame of polygons and TIFF."""
        crop = self.crop
        return {"for": self.options.frame, "offset": [crop.x, crop.y] if crop else [0, 0]}

    @property
    def features(self) -> FeatureOptions:
        """Return how regions become features."""
        x, y = self.facts["mpp"]
        return FeatureOptions(
            classes=self.classes,
            downsample=self.downsample,
            mpp=(y, x),
            crop=self.crop,
            simplify_um=self.options.simplify_um,
            min_area_um2=self.options.min_area_um2,
            namespace=self._namespace,
            metadata=made_by(self.model, self.key),
            flaws=FLAWS if "quality" in self.options.outputs else (),
        )

    @cached_property
    def _outlines(self) -> Outlines:
        return with_flaws(self, super()._outlines) if self.features.flaws else super()._outlines

    def _writers(self) -> Writers:
        return {
            "tiff": self._write_tiffs,
            "overlay": self._write_overlay,
            "dicom": self._write_dicom,
            "spatialdata": lambda path: write_spatialdata(
                path, self.mask_path, self._outlines, replace(self.features, crop=None)
            ),
            # A folder, which takes its place by itself.
            "quality": lambda _: write_quality(self),
        }

    def _write_tiffs(self, path: Path) -> None:
        """Write the OME-TIFF, cropped as the viewer shows it, and ASAP's kind where wanted."""
        mask, *reduced = ome_zarr.open_levels(self.mask_path)
        features, box = self.features, None
        if (crop := self.crop) is not None:
            y, x = self.downsample
            top, left = round(crop.y / y), round(crop.x / x)
            height = min(round(crop.height / y), mask.shape[0] - top)
            width = min(round(crop.width / x), mask.shape[1] - left)
            box = (top, left, height, width)
        ome_tiff.write_ome_tiff(
            path,
            mask,
            classes=self.classes,
            mask_mpp=features.mask_mpp,
            crop=box,
            name=Path(self.facts["name"]).stem,
            reduced=reduced,
        )
        if self.options.tiff == "asap":
            beside = path.with_name(ASAP_FILE)
            ome_tiff.write_asap_tiff(beside, mask, mask_mpp=features.mask_mpp, reduced=reduced)

    def _write_dicom(self, path: Path) -> None:
        """Write mask, levels, polygons, and what there is of probabilities, of the whole slide."""
        from wsi_pipeline.export import dicom_slide

        origin = dicom_slide.Origin(
            headers=self.headers,
            facts=self.facts,
            model=self.model,
            key=self.key,
            classes=self.classes,
        )
        dicom_slide.write_masks(path, ome_zarr.open_levels(self.mask_path), origin, self.downsample)
        features = replace(self.features, crop=None)
        if not self.headers:
            # They are told in pixels of the mask, there being no other image to refer to.
            features = replace(features, downsample=(1.0, 1.0), mpp=features.mask_mpp)
        beside = path.with_name("annotations.dcm")
        dicom_slide.write_annotations(beside, self._outlines, features, origin)
        if (self.folder / FILES["probability"]).is_dir():
            found = open_probability(self.folder)
            y, x = (d / r for d, r in zip(self.downsample, found.ratio, strict=True))
            beside = path.with_name("probability.dcm")
            dicom_slide.write_probability(beside, found.levels[0], origin, (y, x))

    def _write_overlay(self, path: Path) -> None:
        if self.stored is None:
            raise WsiPipelineError("the slide's thumbnail is not kept here; segment it again")
        tissue = self.stored.tissue
        overlay.write_overlay(
            path,
            self.stored.thumbnail,
            ome_zarr.read_mask(self.ruled_path or self.mask_path, tissue.shape),
            classes=self.classes,
            tissue=tissue,
            notes=self._notes,
            um=self.facts["mpp"][0] * self.stored.tissue_downsample[1],
        )


@dataclass(frozen=True, kw_only=True)
class ScanResult(Result):
    """The mask of a planar image or volume.

    Attributes:
        scan: opened; None = only what is made of the mask alone can be written.
        own_mask: the mask that people see, where `mask` is by other thresholds; None = it is that.
        size_field: name, in `run.json`, of the size of a class where a pixel's is known.
    """

    scan: Scan | None
    own_mask: MaskLike | None = None
    size_field: ClassVar[str]

    @cached_property
    def lesions(self) -> list[Lesions]:
        """Return the lesions of each class but the background."""
        from wsi_pipeline.export.lesions import count_lesions

        return count_lesions(self.mask, self.classes, self._spacing_mm)

    @property
    def _spacing_mm(self) -> tuple[float, ...] | None:
        """Return mm between pixels in the order of the mask's axes."""
        spacing = self.facts["spacing_mm"]
        return tuple(reversed(spacing)) if spacing else None

    @property
    def _seen(self) -> MaskLike:
        return self.mask if self.own_mask is None else self.own_mask

    @property
    def amounts(self) -> dict[str, Any]:
        """Return what `run.json` says of how much there is, in the unit that is known."""
        size = self.size_field
        return {
            size if self._spacing_mm else "area_px": {
                f.name: f.pixels if f.size is None else f.size for f in self.lesions
            },
            "lesions": {found.name: lesion_facts(found, size) for found in self.lesions},
        }

    @property
    def features(self) -> FeatureOptions:
        """Return how regions become features: exactly, in pixels."""
        spacing = self._spacing_mm or (1.0, 1.0)
        return FeatureOptions(
            classes=self.classes,
            downsample=(1.0, 1.0),
            mpp=(spacing[0] * 1000, spacing[1] * 1000),
            crop=None,
            simplify_um=0,
            min_area_um2=0,
            namespace=self._namespace,
            metadata=made_by(self.model, self.key),
            unit="mm^2" if self._spacing_mm else "px^2",
        )

    def _writers(self) -> Writers:
        scan = self.scan
        if scan is None:
            return {}
        from wsi_pipeline.export.dicom_seg import write_dicom_seg

        return {
            "dicom": lambda path: write_dicom_seg(
                path,
                self._seen,
                scan=scan,
                classes=self.classes,
                model=self.model["name"],
                version=self.model["weights_sha256"][:16],
            )
        }


@dataclass(frozen=True, kw_only=True)
class ImageResult(ScanResult):
    """The mask of a planar image."""

    scan: Image | None
    size_field: ClassVar[str] = "area_mm2"

    def _writers(self) -> Writers:
        return {
            "png": lambda path: write_mask_png(path, self._seen, classes=self.classes),
            **super()._writers(),
            **({} if self.scan is None else {"overlay": partial(self._write_overlay, self.scan)}),
        }

    def _write_overlay(self, image: Image, path: Path) -> None:
        longest = max(image.shape)
        share = min(max(SMALLEST_SIDE // longest, 1), PICTURE_SIDE / longest)
        height, width = (max(1, round(n * share)) for n in image.shape)
        rows, columns = (
            (np.arange(n) * 2 + 1) * m // (2 * n)
            for n, m in zip((height, width), image.shape, strict=True)
        )
        picture = Pictures.fromarray(image.as_rgb())
        overlay.write_overlay(
            path,
            np.asarray(picture.resize((width, height), Pictures.Resampling.BOX)),
            self.mask[:, :][np.ix_(rows, columns)],
            classes=self.classes,
            notes=self._notes,
            um=spacing[1] * 1000 * image.shape[1] / width
            if (spacing := self._spacing_mm)
            else None,
        )


@dataclass(frozen=True, kw_only=True)
class VolumeResult(ScanResult):
    """The mask of a volume."""

    scan: Volume | None
    size_field: ClassVar[str] = "volume_ml"

    def _writers(self) -> Writers:
        volume = self.scan
        if volume is None:
            return {}
        from wsi_pipeline.export.nifti import write_nifti
        from wsi_pipeline.export.planes import write_planes_overlay

        return {
            "nifti": lambda path: write_nifti(path, self._seen, volume),
            **super()._writers(),
            "overlay": lambda path: write_planes_overlay(
                path, volume, self.mask, self.classes, self.lesions, notes=self._notes
            ),
        }


def without_dicom(scan: Scan, settings: Settings) -> Settings:
    """Return the settings without the DICOM segmentation where it could not refer to its input.

    Raises:
        SourceError: it was asked for by name.
    """
    outputs = settings.export.outputs
    if "dicom" not in outputs or scan.can_be_referred_to:
        return settings
    if outputs not in OUTPUTS.values():
        what = "has no identifiers of its own" if scan.backend == "pydicom" else "is no DICOM"
        raise SourceError(
            f"{scan.path} {what}, which a DICOM segmentation must refer to; leave dicom out of "
            "--outputs"
        )
    wanted = tuple(output for output in outputs if output != "dicom")
    return replace(settings, export=replace(settings.export, outputs=wanted))
