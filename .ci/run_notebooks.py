"""Execute every notebook from top to bottom; fail where a cell fails or outputs were committed."""

import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Run the notebooks in a temporary folder."""
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        kept = [c for c in notebook.cells if c.cell_type == "code" and c.outputs]
        if kept:
            sys.exit(f"{path.name}: outputs are committed; clear them")
        with tempfile.TemporaryDirectory() as folder:
            resources = {"metadata": {"path": folder}}
            NotebookClient(notebook, timeout=600, resources=resources).execute()
        print(f"{path.name}: {len(notebook.cells)} cells run")


if __name__ == "__main__":
    main()
