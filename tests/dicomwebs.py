"""DICOMweb servers on loopback: Orthanc where it is installed, one of our own, and who listens."""

from __future__ import annotations

import contextlib
import functools
import http.client
import io
import json
import re
import shutil
import socket
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from pydicom import dcmread
from pydicom.encaps import get_frame

ORTHANC = shutil.which("Orthanc", path="/usr/sbin:/usr/bin:/usr/local/sbin:/usr/local/bin")
PLUGIN = next(Path("/usr").glob("*/orthanc/**/libOrthancDicomWeb.so"), None)
ROOT = "/dicom-web"


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


@contextlib.contextmanager
def orthanc(folder: Path) -> Iterator[int]:
    """Run Orthanc with its data in a folder; yield its port."""
    assert ORTHANC
    port = free_port()
    folder.mkdir(exist_ok=True)
    (folder / "orthanc.json").write_text(
        json.dumps(
            {
                "StorageDirectory": str(folder / "db"),
                "IndexDirectory": str(folder / "db"),
                "HttpPort": port,
                "DicomServerEnabled": False,
                "RemoteAccessAllowed": True,
                "AuthenticationEnabled": False,
                "Plugins": [str(PLUGIN)],
                "DicomWeb": {"Enable": True, "Root": f"{ROOT}/"},
            }
        )
    )
    with (folder / "log").open("wb") as log:
        command = [ORTHANC, str(folder / "orthanc.json")]
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder)
    try:
        for _ in range(600):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            assert process.poll() is None, (folder / "log").read_text("utf-8")
            time.sleep(0.1)
        yield port
    finally:
        process.terminate()
        process.wait(30)


class Answering(BaseHTTPRequestHandler):
    """Answers by HTTP/1.1, without a word on the terminal."""

    protocol_version = "HTTP/1.1"
    server: Any

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, status: int, data: bytes = b"", kind: str = "text/plain") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))


