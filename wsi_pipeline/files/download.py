"""Files behind URLs, fetched once into the user's cache and checked."""

from __future__ import annotations

import http.client
import re
import urllib.parse
import urllib.request
from base64 import b64encode
from pathlib import Path

from wsi_pipeline.errors import BundleError
from wsi_pipeline.files.atomic import make_folders, sha256_of, written_beside
from wsi_pipeline.files.paths import cache_dir

MOST_WEIGHTS = 1 << 33
"""Bytes that are fetched: what nobody asked for is not to fill the disk."""
PATIENCE = 60
"""Seconds to wait for a server to go on."""


def download(url: str, sha256: str) -> Path:
    """Fetch a file once into the user's cache; return its path, checked.

    Args:
        sha256: The hex digest, or its first eight digits or more, as some file names have them.

    Raises:
        BundleError: it cannot be fetched, or is another file; then it is not kept.
    """
    if not re.fullmatch("[0-9a-fA-F]{8,64}", sha256):
        raise BundleError(f"sha256 {sha256!r} of {url}: expected 8 to 64 hex digits")
    target = cache_path(url, sha256)
    if not target.is_file():
        fetch_file(url, target)
    if not (found := sha256_of(target)).startswith(sha256.lower()):
        # What is kept is found by the wanted digest the next time, and not fetched again.
        target.unlink()
        raise BundleError(f"{url} has sha256 {found}, expected {sha256}")
    return target


def cache_path(url: str, sha256: str) -> Path:
    """Return where a fetched file is kept."""
    return cache_dir() / f"{sha256}{Path(urllib.parse.urlparse(url).path).suffix}"


def fetch_file(url: str, target: Path, *, most: int = MOST_WEIGHTS, unless: str = "") -> str:
    """Write what is behind a URL to a file of at most so many bytes; return its server's stamp.

    Args:
        unless: A stamp; where the server gives the same nothing is written. Some give none, "".
    """
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https", "file"):
        known = "https:// (of the Hub https://huggingface.co/…/resolve/…), http:// or file://"
        raise BundleError(f"{url} is not fetched; expected a URL of {known}")
    try:
        make_folders(target.parent)
        with written_beside(target) as partial:
            with urllib.request.urlopen(_request(parts), timeout=PATIENCE) as answer:
                announced = int(answer.headers.get("Content-Length") or 0)
                marks = [answer.headers.get(name) or "" for name in ("ETag", "Last-Modified")]
                stamp = f"{marks} {announced}" if any(marks) else ""
                if stamp and stamp == unless:
                    return stamp
                with partial.open("wb") as file:
                    while (size := file.tell()) <= most and (data := answer.read(1 << 20)):
                        file.write(data)
            if size > most or announced > most:
                raise BundleError(f"{url} has more than {most >> 20:,} MB; fetch it yourself")
            if size < announced:
                raise BundleError(
                    f"{url} broke off: {size:,} of {announced:,} bytes came; try again"
                )
    except (OSError, ValueError, http.client.HTTPException) as error:
        if isinstance(error, BundleError):
            raise
        reason = str(error)
        for secret in filter(None, (parts.password, parts.query)):
            # Some say a part of the URL only.
            reason = reason.replace(secret, "…")
        raise BundleError(f"cannot fetch {url}: {reason}") from error
    return stamp


def _request(parts: urllib.parse.SplitResult) -> urllib.request.Request:
    """Return what asks for a URL; its user and password are sent as servers want them."""
    bare = parts._replace(netloc=parts.netloc.rpartition("@")[2])
    request = urllib.request.Request(urllib.parse.urlunsplit(bare))
    if parts.username is not None:
        told = urllib.parse.unquote(f"{parts.username}:{parts.password or ''}").encode()
        # to nobody to whom the server sends us on
        request.add_unredirected_header("Authorization", f"Basic {b64encode(told).decode()}")
    return request
