"""Serve finished runs to a browser on this machine: tiles, polygons and the page that shows them.

Whatever a request names is looked up in a dict; no part of a URL ever becomes a path of a file.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import socket
import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from http import HTTPStatus
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote_from_bytes, unquote, unquote_to_bytes

from tornado.httpserver import HTTPServer
from tornado.httputil import split_host_and_port
from tornado.iostream import IOStream
from tornado.netutil import is_valid_ip
from tornado.web import Application, RequestHandler

from wsi_pipeline.errors import SourceError, StoreError, WsiPipelineError
from wsi_pipeline.export.overlay import PREVIEW_SIDE, read_preview
from wsi_pipeline.report.record import RUN_FILE, run_files
from wsi_pipeline.sources.base import Opened
from wsi_pipeline.viewer.against import Against, against_facts, open_against
from wsi_pipeline.viewer.answers import Answer, RequestError, answer_of, as_json, whole_numbers
from wsi_pipeline.viewer.run_view import Shown, ShownPicture, load_shown, open_shown

logger = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
MOST_OPEN = 4
"""Runs that stay open while others are looked at."""
MOST_CONNECTIONS = 64
"""At a time: a browser opens six."""
THREADS = 8
"""That read files: the loop itself never waits for a disk."""
LONGEST_BODY = 1 << 16
"""Bytes of a request's body, which nobody reads."""
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
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "Server": "wsi_pipeline",
    "X-Content-Type-Options": "nosniff",
}


