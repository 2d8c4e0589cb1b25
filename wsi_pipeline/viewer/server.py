"""Serve finished runs to a browser on this machine: tiles, polygons and the page that shows them.

Whatever a request names is looked up in a dict; no part of a URL ever becomes a path of a file.
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
import logging
import os
import re
import secrets
import socket
import socketserver
import sys
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qs, quote_from_bytes, unquote_to_bytes

import orjson

from wsi_pipeline.errors import SourceError, StoreError, WsiPipelineError
from wsi_pipeline.report import RUN_FILE
from wsi_pipeline.viewer.shown import ShownRun, load_slide_run, open_shown

logger = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
MOST_OPEN = 4
"""Slides that stay open while others are looked at."""
MOST_CONNECTIONS = 64
"""At a time, each with a thread: a browser opens six."""
IDLE_SECONDS = 60
"""After which a connection that is not used is closed."""
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class RequestError(WsiPipelineError):
    """A request that names what is not there, or says it wrongly."""

    def __init__(self, status: HTTPStatus, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What goes back to the browser.

    Attributes:
        body: the content.
        kind: its media type.
        is_kept: whether the browser may keep it on its disk. Nothing of a patient is.
    """

    body: bytes
    kind: str
    is_kept: bool = False


Query = Mapping[str, list[str]]


