"""Segment a slide with TIAToolbox's `SemanticSegmentor`; started by run.py, in its own environment:

python3.11 -m venv tia && tia/bin/pip install tiatoolbox==2.1.3
tia/bin/python benchmarks/peers/tiatoolbox_run.py slide.svs program.pt out --tissue tissue.png

Batches of 8, no loader workers, probabilities merged at the slide's resolution, classes to zarr.
Patches of 512 px side by side. `program.pt` is TorchScript that run.py writes; it takes pixels
from 0 to 255 and gives probabilities. The last line of the output is a JSON object.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path

import numpy as np
import torch
import zarr
from tiatoolbox.models.engine.io_config import IOSegmentorConfig
from tiatoolbox.models.engine.semantic_segmentor import SemanticSegmentor
from tiatoolbox.models.models_abc import ModelABC


class Model(ModelABC):
    """A TorchScript program as TIAToolbox wants models.

    Args:
        path: of the program.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.program = torch.jit.load(path).eval()

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return probabilities, (N, C, H, W)."""
        return self.program(pixels)

    @staticmethod
    def infer_batch(model: Model, batch_data: torch.Tensor, *, device: str) -> np.ndarray:
        """Return the probabilities of a batch (N, H, W, 3), as (N, H, W, C)."""
        with torch.inference_mode():
            pixels = batch_data.to(device=device, dtype=torch.float32).permute(0, 3, 1, 2)
            return model(pixels).permute(0, 2, 3, 1).cpu().numpy()

    @staticmethod
    def postproc(image: np.ndarray) -> np.ndarray:
        """Return the class of each pixel, as TIAToolbox's own models do."""
        return image.argmax(axis=-1)


def main() -> None:
    parser = argparse.ArgumentParser(description="Run TIAToolbox on a slide.")
    parser.add_argument("slide", type=Path)
    parser.add_argument("program", type=Path)
    parser.add_argument("output", type=Path, help="folder; emptied first")
    parser.add_argument(
        "--tissue", type=Path, help="mask image; without it TIAToolbox looks itself"
    )
    parser.add_argument("--mpp", type=float, default=0.5)
    parser.add_argument("--patch", type=int, default=512)
    args = parser.parse_args()
    shutil.rmtree(args.output, ignore_errors=True)
    resolution = [{"units": "mpp", "resolution": args.mpp}]
    size = (args.patch, args.patch)
    begun = time.perf_counter()
    engine = SemanticSegmentor(Model(args.program), batch_size=8, num_workers=0, verbose=False)
    results = engine.run(
        [args.slide],
        masks=[args.tissue] if args.tissue else None,
        patch_mode=False,
        ioconfig=IOSegmentorConfig(
            input_resolutions=resolution,
            output_resolutions=resolution,
            save_resolution=resolution[0],
            patch_input_shape=size,
            patch_output_shape=size,
            stride_shape=size,
        ),
        save_dir=args.output,
        output_type="zarr",
        device="cpu",
        auto_get_mask=True,
    )
    seconds = time.perf_counter() - begun
    (path,) = results.values()
    mask = zarr.open(str(path), mode="r")
    facts = {
        "job_seconds": seconds,
        "patches": mask["coordinates"].shape[0],
        "mask": f"{path}/predictions",
        "shape": mask["predictions"].shape,
    }
    print(json.dumps(facts, default=str))


if __name__ == "__main__":
    main()
