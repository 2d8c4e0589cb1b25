"""DICOMweb (PS3.18): series are found by QIDO, frames read by WADO, files sent by STOW."""

from __future__ import annotations

import json
import logging
import netrc
import os
import re
from base64 import b64encode
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from email.message import Message
from functools import partial
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urljoin, urlsplit

import msgspec

from wsi_pipeline.errors import SourceError, StoreError, UnreachableError, UsageError, raised_as

ADDRESS = re.compile(
    r"dicomweb(\+https?)?://((?:\[[\da-f:]+\]|[^\s/?#@:[\]]+)(?::\d+)?(?:/(?!(?:studies|series)(?:[/?]|$))[^\s/?#]+)*)"
    r"(/studies/[\d.]+(?:/series/[\d.]+)?)?(?:/studies|/series)?/?(\?[^\s#]*)?"
)
TOKEN = "WSI_PIPELINE_DICOMWEB_TOKEN"
"""Variable that holds the bearer token for a server."""
AS_STORED: tuple[str, ...] = (
    'multipart/related; type="application/octet-stream"; transfer-syntax=*',
    'multipart/related; type="image/jpeg"; transfer-syntax=1.2.840.10008.1.2.4.50, '
    'multipart/related; type="image/jp2"; transfer-syntax=1.2.840.10008.1.2.4.90, '
    'multipart/related; type="image/jp2"; transfer-syntax=1.2.840.10008.1.2.4.91',
    "*/*",
)
"""What servers are asked for, one after the other until one is served."""
PAGE, AT_ONCE, PATIENCE = 200, 16, 60
"""Series in an answer, requests that are under way at a time, and seconds to wait for each."""
MOST_JSON, MOST_SERIES, TRIES = 1 << 29, 100_000, 4
"""Bytes of metadata, series that a server finds, and how often an answer may break off."""
Attribute = dict[str, list[Any] | str | None]
"""What DICOM's JSON says of a tag."""
BUSY = (429, 502, 503, 504)
"""Statuses of servers that have something else to do."""


@dataclass(frozen=True)
class DicomWeb:
    """An address in place of a path: URL of the root, study or series behind it, query."""

    url: str
    where: str
    query: str

    def __str__(self) -> str:
        scheme = "dicomweb" if self.url.startswith("https:") else "dicomweb+http"
        return f"{scheme}:{self.url.partition(':')[2]}{self.where}{self.query}"

    @property
    def name(self) -> str:
        """Return what a file of it would be called: the dots of identifiers begin no suffix."""
        return f"{self.where.rpartition('/')[2]}.dcm"

    def absolute(self) -> DicomWeb:
        """Return itself, which is its own parent, too."""
        return self

    parent = property(absolute)

    def __getattr__(self, name: str) -> NoReturn:
        """Refuse to be a folder or file."""
        if name.startswith("_"):
            raise AttributeError(name)
        raise StoreError(f"{self}: a DICOMweb server holds no folders and files; name a folder")

    __truediv__ = __getattr__


def read_address(text: str) -> DicomWeb:
    """Return the address that a text is.

    Raises:
        UsageError: it is none.
    """
    if not (found := ADDRESS.fullmatch(text)):
        raise UsageError(
            f"{text}: no address of DICOMweb; expected dicomweb://HOST/ROOT or dicomweb+http://…, "
            f"with /studies/UID, /series/UID or ?QUERY; {TOKEN} or ~/.netrc say who asks"
        )
    security, root, where, query = found.groups(default="")
    return DicomWeb(f"{security[1:] or 'https'}://{root}", where, query)