class Viewer(ThreadingHTTPServer):
    """A server of finished runs in a thread of its own; close it, or use it in a `with`.

    Attributes:
        root: with which the path of every URL begins; whoever does not know it sees nothing, as
            other users of the machine, who reach the port too.
        url: of the page.
    """

    daemon_threads = True
    allow_reuse_address = os.name == "posix"  # elsewhere two servers would share the port
    request_queue_size = 64

    def __init__(self, folder: Path, *, host: str, port: int, slide: Path | None) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.folder, self.slide_path = folder, slide
        self.root = f"/{secrets.token_urlsafe(16)}/"
        self.pages = dict(_static_files())
        self.pages[""] = self.pages.pop("index.html")
        self._folders: dict[str, Path] = {}
        self._open: OrderedDict[str, ShownRun] = OrderedDict()  # the latest used last
        self._users: dict[ShownRun, int] = {}
        self._lock = threading.Lock()
        self._slots = threading.BoundedSemaphore(MOST_CONNECTIONS)
        super().__init__((host, port), Handler)
        self.hosts = _own_names(host)
        name = socket.gethostname() if _is_any(host) else host
        self.url = f"http://{f'[{name}]' if ':' in name else name}:{self.server_port}{self.root}"
        self._thread = threading.Thread(target=self.serve_forever, name="viewer", daemon=True)
        self._thread.start()

    def server_bind(self) -> None:
        """Take the address, without asking a name server for its name as the base class does."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer in a thread, unless there are as many as one person's browsers never open."""
        if self._slots.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer in the thread."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._slots.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Write down what went wrong with a connection: a browser may leave whenever it likes."""
        logger.debug("connection from %s: %r", client_address, sys.exc_info()[1])

    def wait(self) -> None:
        """Wait until the server is closed, or Ctrl-C."""
        while self._thread.is_alive():
            self._thread.join(0.5)  # without a time Ctrl-C would not be heard on Windows

    def close(self) -> None:
        """Stop serving and give the slides back."""
        self.shutdown()
        self._thread.join()
        self.server_close()
        with self._lock:
            self._drop_all_but(0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def list_runs(self) -> list[dict[str, str]]:
        """Return what there is to be looked at, by now, in the order of the folders' names."""
        return [
            {"id": name, "folder": folder.name, **_entry(folder)}
            for name, folder in self._find().items()
        ]

    def _find(self) -> dict[str, Path]:
        alone = (self.folder / RUN_FILE).is_file()
        folders = (
            [self.folder]
            if alone
            else [path.parent for path in sorted(self.folder.glob(f"*/{RUN_FILE}"))]
        )
        self._folders = {_id(folder.absolute().name): folder for folder in folders}
        return self._folders

    @contextmanager
    def lend(self, name: str) -> Iterator[ShownRun]:
        """Open a run, or take it from those that are open; yield it, open until the end.

        Raises:
            RequestError: no run of that name.
            StoreError: it cannot be shown.
        """
        with self._lock:
            shown = self._take(name)
            self._users[shown] = self._users.get(shown, 0) + 1
        try:
            yield shown
        finally:
            with self._lock:
                self._users[shown] -= 1
                self._close_unused(shown)

    def _take(self, name: str) -> ShownRun:
        folder = self._folders.get(name) or self._find().get(name)
        if folder is None:
            raise RequestError(HTTPStatus.NOT_FOUND, "there is no such slide here")
        shown = self._open.pop(name, None)
        if shown is not None and not shown.is_current():
            self._users.setdefault(shown, 0)
            self._close_unused(shown)
            shown = None
        self._open[name] = shown = shown or open_shown(folder, self.slide_path)
        self._drop_all_but(MOST_OPEN)
        return shown

    def _drop_all_but(self, number: int) -> None:
        """Forget the runs that were not used for longest; close those that nobody uses."""
        while len(self._open) > number:
            self._close_unused(self._open.popitem(last=False)[1])

    def _close_unused(self, shown: ShownRun) -> None:
        if not self._users.get(shown) and shown not in self._open.values():
            self._users.pop(shown, None)
            shown.close()


def serve(
    folder: str | Path, *, host: str = LOOPBACK, port: int = 0, slide: str | Path | None = None
) -> Viewer:
    """Show finished slides in the browser; return the server, which runs until it is closed.

    Args:
        folder: of one run, or the output folder of several.
        host: address to listen on. Nothing is encrypted on the way.
        port: to listen on; 0 = a free one.
        slide: where the slide of a single run is now.

    Raises:
        StoreError: there is no run, or none that can be shown; the port is taken.
        SourceError: `slide` is no slide, or another one.
    """
    folder, slide = Path(folder), None if slide is None else Path(slide)
    if (folder / RUN_FILE).is_file():
        open_shown(folder, slide).close()  # says now what would be said on the page
    elif slide is not None:
        raise StoreError(f"a slide can be named for one run only, and {folder} is none")
    elif not any(folder.glob(f"*/{RUN_FILE}")):
        raise StoreError(f"no finished slide in {folder}; expected an output folder of `segment`")
    try:
        return Viewer(folder, host=host, port=port, slide=slide)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise StoreError(
            f"cannot listen on {host}, port {port} ({reason}); give another --port or --host"
        ) from error


class Handler(BaseHTTPRequestHandler):
    """Answers GET and HEAD."""

    server: Viewer
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "wsi_pipeline", ""
    timeout = IDLE_SECONDS
    wbufsize = -1
    """Head and body in one packet: the second would wait for the first to be acknowledged."""

    def do_GET(self) -> None:
        """Answer a request; what cannot be answered gets a sentence."""
        try:
            self._check_host()
            self._send(HTTPStatus.OK, self._answer())
        except ConnectionError:
            raise
        except RequestError as error:
            self._refuse(error.status, str(error))
        except SourceError as error:
            self._refuse(HTTPStatus.NOT_FOUND, str(error))
        except WsiPipelineError as error:
            self._refuse(HTTPStatus.INTERNAL_SERVER_ERROR, str(error))
        except Exception as error:  # a damaged file must not end the page
            logger.debug("%s", self.path, exc_info=True)
            self._refuse(HTTPStatus.INTERNAL_SERVER_ERROR, f"cannot be shown: {error}")

    do_HEAD = do_GET

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Refuse what the base class does not understand: other methods, damaged requests."""
        self.close_connection = True  # a body may follow, which nobody reads
        if code == HTTPStatus.NOT_IMPLEMENTED:
            self._refuse(HTTPStatus.METHOD_NOT_ALLOWED, "only GET and HEAD are answered")
        else:
            self._refuse(HTTPStatus(code), message or HTTPStatus(code).phrase)

    def log_message(self, format: str, *args: Any) -> None:
        """Log a request for those who want to know all."""
        logger.debug("%s %s", self.address_string(), format % args)

    def _check_host(self) -> None:
        """Refuse requests for other names: a foreign page's name may be made to lead here."""
        host = self.headers.get("Host", "")
        name, port = _split_host(host)
        hosts = self.server.hosts
        known = name in hosts or ("*" in hosts and _is_address(name))
        if not known or port != self.server.server_port:
            raise RequestError(
                HTTPStatus.FORBIDDEN,
                f"this server does not answer to {host[:80]!r}; open the address that it told",
            )

    def _answer(self) -> Answer:
        root, path = self.path[: len(self.server.root)], self.path[len(self.server.root) :]
        if not secrets.compare_digest(root.encode(), self.server.root.encode()):
            raise RequestError(
                HTTPStatus.FORBIDDEN, "open the address that `view` told, with all its letters"
            )
        path, _, query = path.partition("?")
        if path in self.server.pages:
            return self.server.pages[path]
        parts = path.split("/")
        if parts == ["runs"]:
            return _json(self.server.list_runs())
        if parts[0] == "runs" and len(parts) > 1:
            with self.server.lend(_id(unquote_to_bytes(parts[1]))) as shown:
                return _answer_of(shown, parts[2:], parse_qs(query))
        raise RequestError(HTTPStatus.NOT_FOUND, "there is no such page")

    def _send(self, status: HTTPStatus, answer: Answer) -> None:
        tag = f'"{hashlib.sha256(answer.body).hexdigest()[:20]}"' if answer.is_kept else ""
        if tag and tag in self.headers.get("If-None-Match", ""):
            status = HTTPStatus.NOT_MODIFIED
        self.send_response(status)
        for name, value in HEADERS.items():
            self.send_header(name, value)
        if status == HTTPStatus.METHOD_NOT_ALLOWED:
            self.send_header("Allow", "GET, HEAD")
        if tag:
            self.send_header("ETag", tag)
        self.send_header("Cache-Control", "no-cache" if answer.is_kept else "no-store")
        if self.close_connection:
            self.send_header("Connection", "close")
        if status != HTTPStatus.NOT_MODIFIED:
            self.send_header("Content-Type", answer.kind)
            self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        if status != HTTPStatus.NOT_MODIFIED and self.command != "HEAD":
            self.wfile.write(answer.body)

    def _refuse(self, status: HTTPStatus, sentence: str) -> None:
        body = f"{sentence}\n".encode("utf-8", "backslashreplace")
        self._send(status, Answer(body=body, kind="text/plain; charset=utf-8"))


def _answer_of(shown: ShownRun, parts: list[str], query: Query) -> Answer:
    """Return the answer to what is asked of a run."""
    match parts:
        case []:
            return _json(shown.facts())
        case ["thumbnail"]:
            return Answer(body=shown.thumbnail_jpeg(), kind="image/jpeg")
        case ["slide", *place]:
            return Answer(body=shown.slide_tile(*_tile(place)), kind="image/jpeg")
        case ["mask", *place]:
            return Answer(body=shown.mask_tile(*_tile(place), _hidden(query)), kind="image/png")
        case ["polygons"]:
            x, y, width, height = (_integer(query, name) for name in ("x", "y", "w", "h"))
            if width < 1 or height < 1:
                raise _wrong("w and h are above 0")
            downsample = _number(query, "downsample")
            polygons = shown.polygons()
            found = polygons.within((x, y, width, height), downsample, _hidden(query))
            return _json(
                {**found, "left_out": polygons.left_out, "classes": shown.legend(polygons.classes)}
            )
        case ["at"]:
            x, y = _integer(query, "x"), _integer(query, "y")
            return _json(shown.polygons().at(x, y, _hidden(query)))
    raise RequestError(HTTPStatus.NOT_FOUND, "there is no such part of a slide")


def _tile(place: list[str]) -> tuple[int, int, int]:
    """Return level, column and row of a tile."""
    if len(place) != 3 or not all(re.fullmatch(r"[0-9]{1,9}", part) for part in place):
        raise _wrong("a tile is named by level, column and row, three whole numbers")
    level, column, row = map(int, place)
    return level, column, row


def _value(query: Query, name: str, pattern: str, what: str) -> str:
    values = query.get(name, [])
    if len(values) != 1 or not re.fullmatch(pattern, values[0]):
        raise _wrong(f"{name} is {what}, given once")
    return values[0]


def _integer(query: Query, name: str) -> int:
    return int(_value(query, name, r"-?[0-9]{1,9}", "a whole number"))


def _number(query: Query, name: str) -> float:
    value = float(_value(query, name, r"[0-9]{1,6}(\.[0-9]{1,6})?", "a number above 0"))
    if not value:
        raise _wrong(f"{name} is above 0")
    return value


def _hidden(query: Query) -> frozenset[int]:
    """Return the classes that are not to be shown."""
    if "hide" not in query:
        return frozenset()
    listed = _value(query, "hide", r"[0-9]{1,4}(,[0-9]{1,4}){0,999}", "whole numbers with commas")
    return frozenset(map(int, listed.split(",")))


def _wrong(sentence: str) -> RequestError:
    return RequestError(HTTPStatus.BAD_REQUEST, sentence)


def _json(value: object) -> Answer:
    try:
        body = orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)
    except orjson.JSONEncodeError:  # names of folders that are no UTF-8
        body = json.dumps(value).encode()
    return Answer(body=body, kind="application/json")


