"""Segment a slide with FAST; started by run.py, in its own environment:

python3.11 -m venv fast && fast/bin/pip install pyfast==4.18.0
apt-get install libgl1 libegl1 libopengl0 libglu1-mesa libusb-1.0-0 pocl-opencl-icd
fast/bin/python benchmarks/peers/fast_run.py slide.svs program.onnx out.tif

The whole slide in patches of 512 px side by side, on the OpenVINO engine, stitched, written as a
pyramidal TIFF; no tissue mask, since FAST's own wants a download. `program.onnx` is written by
run.py; it takes pixels from 0 to 255 and gives probabilities. The last line of the output is a
JSON object.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import fast


def main() -> None:
    parser = argparse.ArgumentParser(description="Run FAST on a slide.")
    parser.add_argument("slide", type=Path)
    parser.add_argument("program", type=Path)
    parser.add_argument("output", type=Path, help="TIFF to write")
    parser.add_argument("--patch", type=int, default=512)
    args = parser.parse_args()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.unlink(missing_ok=True)
    begun = time.perf_counter()
    slide = fast.WholeSlideImageImporter.create(str(args.slide))
    patches = fast.PatchGenerator.create(args.patch, args.patch, level=0).connect(slide)
    # threshold 0: the class is the most probable one, however unsure
    network = fast.SegmentationNetwork.create(
        str(args.program), threshold=0.0, inferenceEngine="OpenVINO"
    ).connect(patches)
    mask = fast.PatchStitcher.create(forceImagePyramidOutput=True).connect(network)
    finished = fast.RunUntilFinished.create().connect(mask)
    fast.TIFFImagePyramidExporter.create(str(args.output)).connect(finished).run()
    print()  # the progress bar leaves its line open
    print(json.dumps({"job_seconds": time.perf_counter() - begun, "mask": str(args.output)}))


if __name__ == "__main__":
    main()