class Viewer(Opened):
    """A server of finished runs in a thread of its own; close it, or use it in a `with`.

    Attributes:
        root: with which the path of every URL begins; whoever does not know it sees nothing, as
            other users of the machine, who reach the port too.
        url: of the page.
        server_port: on which it listens.
        hosts: names by which it may be called; "*" stands for any address.
        pages: the files of the page, by name.
        pool: threads that answer.
    """

    def __init__(
        self, folder: Path, *, host: str, port: int, slide: Path | None, against: Path | None
    ) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = socket.create_server((host, port), family=family, backlog=64)
        listening.setblocking(False)
        self.server_port: int = listening.getsockname()[1]
        self.folder, self.slide_path, self._against_path = folder, slide, against
        self.against_facts = against_facts(against.name if against else "")
        # the latest alone, with what it is of
        self._against: tuple[object, Against] | None = None
        self.root = f"/{secrets.token_urlsafe(16)}/"
        self.pages: dict[str, Answer] = {}
        for file in (resources.files("wsi_pipeline.viewer") / "static").iterdir():
            # Macs leave files of their own in folders that are looked at
            if kind := TYPES.get(Path(file.name).suffix):
                self.pages[file.name.replace("index.html", "")] = kind, file.read_bytes()
        is_any = host in ("0.0.0.0", "::")
        name = socket.gethostname() if is_any else host
        self.hosts = {"localhost", LOOPBACK, "::1", name.lower()} | ({"*"} if is_any else set())
        self.url = f"http://{f'[{name}]' if ':' in name else name}:{self.server_port}{self.root}"
        self.pool = ThreadPoolExecutor(THREADS, "viewer")
        self._folders: dict[str, Path] = {}
        # the latest used last
        self._open: OrderedDict[str, Shown] = OrderedDict()
        self._lock = threading.Lock()
        # a loop of its own: that of a notebook is left as it is
        self._runner = asyncio.Runner(loop_factory=asyncio.new_event_loop)
        self._loop, self._ended = self._runner.get_loop(), asyncio.Event()
        self._thread = threading.Thread(
            target=self._run, args=[listening], name="viewer", daemon=True
        )
        self._thread.start()

    def _run(self, listening: socket.socket) -> None:
        with self._runner:
            self._runner.run(self._serve(listening))

    async def _serve(self, listening: socket.socket) -> None:
        """Answer until the viewer is closed."""
        server = _BoundedServer(
            Application(
                [(".*", _Page, {"viewer": self})],
                log_function=lambda of: logger.debug(
                    "%s %s: %s", of.request.method, of.request.uri, of.get_status()
                ),
            ),
            idle_connection_timeout=IDLE_SECONDS,
            max_body_size=LONGEST_BODY,
        )
        server.add_socket(listening)
        await self._ended.wait()
        server.stop()
        await server.close_all_connections()

    def wait(self) -> None:
        """Wait until the server is closed, or Ctrl-C."""
        while self._thread.is_alive():
            # without a time Ctrl-C would not be heard on Windows
            self._thread.join(0.5)

    def close(self) -> None:
        """Stop serving and give the slides back."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._ended.set)
        self._thread.join()
        self.pool.shutdown()
        self._open.clear()
        self._against = None

    def list_runs(self) -> list[dict[str, str]]:
        """Return what there is to be looked at, by now, in the order of the folders' names."""
        found = []
        for name, folder in self._find().items():
            try:
                run = load_shown(folder)
                facts = {"name": run.slide["name"], "status": run.status, "reason": run.reason}
                facts["fingerprint"] = run.slide.get("fingerprint", "")
                facts["picture"] = "overlay.png" if (folder / "overlay.png").is_file() else ""
            except StoreError as error:
                facts = {"name": folder.name, "status": "", "reason": str(error)}
            named = {"folder": unquote(name, errors="surrogateescape"), "path": str(folder)}
            found.append({"id": name, **named, **facts})
        return found

    def _find(self) -> dict[str, Path]:
        is_run = (self.folder / RUN_FILE).is_file()
        folders = [self.folder] if is_run else [path.parent for path in run_files(self.folder)]
        # One of several models' runs goes by the model's name, too.
        above = self.folder.absolute().parent if is_run else self.folder.absolute()
        self._folders = {_id(f.absolute().relative_to(above).as_posix()): f for f in folders}
        return self._folders

    def _folder_of(self, name: str) -> Path:
        # With the lock until it is open: the first tiles of a page come all at once.
        folder = self._folders.get(name) or self._find().get(name)
        if folder is None:
            raise RequestError(HTTPStatus.NOT_FOUND, "there is no such run here")
        return folder

    def preview(self, name: str) -> bytes:
        """Return a small JPEG of a run, from its overlay, without opening it.

        Raises:
            RequestError: no run of that name, or none with a picture.
        """
        try:
            return read_preview(self._folder_of(name) / "overlay.png", PREVIEW_SIDE // 2)
        except (OSError, KeyError, ValueError) as error:
            raise RequestError(HTTPStatus.NOT_FOUND, "this run has no overlay.png") from error

    def against(self, shown: ShownPicture, other: str) -> Against:
        """Open what a run is held against, or take it if it was the last; return it.

        Args:
            other: name of a run; "" = what was named at the start.

        Raises:
            RequestError: no run of that name, or nothing was named.
            WsiPipelineError: it cannot be compared with.
        """
        with self._lock:
            key = (id(shown), other)
            if self._against is None or self._against[0] != key:
                path = self._folder_of(other) if other else self._against_path
                if path is None:
                    raise RequestError(HTTPStatus.NOT_FOUND, "nothing was named to compare with")
                self._against = key, open_against(shown, _run_in(path, shown.folder.name))
            return self._against[1]

    def shown(self, name: str) -> Shown:
        """Open a run, or take it from those that are open; return it, closed when nobody holds it.

        Raises:
            RequestError: no run of that name.
            StoreError: it cannot be shown.
        """
        with self._lock:
            folder = self._folder_of(name)
            shown = self._open.pop(name, None)
            if shown is None or not shown.is_current():
                shown = open_shown(folder, self.slide_path)
            self._open[name] = shown
            if len(self._open) > MOST_OPEN:
                self._open.popitem(last=False)
            return shown


def serve(
    folder: str | Path,
    *,
    host: str = LOOPBACK,
    port: int = 0,
    slide: str | Path | None = None,
    against: str | Path | None = None,
) -> Viewer:
    """Show finished runs in the browser; return the server, which runs until it is closed.

    Args:
        folder: the folder of one run, or the output folder of several.
        host: address to listen on; nothing is encrypted on the way.
        port: to listen on; 0 = a free one.
        slide: where the slide, image or volume of a single run is now.
        against: second run, mask or GeoJSON to be held against; of several runs a folder of runs
            of the same names.

    Raises:
        StoreError: there is no run, or none that can be shown; the port is taken.
        WsiPipelineError: `against` is nothing to compare a single run with.
        SourceError: `slide` is no slide, or another one.
    """
    folder, slide = Path(folder), None if slide is None else Path(slide)
    against = None if against is None else Path(against)
    if (folder / RUN_FILE).is_file():
        # says now what would be said on the page
        with closing(open_shown(folder, slide)) as shown:
            if against and isinstance(shown, ShownPicture):
                open_against(shown, _run_in(against, folder.absolute().name))
    elif slide is not None or (against and not against.is_dir()):
        what = "a file to compare with" if slide is None else "a slide"
        raise StoreError(f"{what} can be named for one run only, and {folder} is none")
    elif not run_files(folder):
        raise StoreError(f"no finished run in {folder}; expected an output folder of `segment`")
    try:
        return Viewer(folder, host=host, port=port, slide=slide, against=against)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise StoreError(
            f"cannot listen on {host}, port {port} ({reason}); give another --port or --host"
        ) from error


def _run_in(path: Path, name: str) -> Path:
    """Return the run of a name in an output folder; whatever else, as it is."""
    inside = path / name
    return inside if (inside / RUN_FILE).is_file() and not (path / RUN_FILE).is_file() else path


class _BoundedServer(HTTPServer):
    """A server that takes no more connections than one person's browsers open."""

    streams: frozenset[IOStream] = frozenset()

    def handle_stream(self, stream: IOStream, address: tuple[Any, ...]) -> None:
        """Serve a new connection, or close it."""
        self.streams = frozenset(s for s in self.streams if not s.closed()) | {stream}
        if len(self.streams) > MOST_CONNECTIONS:
            stream.close()
        else:
            super().handle_stream(stream, address)


class _Page(RequestHandler):
    """Answers GET and HEAD; what cannot be answered gets a sentence."""

    def initialize(self, viewer: Viewer) -> None:
        """Take what every request needs."""
        self._viewer = viewer
        # all that a browser may keep on its disk: nothing of a patient
        self._is_page = False

    def set_default_headers(self) -> None:
        """Say what a browser may do with any answer."""
        for name, value in HEADERS.items():
            self.set_header(name, value)

    async def get(self) -> None:
        """Answer a request."""
        host = self.request.headers.get("Host", "")
        name, port = split_host_and_port(host.lower())
        hosts, name = self._viewer.hosts, name.strip("[]")
        # a foreign page's name may be made to lead here
        is_known = name in hosts or ("*" in hosts and is_valid_ip(name))
        if not is_known or (port or 80) != self._viewer.server_port:
            raise RequestError(
                HTTPStatus.FORBIDDEN,
                f"this server does not answer to {host[:80]!r}; open the address that it told",
            )
        loop = asyncio.get_running_loop()
        kind, body = await loop.run_in_executor(self._viewer.pool, self._answer)
        self.set_header("Content-Type", kind)
        if self._is_page:
            self.set_header("Cache-Control", "no-cache")
        self.write(body)

    head = get

    def compute_etag(self) -> str | None:
        """Return a hash of what the browser may keep."""
        return super().compute_etag() if self._is_page else None

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        """Refuse in one sentence."""
        error = kwargs["exc_info"][1]
        # a damaged file must not end the page
        sentence = f"cannot be shown: {error}"
        if isinstance(error, RequestError):
            sentence = error.sentence
        elif isinstance(error, WsiPipelineError):
            sentence = str(error)
            if isinstance(error, SourceError):
                self.set_status(HTTPStatus.NOT_FOUND)
        elif status_code == HTTPStatus.METHOD_NOT_ALLOWED:
            sentence = "only GET and HEAD are answered"
            self.set_header("Allow", "GET, HEAD")
            self.set_header("Connection", "close")
        self.set_header("Content-Type", "text/plain; charset=utf-8")
        self.finish(f"{sentence}\n".encode("utf-8", "backslashreplace"))

    def log_exception(self, *error: Any) -> None:
        """Log what went wrong for those who want to know all."""
        logger.debug("%s: %r", self.request.uri, error[1])

    def _answer(self) -> Answer:
        viewer, given = self._viewer, self.request.path
        root, path = given[: len(viewer.root)], given[len(viewer.root) :]
        # In the same time whatever is wrong with it: so it cannot be found letter by letter.
        if not secrets.compare_digest(root.encode(), viewer.root.encode()):
            raise RequestError(
                HTTPStatus.FORBIDDEN, "open the address that `view` told, with all its letters"
            )
        self._is_page = path in viewer.pages
        if self._is_page:
            return viewer.pages[path]
        parts = path.split("/")
        if parts == ["runs"]:
            return as_json(viewer.list_runs())
        if parts[0] == "runs" and len(parts) > 1:
            name, asked = _id(unquote_to_bytes(parts[1])), parts[2:]
            if asked == ["preview"]:
                return "image/jpeg", viewer.preview(name)
            query, shown = parse_qs(self.request.query), viewer.shown(name)
            match asked:
                case []:
                    return as_json({**shown.facts(), **viewer.against_facts})
                case ["against", other, layer, *place] if isinstance(shown, ShownPicture):
                    against = viewer.against(shown, _id(unquote_to_bytes(other)))
                    return "image/png", against.tile(layer, *whole_numbers(place, 3))
            return answer_of(shown, asked, query)
        raise RequestError(HTTPStatus.NOT_FOUND, "there is no such page")


def _id(name: str | bytes) -> str:
    """Return a folder's name as a part of a URL, whatever bytes it is made of."""
    return quote_from_bytes(os.fsencode(name), safe="")
