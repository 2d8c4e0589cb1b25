"""`info`: what a slide, image or volume says about itself."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from wsi_pipeline.cli.options import MPP, once, series_option
from wsi_pipeline.errors import MissingMppError, SourceError, without_secrets

if TYPE_CHECKING:
    from wsi_pipeline.bundle import Bundle
    from wsi_pipeline.sources import Slide
    from wsi_pipeline.sources.radiology.preprocess import Scan

THUMBNAIL = 512
"""px of the picture on which the kind of light is judged."""
AXES = {"slide": 0, "image": 2, "volume": 3}
"""Of what a model of each modality takes; 0 for what is opened as a slide."""
QUICK = 1 << 26
"""px of the smallest level up to which that picture is quickly made."""


@click.command()
@click.argument("path")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option(
    "--mpp",
    type=MPP,
    help="The slide's µm per pixel, in place of what the file says.",
)
@series_option
@once("--model", "-m", help="Would this bundle take it? A folder, a model.toml or its URL.")
def command(
    path: str, as_json: bool, mpp: float | None, series: int | None, model: str | None
) -> None:
    """Show size, levels, µm per pixel and where they come from, for a slide or a patch grid.

    Of a planar image or a volume: size, spacing and how it lies. PATH may be a URL.
    """
    from wsi_pipeline.bundle import load_bundle

    bundle = load_bundle(model, fetch=False) if model else None
    facts = describe(path, mpp, series, bundle)
    text = _as_text if "levels" in facts else _scan_as_text
    click.echo(json.dumps(facts, indent=2, ensure_ascii=False) if as_json else text(facts))


def describe(
    path: str | Path, mpp: float | None, series: int | None = None, bundle: Bundle | None = None
) -> dict[str, Any]:
    """Open a slide, image or volume; return what it says, ready for JSON.

    Args:
        path: of the file, folder or patch grid.
        mpp: µm per level-0 pixel of a slide in place of what the file says.
        series: which image of a file with several; None = the largest of RGB.
        bundle: a model, which opens the file as what it is for, and of which is told whether it
            would take it.
    """
    facts = _describe(path, mpp, series, bundle.modality if bundle else None)
    if bundle:
        facts["model"] = {"name": bundle.name, "why_not": _why_not(facts, bundle)}
    return facts


def _why_not(facts: dict[str, Any], bundle: Bundle) -> str | None:
    """Return why `segment` refuses what is described, None where it takes it."""
    from wsi_pipeline.tissue.select import why_too_coarse

    if bundle.modality != "slide":
        return None  # it has been opened as what the model is for
    if facts["mpp"] is None:
        return _mpp(facts)
    if reason := why_too_coarse(facts["mpp"], bundle.mpp):
        return f"{reason} (--any-resolution takes it all the same)"
    return (facts["not_brightfield"] or None) if bundle.input.channels == 3 else None


def _describe(
    path: str | Path, mpp: float | None, series: int | None, modality: str | None
) -> dict[str, Any]:
    """Open what is there, or what is asked for; return what it says."""
    from wsi_pipeline.files.paths import as_path
    from wsi_pipeline.sources import open_source
    from wsi_pipeline.sources.radiology.preprocess import open_scan

    if axes := AXES[modality] if modality else _axes(as_path(path)):
        try:
            # of several time points the first shows what all have in common
            scan = open_scan(as_path(path), axes=axes, frame=series, time_points=(0,))
        except SourceError as error:
            if axes == 2 or modality:
                raise
            try:
                scan = open_scan(as_path(path), axes=2, frame=series)  # DICOM may be either
            except SourceError:
                raise error from None  # which says what is wrong, or what to install
        with scan:
            return _scan_facts(scan)
    try:
        with open_source(path, mpp=mpp, series=series) as slide:
            return _facts(slide, has_mpp=True)
    except MissingMppError:
        with open_source(path, mpp=1.0, series=series) as slide:  # any will do to see the rest
            return _facts(slide, has_mpp=False)


def _facts(slide: Slide, *, has_mpp: bool) -> dict[str, Any]:
    from wsi_pipeline.sources.mpp import contradictions, read_mpp

    readings = read_mpp(slide.properties)
    for level in slide.levels.usable():
        slide.levels.check(level)
    return {
        "path": without_secrets(str(slide.path)),
        "size": slide.size,
        "levels": [
            {"size": size, "downsample": downsample}
            for size, downsample in zip(slide.level_sizes, slide.level_downsamples, strict=True)
        ],
        "mpp": slide.mpp if has_mpp else None,
        "mpp_source": slide.mpp_source if has_mpp else None,
        "mpp_readings": [asdict(reading) for reading in readings],
        "contradictions": [r.source for r in contradictions(readings, slide.mpp) if has_mpp],
        "doubts": slide.doubts,
        "not_brightfield": _not_brightfield(slide),
        "bounds": asdict(slide.bounds) if slide.bounds else None,
        "vendor": slide.properties.get("openslide.vendor"),
        "compression": slide.properties.get("tiff.Compression"),
        "backend": slide.backend,
        "fingerprint": slide.fingerprint,
    }


def _axes(path: Path) -> int:
    """Return 2 for what is or may be an image, 3 for what is or may be a volume, 0 for a slide."""
    from wsi_pipeline.files.formats import dicom_slides, is_dicom_slide, kind_of
    from wsi_pipeline.files.ngff import is_ome_zarr
    from wsi_pipeline.files.paths import is_remote
    from wsi_pipeline.patch_grid import is_patch_grid
    from wsi_pipeline.run.jobs import SLIDE_SUFFIXES
    from wsi_pipeline.sources.radiology.discover import series_in

    if is_remote(path) or not os.path.exists(path):
        return 0
    if path.is_dir():
        is_slide = is_patch_grid(path) or is_ome_zarr(path)
        found = [] if is_slide else [f for series in series_in(path) for f, _ in series.files]
        return 3 if found and not dicom_slides(found) else 0
    kind = kind_of(path)
    if kind == "DICOM":
        return 0 if is_dicom_slide(path) else 3
    if path.suffix.lower() in SLIDE_SUFFIXES:  # some begin like a picture
        return 0
    return {"NIfTI": 3, "NRRD": 3, "PNG": 2, "JPEG": 2}.get(kind, 0)


def _scan_facts(scan: Scan) -> dict[str, Any]:
    affine = getattr(scan, "affine", None)
    return {
        "path": without_secrets(str(scan.path)),
        "size": list(reversed(scan.shape)),
        "channels": scan.channels,
        "spacing_mm": list(reversed(scan.spacing_mm)) if scan.spacing_mm else None,
        "affine": None if affine is None else affine.tolist(),
        "doubts": scan.doubts,
        "backend": scan.backend,
        "fingerprint": scan.fingerprint,
    }


def _scan_as_text(facts: dict[str, Any]) -> str:
    """Return the facts of an image or volume as lines for people."""
    spacing = facts["spacing_mm"]
    rows = [
        ("size", " × ".join(map(str, facts["size"])) + " px"),
        ("channels", str(facts["channels"])),
        ("spacing", " × ".join(f"{mm:g}" for mm in spacing) + " mm" if spacing else "not known"),
        *(("but", text) for text in facts["doubts"]),
    ]
    if facts["affine"]:
        lines = [" ".join(f"{v:10.4g}" for v in row) for row in facts["affine"][:3]]
        rows += zip(("to RAS+ mm", "", ""), lines, strict=True)
    rows += [(name, facts[name]) for name in ("backend", "fingerprint")]
    rows += _model(facts)
    return "\n".join([facts["path"], *(f"  {name:<13}{value}" for name, value in rows)])


def _not_brightfield(slide: Slide) -> str | None:
    """Return why a slide is not one in bright field, None where it takes too long to say."""
    from wsi_pipeline.sources import why_not_brightfield

    if min(width * height for width, height in slide.level_sizes) > QUICK:
        return None
    try:
        return why_not_brightfield(slide.properties, slide.thumbnail(THUMBNAIL)[0])
    except SourceError as error:
        return str(error).removeprefix(f"{without_secrets(str(slide.path))}: ")


def _as_text(facts: dict[str, Any]) -> str:
    """Return the facts as lines for people."""
    rows = [("size", _size(facts["size"]) + " px" + _size_mm(facts))]
    for index, level in enumerate(facts["levels"]):
        downsample = " × ".join(f"{value:g}" for value in dict.fromkeys(level["downsample"]))
        rows.append((f"level {index}", f"{_size(level['size'])} px, downsample {downsample}"))
    rows.append(("µm per pixel", _mpp(facts)))
    rows += [("but", text) for text in (*_not_believed(facts), *facts["doubts"])]
    if facts["not_brightfield"]:
        rows.append(("but", facts["not_brightfield"]))
    if facts["bounds"] is not None:
        bounds = facts["bounds"]
        size = _size((bounds["width"], bounds["height"]))
        rows.append(("bounds", f"{size} px at x {bounds['x']}, y {bounds['y']}"))
    rows += [
        (name, facts[name])
        for name in ("vendor", "compression", "backend", "fingerprint")
        if facts[name] is not None
    ]
    rows += _model(facts)
    return "\n".join([facts["path"], *(f"  {name:<13}{value}" for name, value in rows)])


def _model(facts: dict[str, Any]) -> list[tuple[str, str]]:
    if "model" not in facts:
        return []
    name, reason = facts["model"]["name"], facts["model"]["why_not"]
    return [("model", f"{name} takes it" if reason is None else f"{name} does not: {reason}")]


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]} × {size[1]}"


def _size_mm(facts: dict[str, Any]) -> str:
    if facts["mpp"] is None:
        return ""
    width, height = (n * mpp / 1000 for n, mpp in zip(facts["size"], facts["mpp"], strict=True))
    return f", {width:.2f} × {height:.2f} mm"


def _mpp(facts: dict[str, Any]) -> str:
    if facts["mpp"] is None:
        return "not known; `segment` and `tile` want it as --mpp"
    x, y = facts["mpp"]
    return f"{x:.6g} × {y:.6g}, from {facts['mpp_source']}"


def _not_believed(facts: dict[str, Any]) -> list[str]:
    """Return what sources say that do not count, and why not."""
    return [
        f"{reading['source']}: {reading['mpp'][0]:.6g} × {reading['mpp'][1]:.6g}, "
        f"not believed: {reading['doubt']}"
        for reading in facts["mpp_readings"]
        if reading["doubt"]
    ]
