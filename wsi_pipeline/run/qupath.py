"""Runs as a QuPath project: plain files that QuPath opens as if it had written them."""

from __future__ import annotations

import json
import shutil
import time
import uuid
from collections.abc import Mapping
from importlib import resources
from pathlib import Path

from wsi_pipeline.errors import StoreError
from wsi_pipeline.files.atomic import written_beside
from wsi_pipeline.files.paths import as_path, is_remote
from wsi_pipeline.report.record import Run
from wsi_pipeline.run.finished import open_slide_of

SERVERS = "qupath.lib.images.servers"


def write_qupath_project(folder: Path, runs: Mapping[Path, Run]) -> None:
    """Write a project of the slides of some runs, with their polygons and a script to import them.

    Objects in a project are serialised Java, which nothing but QuPath writes: so the polygons lie
    beside each image as GeoJSON.

    Args:
        folder: where there is nothing yet.
        runs: by their folders.

    Raises:
        StoreError: there is something, or a run has no polygons or is not of a slide here.
        SourceError: a slide is not where it was.
    """
    from openslide import OpenSlide

    if folder.exists():
        raise StoreError(f"{folder} is there already, maybe with somebody's work; name a new one")
    images = []
    with written_beside(folder) as partial:
        for number, (home, run) in enumerate(runs.items(), start=1):
            names = [n for n in run.files if n.startswith("annotations") and n.endswith("geojson")]
            is_away = run.kind != "slide" or is_remote(as_path(run.slide["path"]))
            if is_away or not names or run.slide["backend"] == "patch grid":
                raise StoreError(
                    f"{home} has no polygons of a slide on this machine; a QuPath project takes "
                    "runs of slides with geojson among their --outputs"
                )
            with open_slide_of(home, run) as slide:
                path = slide.path.absolute()
            is_openslide = bool(OpenSlide.detect_format(path))
            # OpenSlide's reader there crops to the bounds unless it is told not to.
            whole = ["--no-crop"] if is_openslide and run.frame["for"] == "openslide" else []
            reader = "openslide.Openslide" if is_openslide else "bioformats.BioFormats"
            server = {
                "builderType": "uri",
                "providerClassName": f"{SERVERS}.{reader}ServerBuilder",
                "uri": path.as_uri(),
                "args": whole,
            }
            images.append(
                {
                    "serverBuilder": server,
                    "entryID": number,
                    "randomizedName": str(uuid.uuid4()),
                    "imageName": run.slide["name"],
                    "metadata": {},
                }
            )
            beside = partial / "data" / str(number)
            beside.mkdir(parents=True)
            shutil.copyfile(home / names[-1], beside / "annotations.geojson")
        now = round(time.time() * 1000)
        project = {
            "version": "0.6.0",
            "createTimestamp": now,
            "modifyTimestamp": now,
            "lastID": len(images),
            "images": images,
        }
        (partial / "project.qpproj").write_text(json.dumps(project, indent=2), "utf-8")
        (partial / "scripts").mkdir()
        script = (resources.files("wsi_pipeline.run") / "import_annotations.groovy").read_bytes()
        (partial / "scripts" / "import_annotations.groovy").write_bytes(script)
