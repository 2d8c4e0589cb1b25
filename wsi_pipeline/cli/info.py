"""`info`: what a slide, image or volume says about itself."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from wsi_pipeline.cli.options import MPP, Command, once, read_model, series_option
from wsi_pipeline.errors import MissingMppError, SourceError, without_secrets

if TYPE_CHECKING:
    from wsi_pipeline.bundle import Bundle
    from wsi_pipeline.sources import Slide

THUMBNAIL = 512
"""px of the picture on which the kind of light is judged."""
AXES = {"slide": 0, "image": 2, "volume": 3}
"""Of what a model of each modality takes; 0 for what is opened as a slide."""
QUICK = 1 << 26
"""px of the smallest level up to which that picture is quickly made."""
Facts = dict[str, Any]
"""What is said as JSON, too."""
Rows = list[tuple[str, str]]


@click.command(cls=Command, epilog="wsi-pipeline info slide.svs")
@click.argument("path")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--mpp", type=MPP, help="The slide's µm per pixel, in place of what the file says.")
@series_option
@once("--model", "-m", help="Would this bundle take it? Its folder, name or URL.")
def command(
    path: str, as_json: bool, mpp: float | None, series: int | None, model: str | None
) -> None:
    """Show size, levels, µm per pixel and where they come from, for a slide or a patch grid.

    Of a planar image or a volume: size, spacing and how it lies. PATH may be a URL.
    """
    bundle = read_model(model, fetch=False) if model else None
    facts = describe(path, mpp, series, bundle)
    click.echo(json.dumps(facts, indent=2, ensure_ascii=False) if as_json else _as_text(facts))


def describe(
    path: str | Path, mpp: float | None, series: int | None = None, bundle: Bundle | None = None
) -> Facts:
    """Open a slide, image or volume; return what it says, ready for JSON.

    Args:
        mpp: µm per level-0 pixel of a slide in place of what the file says.
        series: which image of a file with several; None = the largest of RGB.
        bundle: a model, which opens the file as what it is for, and of which is told whether it
            would take it.
    """
    from wsi_pipeline.files.paths import as_path

    path = as_path(path)
    axes = AXES[bundle.modality] if bundle else _axes(path)
    if axes:
        facts = _scan_facts(path, axes, series, may_be_planar=axes == 3 and bundle is None)
    else:
        facts = _slide_facts(path, mpp, series)
    if bundle:
        # images and volumes have been opened as what the model is for
        why_not = None if axes else _why_not(facts, bundle)
        facts["model"] = {"name": bundle.name, "why_not": why_not}
    return facts


def _why_not(facts: Facts, bundle: Bundle) -> str | None:
    """Return why `segment` refuses a slide, None where it takes it."""
    from wsi_pipeline.tissue.select import why_too_coarse

    if facts["mpp"] is None:
        return f"its µm per pixel are {_mpp(facts)}"
    if reason := why_too_coarse(facts["mpp"], bundle.mpp):
        return f"{reason} (--any-resolution takes it all the same)"
    return (facts["not_brightfield"] or None) if bundle.input.channels == 3 else None


def _axes(path: Path) -> int:
    """Return 2 for what is or may be an image, 3 for what is or may be a volume, 0 for a slide."""
    from wsi_pipeline.files.formats import DRIVERS, dicom_slides, is_dicom_slide, kind_of
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
    # Some slides begin like a picture, and a TIFF may be either.
    is_slide = path.suffix.lower() in SLIDE_SUFFIXES
    pictures = dict.fromkeys(DRIVERS.keys() - {"TIFF"}, 2)
    return 0 if is_slide else {"NIfTI": 3, "NRRD": 3, **pictures}.get(kind, 0)


def _scan_facts(path: Path, axes: int, series: int | None, *, may_be_planar: bool) -> Facts:
    from wsi_pipeline.sources.radiology.preprocess import open_scan

    try:
        # of several time points the first shows what all have in common
        scan = open_scan(path, axes=axes, frame=series, time_points=(0,))
    except SourceError as error:
        if not may_be_planar:
            raise
        try:
            scan = open_scan(path, axes=2, frame=series)
        except SourceError:
            # the first one says what is wrong, or what to install
            raise error from None
    with scan:
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


def _slide_facts(path: Path, mpp: float | None, series: int | None) -> Facts:
    from wsi_pipeline.sources import open_source
    from wsi_pipeline.sources.mpp import contradictions, read_mpp

    try:
        opened, has_mpp = open_source(path, mpp=mpp, series=series), True
    except MissingMppError:
        # any will do to see the rest
        opened, has_mpp = open_source(path, mpp=1.0, series=series), False
    with opened as slide:
        readings = read_mpp(slide.properties)
        # Levels are looked at when they are first used; here what is found is to be told.
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
            "icc_profile": _icc_profile(slide),
            "bounds": asdict(slide.bounds) if slide.bounds else None,
            "vendor": slide.properties.get("openslide.vendor"),
            "compression": slide.properties.get("tiff.Compression"),
            "backend": slide.backend,
            "fingerprint": slide.fingerprint,
        }


def _icc_profile(slide: Slide) -> Facts | None:
    """Return what a slide's ICC profile says, None where there is none."""
    from wsi_pipeline.sources.icc import Profile, profile_of

    if not (data := profile_of(slide.pixels)):
        return None
    try:
        profile = Profile(data)
    except ValueError as error:
        return {"name": None, "is_srgb": False, "why_not": str(error)}
    return {"name": profile.name, "is_srgb": profile.is_srgb, "why_not": None}


