"""Install the lowest versions that pyproject.toml allows in an empty place, and use them.

torch's own lowest is not tried: its old builds bring gigabytes of CUDA. It is that of the tests.
A queue of jobs and a bucket are not at hand: of their clients no more is seen than that they start.
"""

import os
import subprocess
import sys
import tempfile
import time
import venv
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RECIPE = """
[bundle]
name = "smoke"
modality = "slide"
network = "swish_unet"
network_options = { classes = 1, widths = [8, 16] }
[bundle.input]
mpp = 0.5
patch_size = [64, 64]
overlap = [16, 16]
mean = [0.5, 0.5, 0.5]
std = [0.25, 0.25, 0.25]
[bundle.output]
activation = "sigmoid"
classes = [{ name = "Background" }, { name = "Tumor", color = [200, 0, 0] }]
[train]
steps = 2
batch_size = 2
crop = [64, 64]
"""
DATA = """
[[data]]
patient = "NAME"
images = "NAME.png"
masks = "NAME_mask.png"
mpp = 0.5
classes = { Tumor = [1] }
"""


def run(*command: object, **options: object) -> None:
    """Run a command that must succeed."""
    subprocess.run([str(part) for part in command], check=True, **options)


def say(*arguments: object) -> None:
    """Run wsi-pipeline as people do."""
    run(sys.executable, "-m", "wsi_pipeline", "-q", *arguments)


