"""Finished runs in the browser: a local server of tiles, and the page that shows them."""

from __future__ import annotations

from wsi_pipeline.viewer.server import Viewer, serve

__all__ = ["Viewer", "serve"]