class Client:
    """Connections to a server; several threads may ask at once.

    Raises:
        SourceError: by all methods, where the server does not have what is asked for.
        UnreachableError: where it does not answer, or lets nobody in.
        UsageError: on creation, of a token or proxy that cannot be used.
    """

    def __init__(self, address: DicomWeb) -> None:
        from urllib.request import getproxies, proxy_bypass

        from urllib3 import PoolManager, ProxyManager, Retry, Timeout

        # It logs addresses, whose queries may name a patient.
        logging.getLogger("urllib3").setLevel(logging.ERROR)
        self._url, parts = address.url, urlsplit(address.url)
        self._host, self._accepts, headers = parts.hostname or "", AS_STORED, dict[str, str]()
        if token := os.environ.get(TOKEN, "").strip():
            if not re.fullmatch(r"[!-~]+", token):
                raise UsageError(f"{TOKEN} has spaces, or letters that no token has; set it anew")
            headers["Authorization"] = f"Bearer {token}"
        with suppress(OSError, UnicodeDecodeError, netrc.NetrcParseError):
            user = netrc.netrc(os.environ.get("NETRC")).authenticators(self._host)
            if user and not token:
                told = b64encode(f"{user[0]}:{user[2]}".encode())
                headers["Authorization"] = f"Basic {told.decode()}"
        self._known = headers
        options: dict[str, Any] = {
            "maxsize": AT_ONCE,
            "timeout": Timeout(connect=PATIENCE / 4, read=PATIENCE),
            # About seven seconds, in which a server may start again.
            "retries": Retry(4, backoff_factor=0.5, status_forcelist=BUSY, raise_on_status=False),
        }
        proxy = None if proxy_bypass(self._host) else getproxies().get(parts.scheme)
        with raised_as(UsageError, ValueError, f"{parts.scheme}_proxy"):
            self._pool = ProxyManager(proxy, **options) if proxy else PoolManager(**options)

    def json(self, where: str) -> list[dict[str, Attribute]]:
        """Return the datasets that lie behind the root, in DICOM's JSON."""
        accept = {"Accept": "application/dicom+json"}
        *_, data = self._ask("GET", f"{self._url}{where}", MOST_JSON, headers=accept)
        try:
            return msgspec.convert(json.loads(data or b"[]"), list[dict[str, Attribute]])
        except (ValueError, RecursionError, msgspec.ValidationError):
            raise SourceError(
                f"{self._url} gives no JSON of DICOM; is the root right, as …/dicom-web is?"
            ) from None

    def data(self, where: str, uri: str, most: int) -> bytes:
        """Return bulk data as stored, `most` bytes or less, by URI: `frames/1` of an instance."""
        url = urljoin(f"{self._url}{where}/", uri)
        # Nobody else is told who asks.
        if urlsplit(url)[:2] != urlsplit(self._url)[:2]:
            raise SourceError(f"{self._url} refers to {url}, another server, which is not asked")
        for accept in self._accepts:
            asked = {"Accept": accept}
            status, kind, data = self._ask("GET", url, most, (400, 406, 415), headers=asked)
            if status == 200 and (parts := parts_of(kind, data)):
                # What is next can be had in the same way.
                self._accepts = (accept, *(a for a in self._accepts if a != accept))
                return parts[0]
        raise SourceError(f"it is not given as it is stored ({status}): {url}")

    def send(self, path: Path) -> bool:
        """Store a file of DICOM, piece by piece; return whether it was not there already.

        Raises:
            StoreError: the server has not stored it.
        """
        from pydicom import Dataset
        from pydicom.filereader import read_file_meta_info

        with raised_as(StoreError, Exception, f"{path} is no DICOM; remove it, and export again"):
            uid = str(read_file_meta_info(path).MediaStorageSOPInstanceUID)
        there = self.json(f"/instances?SOPInstanceUID={uid}")
        # Some servers tell of others, too.
        if any(uid in (each.get("00080018", {}).get("Value") or ()) for each in there):
            return False
        head = f"--{uid}\r\nContent-Type: application/dicom\r\n\r\n".encode()
        tail = f"\r\n--{uid}--\r\n".encode()

        def pieces() -> Iterator[bytes]:
            yield head
            with path.open("rb") as file:
                yield from iter(partial(file.read, 1 << 20), b"")
            yield tail

        headers = {
            "Accept": "application/dicom+json",
            "Content-Type": f'multipart/related; type="application/dicom"; boundary={uid}',
            "Content-Length": str(len(head) + path.stat().st_size + len(tail)),
        }
        url, codes = f"{self._url}/studies", list[str]()
        status, _, data = self._ask(
            "POST", url, MOST_JSON, (400, 409), headers=headers, body=pieces(), retries=False
        )
        # What servers say may be anything.
        with suppress(Exception):
            told = Dataset.from_json(json.loads(data))
            kept = told.get("ReferencedSOPSequence", [])
            if uid in [item.get("ReferencedSOPInstanceUID") for item in kept]:
                return True
            failed = told.get("FailedSOPSequence", [])
            codes += [f"reason {item.get('FailureReason') or 0:04X}" for item in failed]
        why = ", ".join(codes) or f"the server says {status}"
        raise StoreError(f"{path.name} (instance {uid}) is not stored at {url}: {why}")

    def _ask(
        self, method: str, url: str, most: int, let: tuple[int, ...] = (), **asked: Any
    ) -> tuple[int, str, bytes]:
        """Return status, type and body of an answer that is no error, or whose status may be."""
        from urllib3.exceptions import HTTPError, MaxRetryError

        goes_on = "; what is done is kept, and the same command goes on"
        asked["headers"] = self._known | asked["headers"]
        for left in reversed(range(TRIES if method == "GET" else 1)):
            data = bytearray()
            try:
                with self._pool.request(method, url, preload_content=False, **asked) as answer:
                    while len(data) <= most and (piece := answer.read(1 << 18)):
                        data += piece
                break
            except (HTTPError, OSError) as error:
                # What broke off is asked for again, what does not answer was several times.
                if left and not isinstance(error, MaxRetryError):
                    continue
                # What stands around the reason tells the query.
                reason = " ".join(str(getattr(error, "reason", None) or error).split())
                told = f"{self._url} cannot be reached: {reason}{goes_on}"
                raise UnreachableError(told) from None
        bare = url.partition("?")[0]
        if len(data) > most:
            raise SourceError(f"more than {most >> 10:,} KiB came; is the address right? {bare}")
        if (status := answer.status) < 400 or status in let:
            return status, answer.headers.get("Content-Type", ""), bytes(data)
        said = f"the server says {status} {answer.reason or ''} to {bare}"
        if status in (401, 403, 407):
            said += f"; set {TOKEN}, or name user and password for {self._host} in ~/.netrc"
        if status in (401, 403, 407, *BUSY):
            raise UnreachableError(f"{said}{goes_on}")
        raise SourceError(f"{said}; look whether the address is right")


