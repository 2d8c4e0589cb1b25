"""`info`: what a slide file says about itself."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from wsi_pipeline.errors import MissingMppError

if TYPE_CHECKING:
    from wsi_pipeline.sources import Slide


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option(
    "--mpp",
    type=click.FloatRange(min=0, min_open=True),
    help="The slide's µm per pixel, in place of what the file says.",
)
def command(path: Path, as_json: bool, mpp: float | None) -> None:
    """Show size, levels, µm per pixel and where they come from, for a slide or a patch grid."""
    facts = describe(path, mpp)
    click.echo(json.dumps(facts, indent=2, ensure_ascii=False) if as_json else _as_text(facts))


def describe(path: Path, mpp: float | None) -> dict[str, Any]:
    """Open a slide; return what it says, ready for JSON.

    Args:
        path: of the slide or patch grid.
        mpp: µm per level-0 pixel in place of what the file says.
    """
    from wsi_pipeline.sources import open_source

    try:
        with open_source(path, mpp=mpp) as slide:
            return _facts(slide, has_mpp=True)
    except MissingMppError:
        with open_source(path, mpp=1.0) as slide:  # any will do to see the rest
            return _facts(slide, has_mpp=False)


def _facts(slide: Slide, *, has_mpp: bool) -> dict[str, Any]:
    from wsi_pipeline.sources.mpp import contradictions, read_mpp

    readings = read_mpp(slide.properties)
    return {
        "path": str(slide.path),
        "size": slide.size,
        "levels": [
            {"size": size, "downsample": downsample}
            for size, downsample in zip(slide.level_sizes, slide.level_downsamples, strict=True)
        ],
        "mpp": slide.mpp if has_mpp else None,
        "mpp_source": slide.mpp_source if has_mpp else None,
        "mpp_readings": [asdict(reading) for reading in readings],
        "contradictions": [r.source for r in contradictions(readings, slide.mpp) if has_mpp],
        "bounds": asdict(slide.bounds) if slide.bounds else None,
        "vendor": slide.properties.get("openslide.vendor"),
        "compression": slide.properties.get("tiff.Compression"),
        "backend": slide.backend,
        "fingerprint": slide.fingerprint,
    }


def _as_text(facts: dict[str, Any]) -> str:
    """Return the facts as lines for people."""
    rows = [("size", _size(facts["size"]) + " px" + _size_mm(facts))]
    for index, level in enumerate(facts["levels"]):
        downsample = " × ".join(f"{value:g}" for value in dict.fromkeys(level["downsample"]))
        rows.append((f"level {index}", f"{_size(level['size'])} px, downsample {downsample}"))
    rows.append(("µm per pixel", _mpp(facts)))
    rows += [("but", reading) for reading in _disputes(facts)]
    if facts["bounds"] is not None:
        bounds = facts["bounds"]
        size = _size((bounds["width"], bounds["height"]))
        rows.append(("bounds", f"{size} px at x {bounds['x']}, y {bounds['y']}"))
    rows += [
        (name, facts[name])
        for name in ("vendor", "compression", "backend", "fingerprint")
        if facts[name] is not None
    ]
    return "\n".join([facts["path"], *(f"  {name:<13}{value}" for name, value in rows)])


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
    uneven = "" if abs(x / y - 1) <= 0.01 else " (x and y differ)"
    return f"{x:.6g} × {y:.6g}, from {facts['mpp_source']}{uneven}"


def _disputes(facts: dict[str, Any]) -> list[str]:
    """Return what other sources say, where it is not the same or not believed."""
    return [
        f"{reading['source']}: {reading['mpp'][0]:.6g} × {reading['mpp'][1]:.6g}"
        + (f", not believed: {reading['doubt']}" if reading["doubt"] else "")
        for reading in facts["mpp_readings"]
        if reading["doubt"] or reading["source"] in facts["contradictions"]
    ]