def _id(name: str | bytes) -> str:
    """Return a folder's name as a part of a URL, whatever bytes it is made of."""
    return quote_from_bytes(os.fsencode(name), safe="")


def _entry(folder: Path) -> dict[str, str]:
    """Return what the list says of a run."""
    try:
        run = load_slide_run(folder)
    except StoreError as error:
        return {"name": folder.name, "status": "", "reason": str(error)}
    return {"name": str(run.slide["name"]), "status": run.status, "reason": run.reason}


def _static_files() -> Iterator[tuple[str, Answer]]:
    """Yield name and content of each file of the page."""
    for file in (resources.files("wsi_pipeline.viewer") / "static").iterdir():
        kind = TYPES.get(Path(file.name).suffix)
        if kind:
            yield file.name, Answer(body=file.read_bytes(), kind=kind, is_kept=True)


def _own_names(host: str) -> set[str]:
    """Return the names by which the server may be called; "*" stands for any address."""
    names = {"localhost", LOOPBACK, "::1", host.lower()}
    return names | {socket.gethostname().lower(), "*"} if _is_any(host) else names


def _is_any(host: str) -> bool:
    """Return whether a server listens on all addresses of the machine."""
    return _is_address(host) and ipaddress.ip_address(host).is_unspecified


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _split_host(host: str) -> tuple[str, int]:
    """Return name and port of a Host header, "" where it is none."""
    found = re.fullmatch(r"(?:\[([0-9a-f:.]+)\]|([\w.-]+))(?::([0-9]{1,5}))?", host.lower())
    return (found[1] or found[2], int(found[3] or 80)) if found else ("", 0)
