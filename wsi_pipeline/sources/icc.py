"""The colours of a slide brought to sRGB by the ICC profile that its file holds."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.ImageCms import Flags, Intent, PyCMSError, buildTransform, createProfile, getOpenProfile

from wsi_pipeline.errors import SourceError
from wsi_pipeline.sources.base import Backend, Pixels, WrappedBackend, one_line

SAME = 1
"""Grey values by which a profile may change colours and be sRGB: those of curves in tables."""


class Profile:
    """An ICC profile of 8-bit RGB.

    Attributes:
        name: what it calls itself.
        is_srgb: whether it is sRGB, whatever its name: it changes no colour.

    Raises:
        ValueError: it cannot be used; the message says why.
    """

    def __init__(self, data: bytes) -> None:
        try:
            own = getOpenProfile(BytesIO(data))
            if (space := own.profile.xcolor_space.strip()) != "RGB":
                raise ValueError(f"it is of {space} colours; expected RGB")
            # Colours that sRGB has stay what they are, and paper white is white. Several threads
            # share the transform: what it would keep between two calls is switched off.
            how = Intent.RELATIVE_COLORIMETRIC, Flags.NOCACHE
            self._transform = buildTransform(own, createProfile("sRGB"), "RGB", "RGB", *how)
        except (PyCMSError, OSError) as error:
            raise ValueError(f"it is damaged: {one_line(error)}") from error
        self.name = " ".join((own.profile.profile_description or "").split()) or "without a name"
        colours = np.moveaxis(15 * np.indices((18, 18, 18), np.uint8), 0, -1).reshape(18, -1, 3)
        change = self.to_srgb(colours).astype(np.int16) - colours
        self.is_srgb = int(np.abs(change).max()) <= SAME

    def to_srgb(self, pixels: Pixels) -> Pixels:
        """Return uint8 (h, w, 3) in sRGB; several threads may call it at once."""
        return np.array(self._transform.apply(Image.fromarray(pixels)))


class SrgbBackend(WrappedBackend):
    """A backend whose pixels are brought to sRGB."""

    def __init__(self, backend: Backend, profile: Profile) -> None:
        super().__init__(backend)
        self._to_srgb = profile.to_srgb
        # What a tile that was never written looks like from now on.
        self.blank = self._to_srgb(np.full((1, 1, 3), self.blank, np.uint8))[0, 0]

    def read_level(self, level: int, x: int, y: int, width: int, height: int) -> Pixels:
        """See `Backend`."""
        return self._to_srgb(self._backend.read_level(level, x, y, width, height))


def profile_of(backend: Backend) -> bytes:
    """Return the ICC profile of a backend's file, b"" where there is none."""
    # Those of formats that have none cannot be asked.
    return getattr(backend, "icc_profile", bytes)()


def in_srgb(backend: Backend, path: Path) -> Backend:
    """Return a backend in sRGB: itself, with a doubt, where its profile changes nothing.

    Raises:
        SourceError: a profile that cannot be used.
    """
    if not (data := profile_of(backend)):
        why = "it has no ICC profile"
    else:
        try:
            profile = Profile(data)
        except ValueError as error:
            raise SourceError(
                f"{path}: its ICC profile cannot be used, {error}; --icc ignore takes the colours "
                "as they are stored"
            ) from error
        if not profile.is_srgb:
            return SrgbBackend(backend, profile)
        why = f"its ICC profile ({profile.name}) is sRGB already"
    backend.doubts += (f"{why}: --icc apply changes nothing, and colours are as stored",)
    return backend