def parts_of(kind: str, data: bytes) -> list[bytes]:
    """Return the parts of an answer in several, or its one body."""
    message = Message()
    message["Content-Type"] = kind
    if message.get_content_maintype() != "multipart":
        return [data] if data else []
    _, *pieces = (b"\r\n" + data).split(f"\r\n--{message.get_boundary('')}".encode())
    return [p.partition(b"\r\n\r\n")[2] for p in pieces if not p.startswith(b"--")]


def find_series(address: DicomWeb) -> list[DicomWeb]:
    """Return the series of slides that an address names, or that a server finds by its query.

    Raises:
        SourceError: the server cannot be searched; UnreachableError as `Client` has it.
    """
    if "/series/" in address.where:
        return [address]
    client, found, asked = Client(address), dict[str, bool](), -1
    while asked < len(found):
        # Of series of others, too, which some servers do not leave out.
        asked = len(found)
        query = f"{address.query or '?'}&Modality=SM&limit={PAGE}&offset={asked}"
        for entry in client.json(f"{address.where}/series{query.replace('?&', '?')}"):
            tags = ("0020000D", "0020000E", "00080060")
            study, series, kind = ((entry.get(t, {}).get("Value") or [""])[0] for t in tags)
            # Some servers do not say again what was asked for.
            where = f"{f'/studies/{study}' if study else address.where}/series/{series}"
            if not ADDRESS.fullmatch(f"dicomweb://h{where}") or len(found) > MOST_SERIES:
                told = f"no series of DICOM, {where!r}, or more than {MOST_SERIES:,}; name a study"
                raise SourceError(f"{address.url} lists {told}")
            found[where] = kind in ("SM", "")
    return [replace(address, where=name, query="") for name, is_slide in found.items() if is_slide]
