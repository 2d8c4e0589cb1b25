"""Build the wheels, look what they put into site-packages, and use them from an empty place."""

import shutil
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SMOKE = """
import sys
from pathlib import Path
import numpy as np, tifffile, torch

class Pointwise(torch.nn.Module):
    def forward(self, x):
        return (0.7 - x[:, 1:2]) * 50

folder = Path("model")
folder.mkdir()
torch.jit.trace(Pointwise(), torch.rand(1, 3, 256, 256)).save(folder / "program.pt")
(folder / "model.toml").write_text('''
name = "smoke"
modality = "slide"
network = "torchscript"
weights = "program.pt"
[input]
mpp = 0.5
patch_size = [256, 256]
overlap = [32, 32]
mean = [0.0, 0.0, 0.0]
std = [1.0, 1.0, 1.0]
[output]
activation = "sigmoid"
classes = [ { name = "Background" }, { name = "Tumor", color = [200, 0, 0] } ]
''')
pixels = np.full((700, 900, 3), 245, np.uint8)
pixels[200:500, 300:700] = (190, 90, 150)
tifffile.imwrite("slide.tif", pixels, tile=(256, 256), photometric="rgb",
                 resolution=(20000, 20000), resolutionunit="CENTIMETER")
"""


def run(*command: object, **options: object) -> None:
    """Run a command that must succeed."""
    subprocess.run([str(part) for part in command], check=True, **options)


def main() -> None:
    """Check the wheel."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        # of the sdist, so that what that lacks is found
        run(sys.executable, "-m", "build", "--outdir", place, ROOT, stdout=-3)
        (wheel,) = place.glob("*.whl")
        # of a copy: setuptools would leave its own things among the bundles
        shutil.copytree(ROOT / "models", place / "models")
        run(sys.executable, "-m", "build", "--wheel", "--outdir", place / "data", place / "models",
            stdout=-3)  # fmt: skip
        (models,) = (place / "data").glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            files = archive.namelist()
        top = {path.split("/")[0] for path in files}
        info = f"{'-'.join(wheel.name.split('-')[:2])}.dist-info"
        if top != {"wsi_pipeline", info}:
            sys.exit(f"the wheel holds {sorted(top)}; expected wsi_pipeline and {info} only")
        for file in ("py.typed", "__init__.pyi", "viewer/static/index.html"):
            if f"wsi_pipeline/{file}" not in files:
                sys.exit(f"the wheel lacks {file}")
        venv.create(place / "env", with_pip=True)
        python = place / "env" / "bin" / "python"
        # the same torch as here: what pip would choose by itself may be gigabytes of CUDA
        torch = subprocess.run(
            [sys.executable, "-c", "import importlib.metadata as m; print(m.version('torch'))"],
            check=True, capture_output=True, text=True,
        ).stdout.strip()  # fmt: skip
        run(python, "-m", "pip", "install", "-q", f"torch=={torch.split('+')[0]}")
        run(python, "-m", "pip", "install", "-q", wheel, models)
        command = place / "env" / "bin" / "wsi-pipeline"
        work = place / "work"
        work.mkdir()
        run(command, "--help", cwd=work, stdout=subprocess.DEVNULL)
        run(python, "-c", SMOKE, cwd=work)
        run(command, "-q", "segment", "slide.tif", "--model", "model", "--output", "out", cwd=work)
        line = ("segment", "slide.tif", "--model", "lightmuseg-bcss-demo", "--output", "demo")
        run(command, "-q", *line, cwd=work)
        made = sorted(path.name for path in (work / "out" / "slide").iterdir())
        print(
            f"{wheel.name}: {len(files)} files, top level {sorted(top)}; "
            f"{models.name}; smoke run made {made}"
        )


if __name__ == "__main__":
    main()
