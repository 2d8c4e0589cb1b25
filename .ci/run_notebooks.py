"""Execute every notebook from top to bottom; fail where a cell fails or outputs were committed."""

import os
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Run the notebooks in a temporary folder, on real data where the tests would find some."""
    data = ROOT.parent / "shared" / "data"
    if not os.environ.get("WSI_PIPELINE_TEST_DATA") and data.is_dir():
        os.environ["WSI_PIPELINE_TEST_DATA"] = str(data)
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        kept = [c for c in notebook.cells if c.cell_type == "code" and c.outputs]
        if kept:
            sys.exit(f"{path.name}: outputs are committed; clear them")
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            resources = {"metadata": {"path": folder}}
            NotebookClient(notebook, timeout=600, resources=resources).execute()
        took = time.monotonic() - began
        print(f"{path.name}: {len(notebook.cells)} cells run in {took:.0f} s", flush=True)


if __name__ == "__main__":
    main()
