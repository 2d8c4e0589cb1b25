"""Write the JSON Schemas in docs/schemas/ as the code has them: make docs."""

from __future__ import annotations

import json
from pathlib import Path

from wsi_pipeline.bundle import ModelToml
from wsi_pipeline.files.schema import schema_of
from wsi_pipeline.report.record import Run

FOLDER = Path(__file__).parents[1] / "docs" / "schemas"
RECORDS = {"model.json": ModelToml, "run.json": Run}


def written() -> dict[str, str]:
    """Return what each file is to hold, by its name."""
    return {
        name: json.dumps(schema_of(kind), indent=2, ensure_ascii=False) + "\n"
        for name, kind in RECORDS.items()
    }


if __name__ == "__main__":
    for name, text in written().items():
        (FOLDER / name).write_text(text, "utf-8")
