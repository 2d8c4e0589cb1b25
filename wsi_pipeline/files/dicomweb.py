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
from typing import TYPE_CHECKING, Any, NoReturn
from urllib.parse import urljoin, urlsplit

from wsi_pipeline.errors import SourceError, StoreError, UnreachableError, UsageError

if TYPE_CHECKING:
    from urllib3 import BaseHTTPResponse

ADDRESS = re.compile(
    r"dicomweb(\+https?)?://([^\s/?#@]+(?:/(?!(?:studies|series)(?:[/?]|$))[^\s/?#]+)*)"
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
    """

    def __init__(self, address: DicomWeb) -> None:
        from urllib.request import getproxies, proxy_bypass

        from urllib3 import PoolManager, ProxyManager, Retry, Timeout

        # It logs addresses, whose queries may name a patient.
        logging.getLogger("urllib3").setLevel(logging.ERROR)
        self._url, parts = address.url, urlsplit(address.url)
        self._host, self._accepts, headers = parts.hostname or "", AS_STORED, dict[str, str]()
        if token := os.environ.get(TOKEN, "").strip():
            headers["Authorization"] = f"Bearer {token}"
        with suppress(OSError, netrc.NetrcParseError):
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
        self._pool = ProxyManager(proxy, **options) if proxy else PoolManager(**options)

    def json(self, where: str) -> list[dict[str, Any]]:
        """Return the datasets that lie behind the root, in DICOM's JSON."""
        answer = self._ask("GET", f"{self._url}{where}", {"Accept": "application/dicom+json"})
        try:
            return [dict(each) for each in json.loads(answer.data or b"[]")]
        except (TypeError, ValueError):
            raise SourceError(
                f"{self._url} gives no JSON of DICOM; is the root right, as …/dicom-web is?"
            ) from None

    def data(self, where: str, uri: str) -> bytes:
        """Return bulk data as they are stored, by their URI: `frames/1` is one from an instance."""
        url = urljoin(f"{self._url}{where}/", uri)
        # Nobody else is told who asks.
        if urlsplit(url)[:2] != urlsplit(self._url)[:2]:
            raise SourceError(f"{self._url} refers to {url}, another server, which is not asked")
        for accept in self._accepts:
            answer = self._ask("GET", url, {"Accept": accept}, let=(400, 406, 415))
            if answer.status == 200 and (parts := parts_of(answer)):
                # What is next can be had in the same way.
                self._accepts = (accept, *(a for a in self._accepts if a != accept))
                return parts[0]
        raise SourceError(f"{url} is not given as it is stored ({answer.status})")

    def send(self, path: Path) -> bool:
        """Store a file of DICOM, piece by piece; return whether it was not there already.

        Raises:
            StoreError: the server has not stored it.
        """
        from pydicom import Dataset
        from pydicom.filereader import read_file_meta_info

        uid = str(read_file_meta_info(path).MediaStorageSOPInstanceUID)
        if self.json(f"/instances?SOPInstanceUID={uid}"):
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
        url, told = f"{self._url}/studies", Dataset()
        answer = self._ask("POST", url, headers, let=(400, 409), body=pieces(), retries=False)
        # What servers say may be anything.
        with suppress(Exception):
            told = Dataset.from_json(json.loads(answer.data))
        kept = told.get("ReferencedSOPSequence", [])
        if uid in [item.get("ReferencedSOPInstanceUID") for item in kept]:
            return True
        failed = told.get("FailedSOPSequence", [])
        codes = [f"reason {item.get('FailureReason') or 0:04X}" for item in failed]
        why = ", ".join(codes) or f"the server says {answer.status}"
        raise StoreError(f"{path.name} (instance {uid}) is not stored at {url}: {why}")

    def _ask(
        self, method: str, url: str, headers: dict[str, str], let: tuple[int, ...] = (), **body: Any
    ) -> BaseHTTPResponse:
        """Return an answer, read, that is no error, or one whose status may be."""
        from urllib3.exceptions import HTTPError

        goes_on = "; what is done is kept, and the same command goes on"
        try:
            answer = self._pool.request(method, url, headers=self._known | headers, **body)
        except (HTTPError, OSError) as error:
            # What stands around the reason tells the query.
            reason = " ".join(str(getattr(error, "reason", None) or error).split())
            raise UnreachableError(f"{self._url} cannot be reached: {reason}{goes_on}") from None
        if (status := answer.status) < 400 or status in let:
            return answer
        said = f"{url.partition('?')[0]}: the server says {status} {answer.reason or ''}".rstrip()
        if status in (401, 403, 407):
            said += f"; set {TOKEN}, or name user and password for {self._host} in ~/.netrc"
        if status in (401, 403, 407, *BUSY):
            raise UnreachableError(f"{said}{goes_on}")
        raise SourceError(f"{said}; look whether the address is right")


def parts_of(answer: BaseHTTPResponse) -> list[bytes]:
    """Return the parts of an answer in several, or its one body."""
    message = Message()
    message["Content-Type"] = answer.headers.get("Content-Type", "")
    if message.get_content_maintype() != "multipart":
        return [answer.data] if answer.data else []
    boundary = f"\r\n--{message.get_boundary('')}".encode()
    _, *pieces = (b"\r\n" + answer.data).split(boundary)
    return [p.partition(b"\r\n\r\n")[2] for p in pieces if not p.startswith(b"--")]


def find_series(address: DicomWeb) -> list[DicomWeb]:
    """Return the series of slides that an address names, or that a server finds by its query.

    Raises:
        SourceError: the server cannot be searched; UnreachableError as `Client` has it.
    """
    if "/series/" in address.where:
        return [address]
    client, found, page = Client(address), dict[DicomWeb, None](), -1
    while len(found) != page:
        page = len(found)
        query = f"{address.query or '?'}&Modality=SM&limit={PAGE}&offset={page}"
        for entry in client.json(f"{address.where}/series{query.replace('?&', '?')}"):
            tags = ("0020000D", "0020000E", "00080060")
            study, series, kind = ((entry.get(t, {}).get("Value") or [""])[0] for t in tags)
            # Some servers do not say again what was asked for, some find more.
            if series and kind in ("SM", ""):
                where = f"/studies/{study}" if study else address.where
                found[replace(address, where=f"{where}/series/{series}", query="")] = None
    return list(found)
