"""Folders of whole-slide images in, full-resolution tissue masks and QuPath polygons out.

The public names are those of `__init__.pyi`. Each is imported when it is first used, so that
importing the package, and the command line's --help, need no torch.
"""

from __future__ import annotations

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