def _not_brightfield(slide: Slide) -> str | None:
    """Return why a slide is not one in bright field, None where it takes too long to say."""
    from wsi_pipeline.sources import why_not_brightfield

    if min(width * height for width, height in slide.level_sizes) > QUICK:
        return None
    try:
        return why_not_brightfield(slide.properties, slide.thumbnail(THUMBNAIL)[0])
    except SourceError as error:
        return str(error).removeprefix(f"{without_secrets(str(slide.path))}: ")


def _as_text(facts: Facts) -> str:
    """Return the facts as lines for people."""
    rows = _slide_rows(facts) if "levels" in facts else _scan_rows(facts)
    told = ("vendor", "compression", "backend", "fingerprint")
    rows += [(name, facts[name]) for name in told if facts.get(name) is not None]
    if model := facts.get("model"):
        name, reason = model["name"], model["why_not"]
        rows.append(
            (
                "model",
                f"{name} takes it" if reason is None else f"{name} does not take it: {reason}",
            )
        )
    return "\n".join([facts["path"], *(f"  {name:<13}{value}" for name, value in rows)])


def _scan_rows(facts: Facts) -> Rows:
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
    return rows


def _slide_rows(facts: Facts) -> Rows:
    size, mpp = "{} × {} px".format(*facts["size"]), facts["mpp"]
    if mpp:
        width, height = (n * um / 1000 for n, um in zip(facts["size"], mpp, strict=True))
        size += f", {width:.2f} × {height:.2f} mm"
    rows = [("size", size)]
    for index, level in enumerate(facts["levels"]):
        downsample = " × ".join(f"{value:g}" for value in dict.fromkeys(level["downsample"]))
        size = "{} × {} px".format(*level["size"])
        rows.append((f"level {index}", f"{size}, downsample {downsample}"))
    rows.append(("µm per pixel", _mpp(facts)))
    for reading in facts["mpp_readings"]:
        if reading["doubt"]:
            said = "{:.6g} × {:.6g}".format(*reading["mpp"])
            rows.append(("but", f"{reading['source']}: {said}, not believed: {reading['doubt']}"))
    rows += [("but", text) for text in (*facts["doubts"], facts["not_brightfield"]) if text]
    if profile := facts["icc_profile"]:
        known = "sRGB" if profile["is_srgb"] else "not sRGB; --icc apply brings it there"
        said = f"{profile['name']} ({known})"
        rows.append(("ICC profile", profile["why_not"] or said))
    if facts["bounds"]:
        rows.append(("bounds", "{width} × {height} px at x {x}, y {y}".format(**facts["bounds"])))
    return rows


def _mpp(facts: Facts) -> str:
    if facts["mpp"] is None:
        return "not known; `segment` and `tile` want it as --mpp"
    x, y = facts["mpp"]
    return f"{x:.6g} × {y:.6g}, from {facts['mpp_source']}"