@contextlib.contextmanager
def serving(handler: type[Answering], **attributes: Any) -> Iterator[Any]:
    """Serve on a free port; yield the server."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    vars(server).update(attributes)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


class Listening(Answering):
    """Hands on to another server, and counts; `fault` may answer in its place."""

    def do_GET(self) -> None:
        data = self.body()
        if self.server.fault and self.server.fault(self):
            return
        there = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=60)
        there.request(self.command, self.path, data or None, dict(self.headers))
        with contextlib.closing(there), there.getresponse() as answer:
            found = answer.read()
        self.server.log.append((self.command, self.path, answer.status, len(found)))
        self.answer(answer.status, found, answer.headers.get("Content-Type", ""))

    do_POST = do_GET


@contextlib.contextmanager
def listening(port: int) -> Iterator[Any]:
    """Serve what another port serves; yield the server, with its `log` and `fault`."""
    with serving(Listening, port=port, log=[], fault=None) as server:
        server.address = f"dicomweb+http://127.0.0.1:{server.server_port}{ROOT}"
        yield server


TAGS = {"PatientID": "00100020", "Modality": "00080060", "SOPInstanceUID": "00080018"}
NOT_BULK = 64
SYNTAX = "1.2.840.10008.1.2.4.50"
STYLES: dict[str, tuple[str, str, bytes]] = {
    # What must be accepted, the answer's type with its boundary, and the head of its part.
    "plain": (
        r'type="application/octet-stream"; transfer-syntax=\*$',
        "multipart/related; type=application/octet-stream; boundary=x",
        b"Content-Type: application/octet-stream\r\n",
    ),
    "quoted": (
        rf'type="image/jpeg"; transfer-syntax={SYNTAX}\b',
        "multipart/related; "
        f"""type="image/jpeg"; transfer-syntax={SYNTAX}; BOUNDARY="a'()+_,-./:=? b";start=1""",
        f"content-location: /a\r\nCONTENT-TYPE:image/jpeg;transfer-syntax={SYNTAX}\r\n".encode(),
    ),
    "single": (r"\*/\*$", f"image/jpeg; transfer-syntax={SYNTAX}", b""),
}


@functools.lru_cache(256)
def header_of(path: Path) -> Any:
    return dcmread(path, stop_before_pixels=True)


@functools.lru_cache(16)
def whole_of(path: str) -> Any:
    return dcmread(path)


class Own(Answering):
    """A server of the files in a folder, in one of `STYLES`."""

    def datasets(self) -> Iterator[Any]:
        yield from map(header_of, sorted(self.server.folder.glob("*.dcm")))

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        places = re.findall(r"/(studies|series|instances)/([\d.]+)", url.path)
        names = {"studies": "StudyInstanceUID", "series": "SeriesInstanceUID"}
        found = [
            each
            for each in self.datasets()
            if all(each[names.get(k, "SOPInstanceUID")].value == uid for k, uid in places)
        ]
        what = url.path.rpartition("/")[2]
        if "/frames/" in url.path or "/bulk/" in url.path:
            self.give(found, url.path.rpartition("/")[2], is_frame="/frames/" in url.path)
            return
        as_json = [each.to_json_dict(NOT_BULK, lambda e: f"bulk/{e.tag:08X}") for each in found]
        query = dict(parse_qsl(url.query))
        for name, tag in TAGS.items():
            wanted = query.get(name)
            as_json = [
                e for e in as_json if not wanted or wanted in e.get(tag, {}).get("Value", ())
            ]
        if what == "series":
            as_json = list({e["0020000E"]["Value"][0]: e for e in as_json}.values())
            as_json = as_json[int(query.get("offset", 0)) :][: min(int(query.get("limit", 2)), 2)]
        if not as_json:
            self.answer(404 if what == "metadata" else 204)
            return
        self.answer(200, json.dumps(as_json).encode(), "application/dicom+json")

    def give(self, found: list[Any], what: str, *, is_frame: bool) -> None:
        accepted, kind, head = STYLES[self.server.style]
        if not found:
            self.answer(404)
        elif is_frame and not re.search(accepted, self.headers["Accept"]):
            self.answer(406)
        elif not is_frame:
            data = bytes(found[0].OpticalPathSequence[0][int(what, 16)].value)
            self.answer(200, data, "application/octet-stream")
        else:
            whole, number = whole_of(found[0].filename), int(what) - 1
            count = int(whole.get("NumberOfFrames") or 1)
            if not 0 <= number < count:
                self.answer(404)
                return
            if whole.file_meta.TransferSyntaxUID.is_encapsulated:
                data = get_frame(whole.PixelData, number, number_of_frames=count)
            else:
                size = whole.Rows * whole.Columns * whole.SamplesPerPixel
                data = whole.PixelData[number * size :][:size]
            message = Message()
            message["Content-Type"] = kind
            if mark := message.get_boundary():
                edge = f"\r\n--{mark}".encode()
                data = edge[2:] + b"\r\n" + head + b"\r\n" + data + edge + b"--\r\n"
            self.answer(200, data, kind)

    def do_POST(self) -> None:
        message = Message()
        message["Content-Type"] = self.headers["Content-Type"]
        mark = f"--{message.get_boundary()}".encode()
        _, *parts, end = (b"\r\n" + self.body()).split(b"\r\n" + mark)
        assert end == b"--\r\n"
        told: dict[str, Any] = {}
        for part in parts:
            data = part.partition(b"\r\n\r\n")[2]
            own = dcmread(io.BytesIO(data), stop_before_pixels=True)
            item: dict[str, Any] = {
                "00081150": {"vr": "UI", "Value": [own.SOPClassUID]},
                "00081155": {"vr": "UI", "Value": [own.SOPInstanceUID]},
            }
            refused = self.server.refuses and self.server.refuses(own)
            if refused:
                item["00081197"] = {"vr": "US", "Value": [0xA700]}
            else:
                (self.server.folder / f"{uuid.uuid4().hex}.dcm").write_bytes(data)
            tag = "00081198" if refused else "00081199"
            told.setdefault(tag, {"vr": "SQ", "Value": []})["Value"].append(item)
        status = 202 if "00081198" in told else 200
        self.answer(status, json.dumps(told).encode(), "application/dicom+json")


@contextlib.contextmanager
def own(
    folder: Path, style: str = "plain", refuses: Callable[[Any], bool] | None = None
) -> Iterator[int]:
    """Serve the files of a folder; yield the port."""
    folder.mkdir(exist_ok=True)
    with serving(Own, folder=folder, style=style, refuses=refuses) as server:
        yield server.server_port