def main() -> None:
    """Install and use."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        limits = [place / "torch.txt", place / "lowest.txt"]
        # the same torch as here, as in check_wheel.py
        limits[0].write_text(f"torch=={version('torch').split('+')[0]}\n")
        env = dict(os.environ)
        if index := env.get("PIP_INDEX_URL"):  # uv reads none of pip's settings
            env.setdefault("UV_DEFAULT_INDEX", index)
        run(
            *(sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--all-extras"),
            *("--resolution", "lowest-direct", "--only-binary", ":all:"),
            *("--python", sys.executable, "--no-emit-package", "torch"),
            *("--constraint", limits[0], "--output-file", limits[1], ROOT / "pyproject.toml"),
            env=env,
            stdout=subprocess.DEVNULL,
        )
        venv.create(place / "env", with_pip=True)
        python = place / "env" / "bin" / "python"
        # as constraints: the list names, too, what a torch for GPUs would bring
        run(
            *(python, "-m", "pip", "install", "-q", "-c", limits[0], "-c", limits[1]),
            *(
                "--editable",
                f"{ROOT}[anndata,cluster,geoparquet,hub,onnx,radiology,remote,spatialdata,train]",
            ),
        )
        installed = time.monotonic()
        (place / "work").mkdir()
        # what tests make is used here too; old versions warn of each other
        env = {**os.environ, "PYTHONPATH": str(ROOT / "tests"), "PYTHONWARNINGS": "ignore"}
        run(python, __file__, "use", cwd=place / "work", env=env)
    took = [installed - start, time.monotonic() - installed]
    print("the lowest versions: installed in {:.0f} s, used in {:.0f} s".format(*took))


def use() -> None:
    """Do each job once; compare with the pixels."""
    import dask_jobqueue  # noqa: F401
    import numpy as np
    import tifffile
    from bundles import classify, pointwise_bundle

    from wsi_pipeline import open_run

    pixels = np.full((1500, 2300, 3), 245, np.uint8)  # several chunks, less than a shard
    pixels[200:1400, 300:2100] = (190, 90, 150)
    pixels[250:1200, 350:1450] = (190, 190, 150)
    truth = classify(pixels)
    tifffile.imwrite(
        "slide.tif", pixels, tile=(256, 256), photometric="rgb",
        resolution=(20000, 20000), resolutionunit="CENTIMETER",
    )  # fmt: skip
    tifffile.imwrite("truth.tif", truth)
    pointwise_bundle(Path("model"), mpp=0.5)
    say("segment", "slide.tif", "--model", "model", "--output", "out")
    assert (tifffile.imread("out/slide/mask.ome.tif") == truth).all()
    say("tile", "slide.tif", "--mpp", 0.5, "--output", "grids")
    say("segment", "grids/slide.zarr", "--model", "model", "--output", "tiled", "--ngff", "0.5")
    assert (tifffile.imread("tiled/slide/mask.ome.tif") == truth).all()
    say("export", "out/slide", "--simplify", 0)
    with open_run("out/slide") as opened:
        assert (np.asarray(opened.mask) == truth).all()
        assert len(opened.polygons()) == sum(opened.record.regions.values())
    say("check-geojson", "out/slide/annotations.geojson")
    values = ("--truth-values", "Tumor=1", "--truth-values", "Stroma=2")
    say("evaluate", "out/slide", "truth.tif", *values, "--output", "judged")
    say("status", "out")
    view(Path("out"))
    reach(Path("slide.tif"))
    scan()
    train(pixels, truth == 1)
    say("models", "export", "trained", "--format", "onnx", "--output", "trained.onnx")


def view(folder: Path) -> None:
    """Ask the viewer for its list, and for a tile of each kind."""
    import json
    from urllib.request import urlopen

    from wsi_pipeline.viewer import serve

    with serve(folder) as viewer:
        (entry,) = json.load(urlopen(f"{viewer.url}runs"))
        for part in ("slide/0/0/0", "mask/0/0/0", "thumbnail"):
            assert urlopen(f"{viewer.url}runs/{entry['id']}/{part}").read()


def reach(file: Path) -> None:
    """Read a file over HTTP and a slide from another store; make a client of a bucket."""
    import http.server
    import threading

    import fsspec

    from wsi_pipeline.files.paths import as_path, is_remote
    from wsi_pipeline.sources import open_source

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = as_path(f"http://127.0.0.1:{server.server_port}/{file}")
        assert is_remote(url)
        assert url.read_bytes() == file.read_bytes()
        server.shutdown()
    fsspec.filesystem("memory").put(str(file), f"/{file}")
    with open_source(f"memory://{file}") as there, open_source(file) as here:
        assert there.fingerprint == here.fingerprint
    assert as_path("s3://bucket/slide.svs", anon=True).name == "slide.svs"


def scan() -> None:
    """Segment volumes of three formats; compare with the voxels."""
    import nibabel
    import nrrd
    import numpy as np
    from scans import blobs, classify, scan_bundle, write_series

    voxels, spacing = blobs((40, 36, 34)), (1.0, 1.0, 1.0)
    Path("scans").mkdir()
    write_series(Path("scans/dicom"), voxels // 2, spacing=spacing, seed=0)
    nibabel.save(nibabel.Nifti1Image(voxels.T, np.eye(4)), "scans/nifti.nii.gz")
    nrrd.write("scans/nrrd.nrrd", voxels.T, {"space": "RAS", "space directions": np.eye(3)})
    scan_bundle(Path("brain"), keys="scale = [0, 1000]")
    say("segment", "scans", "--model", "brain", "--output", "masks")
    for name in ("nifti", "nrrd"):
        mask = np.asarray(nibabel.load(f"masks/{name}/mask.nii.gz").dataobj)
        assert (classify(voxels / 1000) == mask.T).all(), name
    assert Path("masks/dicom/mask.dcm").is_file()


def train(pixels: Any, truth: Any) -> None:
    """Train two steps on two pictures."""
    from PIL import Image

    Path("pictures").mkdir()
    recipe = RECIPE
    for name, (y, x) in {"A": (150, 250), "B": (1330, 2020)}.items():
        cut = (slice(y, y + 160), slice(x, x + 160))
        Image.fromarray(pixels[cut]).save(f"pictures/{name}.png")
        Image.fromarray(truth[cut].astype("u1")).save(f"pictures/{name}_mask.png")
        recipe += DATA.replace("NAME", name)
    Path("recipe.toml").write_text(recipe)
    say("train", "recipe.toml", "--data", "pictures", "--output", "trained", "--folds", "none")


if __name__ == "__main__":
    use() if sys.argv[1:] == ["use"] else main()
