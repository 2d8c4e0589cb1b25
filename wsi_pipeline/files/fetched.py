"""Bundles behind https:// and hf://, fetched into the user's cache and found there if offline.

Each is kept under what pins it: the sha256 of an archive or `model.toml`, or the commit of a
repository. What a location without a pin stood for when it was last asked is noted beside it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import lzma
import posixpath
import re
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, unquote, urldefrag, urljoin, urlsplit

from wsi_pipeline.errors import BundleError, without_secrets
from wsi_pipeline.files.atomic import beside, remove, sha256_of, written_beside
from wsi_pipeline.files.download import MOST_WEIGHTS, fetch_file
from wsi_pipeline.files.locks import claimed, writing
from wsi_pipeline.files.models import MODEL_TOML, ORIGIN, gather
from wsi_pipeline.files.paths import cache_dir
from wsi_pipeline.files.remote import write_whole
from wsi_pipeline.files.schema import MOST_TOML

logger = logging.getLogger(__name__)

WAIT = 3600
"""Seconds that another process may take to fetch the same."""
HUB = re.compile(r"hf://([^/@]+/[^/@]+)(?:@([^/]+))?(?:/(.+?))??(?:/model\.toml)?/?")
"""Repository, revision and folder of a bundle."""
DAMAGED = (zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, EOFError,
           NotImplementedError, RuntimeError)  # fmt: skip
"""What readers of archives raise; the last two of encryption and of methods that they lack."""


class Found(NamedTuple):
    """A bundle elsewhere: what pins it, what is told of it, and how its files are got."""

    pinned: str
    origin: dict[str, str]
    stamp: str
    get: Callable[[str, Path], object]


def fetched_model(location: str) -> Path:
    """Fetch a bundle unless its copy here is the same or all there is; return its `model.toml`.

    Args:
        location: URL of a `model.toml`, of its folder with "/" behind or of an archive, with
            `#sha256=…` where it is to be this and no other; or `hf://owner/name[@revision][/file]`.

    Raises:
        BundleError: it cannot be fetched, or is no bundle.
    """
    home = cache_dir() / "fetched"
    if hub := location.startswith("hf://"):
        if not (parts := HUB.fullmatch(location)):
            raise BundleError(f"{location}: expected hf://owner/name[@revision][/file]")
        repository, revision, folder = parts[1], unquote(parts[2] or "main"), parts[3] or ""
        location = _hub_url(repository, revision, folder)
    # Pinned by who asks, it cannot have changed.
    if (toml := home / _key(location) / MODEL_TOML).is_file():
        return toml
    scratch, note = beside(toml.parent, "partial"), home / f"{_key(location)}.txt"
    with claimed(toml.parent, timeout=WAIT), writing(home), ExitStack() as stack:
        name, _, stamp = note.read_text("utf-8").partition("\n") if note.is_file() else ("",) * 3
        known = home / name / MODEL_TOML
        is_known = bool(name) and known.is_file()
        scratch.mkdir()
        stack.callback(remove, scratch)
        try:
            found = (
                _on_hub(repository, revision, folder, scratch)
                if hub
                else _on_web(location, scratch, stamp if is_known else "", stack)
            )
            if found is None:
                return known
            here = home / _key(found.pinned)
            if not here.is_dir():
                with written_beside(here) as made:
                    gather(found.get, made)
                    (made / ORIGIN).write_text(json.dumps(found.origin), "utf-8")
            write_whole(note, f"{here.name}\n{found.stamp}".encode())
            return here / MODEL_TOML
        except (BundleError, FileNotFoundError) as error:
            if not is_known:
                raise BundleError(str(error)) from error
            logger.warning("%s; going on with what was fetched before", error)
            return known


def _key(location: str) -> str:
    # Not the location itself: it may hold secrets.
    return hashlib.sha256(location.encode()).hexdigest()[:32]


def _on_web(location: str, scratch: Path, stamp: str, stack: ExitStack) -> Found | None:
    """Fetch what is behind a URL; None = it is still what was there at that stamp."""
    url, fragment = urldefrag(location)
    wanted = fragment.removeprefix("sha256=").lower()
    if fragment and not re.fullmatch("[0-9a-f]{64}", wanted):
        raise BundleError(f"{url}: #{fragment}; expected #sha256= and 64 hex digits")
    path = urlsplit(url).path
    if path.endswith("/"):
        url = urljoin(url, MODEL_TOML)
    is_toml, whole = path.endswith((".toml", "/")), scratch / "whole"
    now = fetch_file(url, whole, most=MOST_TOML if is_toml else MOST_WEIGHTS, unless=stamp)
    if not whole.is_file():
        return None
    found = sha256_of(whole)
    if wanted and found != wanted:
        raise BundleError(f"{url} has sha256 {found}, expected {wanted}")
    is_archive = not is_toml and (zipfile.is_zipfile(whole) or tarfile.is_tarfile(whole))

    def get(name: str, target: Path) -> object:
        if name == MODEL_TOML:
            return shutil.copyfile(whole, target)
        return fetch_file(urljoin(url, quote(name)), target)

    return Found(
        pinned=f"{urldefrag(location).url}#sha256={found}",
        origin={"url": without_secrets(url), "sha256": found},
        stamp=now,
        get=_members(whole, url, stack) if is_archive else get,
    )


def _members(path: Path, url: str, stack: ExitStack) -> Callable[[str, Path], object]:
    """Return what copies a file of the bundle in an archive; other members are left alone."""
    opened: dict[str, tuple[int, Callable[[], Any]]] = {}
    total = 0
    try:
        if zipfile.is_zipfile(path):
            archive = stack.enter_context(zipfile.ZipFile(path))
            for info in archive.infolist():
                opened[info.filename] = info.file_size, partial(archive.open, info)
        else:
            tar = stack.enter_context(tarfile.open(path))  # noqa: SIM115
            for member in tar:
                # The next one is found by reading this one through.
                if (total := total + member.size) > MOST_WEIGHTS:
                    raise BundleError(f"{url} unpacks to more than {MOST_WEIGHTS >> 20:,} MB")
                if member.isfile():
                    opened[member.name] = member.size, partial(tar.extractfile, member)
    except DAMAGED as error:
        raise BundleError(f"{url} is a damaged archive: {error}") from error
    files = {posixpath.normpath(name): found for name, found in opened.items()}
    tops = [posixpath.dirname(n) for n in files if posixpath.basename(n) == MODEL_TOML]
    tops = [top for top in tops if top.count("/") == min(t.count("/") for t in tops)]
    if len(tops) != 1:
        raise BundleError(f"{url} has {len(tops)} bundles; expected one folder with a {MODEL_TOML}")

    def get(name: str, target: Path) -> None:
        size, stream = files.get(posixpath.normpath(posixpath.join(tops[0], name)), (0, None))
        if stream is None:
            raise FileNotFoundError(f"{url} holds no {name}")
        if size > MOST_WEIGHTS:
            raise BundleError(f"{name} of {url} has more than {MOST_WEIGHTS >> 20:,} MB")
        try:
            with stream() as source, target.open("wb") as copy:
                shutil.copyfileobj(source, copy)
        except DAMAGED as error:
            raise BundleError(f"{name} of {url} cannot be unpacked: {error}") from error

    return get


def _hub_url(repository: str, revision: str, folder: str) -> str:
    return f"hf://{repository}@{quote(revision, safe='')}{folder and '/'}{folder}"


def _on_hub(repository: str, revision: str, folder: str, scratch: Path) -> Found:
    """Ask for the commit of a revision, and what it holds."""
    location = _hub_url(repository, revision, folder)
    try:
        from huggingface_hub import HfApi, hf_hub_download
    except ImportError:
        raise BundleError(f'{location} needs pip install "wsi-pipeline[hub]"') from None
    try:
        info = HfApi().model_info(repository, revision=revision, files_metadata=True)
    # Its client raises errors of several packages.
    except Exception as error:
        raise BundleError(f"cannot fetch {location}: {' '.join(str(error).split())}") from error
    files = {file.rfilename: file for file in info.siblings or ()}

    def get(name: str, target: Path) -> None:
        path = posixpath.normpath(posixpath.join(folder, name))
        if path not in files:
            raise FileNotFoundError(f"{location} holds no {path}")
        if (files[path].size or 0) > MOST_WEIGHTS:
            raise BundleError(f"{path} of {location} has more than {MOST_WEIGHTS >> 20:,} MB")
        try:
            came = hf_hub_download(repository, path, revision=info.sha, local_dir=scratch)
        except Exception as error:
            raise BundleError(f"cannot fetch {path} of {location}: {error}") from error
        lfs = files[path].lfs
        if lfs and lfs.sha256 != sha256_of(Path(came)):
            raise BundleError(f"{path} of {location} is not what the repository says; try again")
        shutil.move(came, target)

    pinned = _hub_url(repository, info.sha or revision, folder)
    return Found(pinned=pinned, origin={"url": pinned}, stamp="", get=get)
