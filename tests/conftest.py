"""Fixtures that every test may use: the real data where there is some, and synthetic slides."""

from __future__ import annotations

import importlib.util
import json
import os

# Each of xdist's workers has a core: more threads of OpenMP would take turns with the others', and
# spin while they wait. Before torch is imported.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import ModuleType

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, settings

# The same examples each time; `--hypothesis-profile default` looks for new ones.
settings.register_profile(
    "same", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("same")

ROOT = Path(__file__).parents[1]
SLIDE_SIZE = (1931, 1487)
"""Width and height of `slide_path`: multiples of nothing."""
SLIDE_MPP = 0.25


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Return a report that can be sent: halves of surrogate pairs have no UTF-8."""
    report = yield
    report.sections = [
        (name, text.encode("utf-8", "backslashreplace").decode()) for name, text in report.sections
    ]
    return report


def _load(path: Path) -> ModuleType:
    """Import a file that belongs to no package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def least_room() -> Callable[[int], AbstractContextManager[None]]:
    """Return `least_room(size)`: no file may grow beyond as many bytes, as on a full disk."""
    resource = pytest.importorskip("resource")

    @contextmanager
    def limited(size: int) -> Iterator[None]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limited


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Return the folder of real data; its files are never copied into the repository."""
    path = Path(os.environ.get("WSI_PIPELINE_TEST_DATA") or ROOT.parent / "shared" / "data")
    if not path.is_dir():
        pytest.skip(f"no real data: WSI_PIPELINE_TEST_DATA is not set and {path} does not exist")
    return path


@pytest.fixture(scope="session")
def cmu_path(data_dir: Path) -> Path:
    """Return the real H&E slide: Aperio SVS, 2220 × 2967, one level, 0.499 µm/px."""
    path = data_dir / "wsi" / "svs" / "CMU-1-Small-Region.svs"
    if not path.is_file():
        pytest.skip(f"no {path.name} in the real data")
    return path


@pytest.fixture(scope="session")
def make_slide() -> Callable[..., Path]:
    """Return `make_slide(path, pixels, mpp, *, levels, compression, tile)`, which writes a TIFF."""
    write: Callable[..., Path] = _load(ROOT / "benchmarks" / "make_slide.py").write_slide
    return write


@pytest.fixture(scope="session")
def make_big_slide() -> Callable[..., Path]:
    """Return `make_big_slide(path, (w, h), mpp, *, levels)`: JPEG, half of it tissue, quick."""
    write: Callable[..., Path] = _load(ROOT / "benchmarks" / "make_slide.py").write_big_slide
    return write


@pytest.fixture(scope="session")
def slide_pixels() -> npt.NDArray[np.uint8]:
    """Return level 0 of `slide_path`, uint8 (h, w, 3): shapes in the colours of H&E on white."""
    width, height = SLIDE_SIZE
    y, x = np.ogrid[:height, :width]
    pixels = np.full((height, width, 3), (245, 243, 246), dtype=np.int16)
    shapes = [  # painted in this order
        ((x - 700) ** 2 / 560**2 + (y - 760) ** 2 / 590**2 < 1, (228, 168, 200)),  # stroma
        ((x - 560) ** 2 / 260**2 + (y - 620) ** 2 / 310**2 < 1, (150, 92, 160)),  # tumour
        ((x - 520) ** 2 + (y - 600) ** 2 < 90**2, (244, 240, 244)),  # a hole in it
        ((abs(x - 930) < 130) & (abs(y - 1030) < 95), (190, 60, 90)),  # blood
        ((abs(x - 1600) < 187) & (abs(y - 400 - (x - 1600) // 3) < 211), (205, 140, 185)),
    ]
    for inside, colour in shapes:
        pixels[inside] = colour
    noise = np.random.default_rng(0).integers(-6, 7, size=(height, width, 1))
    return np.clip(pixels + noise, 0, 255).astype(np.uint8)


@pytest.fixture(scope="session")
def slide_path(
    tmp_path_factory: pytest.TempPathFactory,
    slide_pixels: npt.NDArray[np.uint8],
    make_slide: Callable[..., Path],
) -> Path:
    """Return a lossless tiled TIFF of two levels, 1931 × 1487, 0.25 µm/px by resolution tags."""
    path = tmp_path_factory.mktemp("slide") / "synthetic slide.tif"
    return make_slide(path, slide_pixels, SLIDE_MPP, levels=(1, 4))


@pytest.fixture(scope="session")
def bounded(tmp_path_factory: pytest.TempPathFactory, slide_path: Path) -> Path:
    """Return a stored grid of `slide_path` that says, as MRXS slides do, that it was cropped."""
    from wsi_pipeline.options import SelectOptions
    from wsi_pipeline.run.tile import tile

    grid = tmp_path_factory.mktemp("bounded") / "bounded.zarr"
    everywhere = SelectOptions(tissue="none")
    tile(slide_path, grid, mpp=SLIDE_MPP, patch_size=256, overlap=0, select=everywhere)
    meta = json.loads((grid / "zarr.json").read_text("utf-8"))
    meta["attributes"]["bounds"] = {"x": 301, "y": 257, "width": 1200, "height": 1000}
    (grid / "zarr.json").write_text(json.dumps(meta), "utf-8")
    return grid


@pytest.fixture(scope="session")  # clients of S3 are kept, with the address that they began with
def bucket() -> Iterator[str]:
    """Serve S3 on loopback; yield its address as http. There is a public bucket, `slides`."""
    boto3, server = pytest.importorskip("boto3"), pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    served = server.ThreadedMotoServer("127.0.0.1", 0)
    served.start()
    host, port = served.get_host_and_port()
    names = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in names.items():
            patch.setenv(name, value)
        client = boto3.client("s3")
        client.create_bucket(Bucket="slides", ACL="public-read")
        client.close()
        yield names["AWS_ENDPOINT_URL"]
    served.stop()
