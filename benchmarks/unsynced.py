"""`wsi-pipeline` as it would be if it never asked the disk to keep anything."""

from __future__ import annotations

import os

from wsi_pipeline.cli import main

if __name__ == "__main__":
    os.fsync = lambda descriptor: None  # type: ignore[assignment]
    main()
