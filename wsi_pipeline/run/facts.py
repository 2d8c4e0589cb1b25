"""What a run says of itself: its model, the software, and what its files are stamped with."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from wsi_pipeline.bundle import RANDOM_WEIGHTS, Bundle, bundle_table
from wsi_pipeline.files.schema import converted
from wsi_pipeline.options import ExportOptions
from wsi_pipeline.report.record import ModelFacts, Run
from wsi_pipeline.sources import Slide

if TYPE_CHECKING:
    from wsi_pipeline.export.lesions import Lesions


def model_facts(bundle: Bundle) -> ModelFacts:
    """Return what `run.json` says of a model."""
    facts: ModelFacts = {
        "name": bundle.name,
        "weights_sha256": bundle.weights_sha256,
        "input": bundle_table(bundle)["input"],
    }
    if bundle.encoder:
        facts["encoder_sha256"] = bundle.encoder.weights_sha256
    if bundle.limits:
        facts["limits"] = bundle.limits
    if bundle.origin:
        facts["origin"] = dict(bundle.origin)
    return facts


def warnings_of(bundle: Bundle) -> list[str]:
    """Return what each run by a model warns of."""
    return [bundle.limits] if stamp_of(model_facts(bundle)) else []


def stamp_of(model: Mapping[str, Any]) -> str:
    """Return what must stand on all that a run's model has made, "" where nothing must."""
    return RANDOM_WEIGHTS if model.get("limits", "").startswith(RANDOM_WEIGHTS) else ""


def made_by(model: Mapping[str, Any], key: str) -> dict[str, str]:
    """Return what each object tells of its origin; `model` and `key` are the run's."""
    return {
        "model": model["name"],
        "weights_sha256": model["weights_sha256"],
        **({"limits": stamp} if (stamp := stamp_of(model)) else {}),
        "run": key,
        "software": f"wsi_pipeline {version('wsi-pipeline')}",
    }


def options_of(run: Run) -> ExportOptions:
    """Return the options by which a run's outputs were written.

    Raises:
        KeyError, TypeError, ValueError: the run does not say, as those of older versions.
    """
    return converted(run.settings["export"], ExportOptions)


def versions() -> dict[str, str]:
    """Return the versions of what a mask may depend on."""
    packages = ("wsi-pipeline", "torch", "numpy", "zarr", "openslide-python", "tiffslide")
    return {name: version(name) for name in (*packages, "shapely")}


def lesion_facts(found: Lesions, size: str) -> dict[str, Any]:
    """Return what `run.json` says of a class's lesions; corners are (x, y) or (x, y, z)."""
    diameters = [lesion.diameter_mm for lesion in found.largest]
    return {
        "count": found.count,
        "largest_mm": max((d for d in diameters if d is not None), default=None),
        "listed": [
            {
                "pixels": lesion.pixels,
                size: lesion.size,
                "diameter_mm": lesion.diameter_mm,
                "start": list(reversed(lesion.start)),
                "stop": list(reversed(lesion.stop)),
            }
            for lesion in found.largest
        ],
    }


def headers_of(slide: Slide) -> list[Any]:
    """Return what the instances of level 0 of a DICOM slide say, none of another slide."""
    if slide.backend == "openslide":
        # It brings what writes DICOM.
        from wsi_pipeline.export.dicom_slide import level_headers

        return level_headers(slide.path, slide.size)
    return list(getattr(slide.pixels, "headers", ()))
