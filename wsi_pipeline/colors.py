"""Colours of classes that QuPath knows by name."""

from __future__ import annotations

from collections.abc import Mapping

RGB = tuple[int, int, int]

QUPATH_COLORS: Mapping[str, RGB] = {
    "Tumor": (200, 0, 0),
    "Stroma": (150, 200, 150),
    "Immune cells": (160, 90, 160),
    "Necrosis": (50, 50, 50),
    "Other": (255, 200, 0),
    "Region*": (0, 0, 180),
    "Ignore*": (180, 180, 180),
    "Positive": (200, 50, 50),
    "Negative": (90, 90, 180),
}
"""Classes that a fresh QuPath knows; a file cannot change their colours."""
COLORS: tuple[RGB, ...] = (
    (230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0),
    (204, 121, 167),
)  # fmt: skip
"""Of classes whose colour nobody says; Okabe and Ito's, told apart by everyone."""
