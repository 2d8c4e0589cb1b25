"""Bundles from the web and from a hub, on loopback: pinned, and there without a server."""

from __future__ import annotations

import hashlib
import http.server
import io
import json
import logging
import os
import shutil
import subprocess
import sys
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from bundles import Pointwise, pointwise_bundle, small_unet_bundle
from click.testing import CliRunner

from wsi_pipeline.bundle import load_bundle
from wsi_pipeline.cli import group
from wsi_pipeline.errors import BundleError
from wsi_pipeline.files import fetched
from wsi_pipeline.files.atomic import sha256_of
from wsi_pipeline.networks import build
from wsi_pipeline.networks.check import random_patches, run
from wsi_pipeline.networks.program import export_onnx

Served = tuple[http.server.ThreadingHTTPServer, str, list[str]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a bundle with a card."""
    made = small_unet_bundle(tmp_path_factory.mktemp("made") / "unet")
    (made / "README.md").write_text("card", "utf-8")
    return made


@pytest.fixture
def made(tmp_path: Path, whole: Path) -> Path:
    """Return the test's own copy of it, in the folder that is served."""
    return Path(shutil.copytree(whole, tmp_path / "served" / "unet"))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return where fetched bundles of the test's own cache lie."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "wsi_pipeline" / "fetched"


class Counted(http.server.SimpleHTTPRequestHandler):
    asked: list[str]

    def log_request(self, code: object = "-", size: object = "-") -> None:
        self.asked.append(self.path)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def web(tmp_path: Path, made: Path) -> Iterator[Served]:
    """Serve `served`; yield the server, its URL and the paths that were asked for."""
    asked: list[str] = []
    handler = type("Handler", (Counted,), {"asked": asked})
    yield from serve(partial(handler, directory=str(tmp_path / "served")), asked)


def serve(
    handler: Callable[..., http.server.BaseHTTPRequestHandler], asked: list[str]
) -> Iterator[Served]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server, f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()
        thread.join()


def stop(server: http.server.ThreadingHTTPServer) -> None:
    server.shutdown()
    server.socket.close()


def packed(folder: Path, name: str, top: str = "unet/") -> Path:
    """Write an archive of a folder beside it; return its path."""
    target = folder.parent / name
    if name.endswith(".zip"):
        with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
            for path in folder.iterdir():
                archive.write(path, f"{top}{path.name}")
    else:
        with tarfile.open(target, "w:" + name.partition(".tar.")[2]) as tar:
            for path in folder.iterdir():
                tar.add(path, f"{top}{path.name}")
    return target


FORMS = [
    "unet/",
    "unet/model.toml",
    "unet.zip",
    "flat.zip",
    "unet.tar",
    "unet.tar.gz",
    "unet.tar.xz",
]


@pytest.mark.parametrize("name", FORMS)
def test_a_bundle_comes_from_the_web_and_stays(
    web: Served, made: Path, cache: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    server, url, asked = web
    if not name.startswith("unet/"):
        packed(made, name, top="" if name == "flat.zip" else "./unet/")
    first = load_bundle(f"{url}/{name}")
    assert first.digest == load_bundle(made).digest
    assert first.path.parent == cache
    whole = made / "model.toml" if name.startswith("unet/") else made.parent / name
    told = f"{url}/unet/model.toml" if name == "unet/" else f"{url}/{name}"
    assert first.origin == {"url": told, "sha256": hashlib.sha256(whole.read_bytes()).hexdigest()}
    assert sorted(p.name for p in first.path.iterdir()) == [
        ".origin.json", "README.md", "model.safetensors", "model.toml",
    ]  # fmt: skip
    count = len(asked)
    assert load_bundle(f"{url}/{name}") == first
    assert len(asked) == count + 1
    pinned = load_bundle(f"{url}/{name}#sha256={first.origin['sha256']}")
    assert (pinned.path, len(asked)) == (first.path, count + 1)
    stop(server)
    with caplog.at_level(logging.WARNING):
        assert load_bundle(f"{url}/{name}") == first
    assert "going on with what was fetched before" in caplog.text
    assert not [path for path in cache.iterdir() if path.name.startswith(".")]


def test_another_archive_in_its_place_is_another_model(
    web: Served, made: Path, cache: Path
) -> None:
    _, url, _ = web
    packed(made, "unet.zip")
    first = load_bundle(f"{url}/unet.zip")
    toml = made / "model.toml"
    toml.write_text(toml.read_text("utf-8").replace("mpp = 0.5", "mpp = 0.25"), "utf-8")
    os.utime(packed(made, "unet.zip"), (1e9, 1e9))
    second = load_bundle(f"{url}/unet.zip")
    assert (first.mpp, second.mpp) == (0.5, 0.25)
    assert second.path != first.path
    # a run that began with it goes on
    assert first.read_weights()
    wrong = f"{url}/unet.zip#sha256={'0' * 64}"
    with pytest.raises(BundleError, match=f"has sha256 {second.origin['sha256']}, expected 0000"):
        load_bundle(wrong)
    with pytest.raises(BundleError, match="expected #sha256= and 64 hex digits"):
        load_bundle(f"{url}/unet.zip#sha256=12")


def test_a_run_tells_where_its_model_came_from(
    web: Served, made: Path, cache: Path, slide_path: Path, tmp_path: Path
) -> None:
    server, url, _ = web
    packed(made, "unet.zip")
    line = ["segment", str(slide_path), "--output", str(tmp_path / "out"), "--outputs", "zarr"]
    line += ["--roi", str(roi_of(tmp_path)), "--mask-mpp", "0.5", "--model"]
    whole = f"{url.replace('http://', 'http://me:open-sesame@')}/unet.zip?sig=signed-secret"
    for _ in range(2):
        result = CliRunner().invoke(group, [*line, whole])
        assert result.exit_code == 0, result.output
        record = (tmp_path / "out" / "synthetic slide" / "run.json").read_text("utf-8")
        told = json.loads(record)["model"]
        assert told["origin"]["url"] == f"{url}/unet.zip"
        assert told["weights_sha256"] == load_bundle(made).weights_sha256
        for secret in ("open-sesame", "signed-secret"):
            assert not [
                p for p in cache.rglob("*") if p.is_file() and secret.encode() in p.read_bytes()
            ]
            assert secret not in record + result.output
        stop(server)
        server.server_close()
    # the same model by another way is no other model
    result = CliRunner().invoke(group, [*line, str(made)])
    assert result.exit_code == 0, result.output


def roi_of(folder: Path) -> Path:
    ring = [[500, 500], [900, 500], [900, 900], [500, 900], [500, 500]]
    shape = {"type": "Polygon", "coordinates": [ring]}
    (folder / "roi.geojson").write_text(json.dumps(shape), "utf-8")
    return folder / "roi.geojson"


def member(name: str, data: bytes = b"", **fields: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in fields.items():
        setattr(info, key, value)
    return info, data


@pytest.mark.parametrize(
    "weights", ["../evil", "/etc/passwd", "a/../../evil", "//127.0.0.1/evil", "link"]
)
@pytest.mark.parametrize("kind", ["zip", "tar", "toml"])
def test_nothing_is_taken_or_written_outside(
    web: Served, made: Path, cache: Path, tmp_path: Path, weights: str, kind: str
) -> None:
    _, url, asked = web
    toml = (made / "model.toml").read_text("utf-8").replace("model.safetensors", weights).encode()
    (made / "model.toml").write_bytes(toml)
    with zipfile.ZipFile(made.parent / "m.zip", "w") as archive:
        archive.writestr("model.toml", toml)
        for name in {weights, "../evil", "../../../evil"} - {"link"}:
            archive.writestr(name, b"evil")
    with tarfile.open(made.parent / "m.tar", "w") as tar:
        link = member("link", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        for info, data in (member("model.toml", toml), member("../evil", b"evil"), link):
            tar.addfile(info, io.BytesIO(data))
    before = {p for p in tmp_path.rglob("*") if cache not in p.parents}
    with pytest.raises(BundleError, match=r"outside the bundle|holds no link|cannot fetch .*link"):
        load_bundle(f"{url}/{'unet/model.toml' if kind == 'toml' else f'm.{kind}'}")
    assert {p for p in tmp_path.rglob("*") if cache not in p.parents} - before <= {
        cache, cache.parent, cache.parent.parent
    }  # fmt: skip
    assert not list(cache.iterdir())
    assert not any("evil" in path for path in asked)


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_what_would_fill_the_disk_is_refused(
    web: Served, made: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    _, url, _ = web
    (made / "model.safetensors").write_bytes(bytes(9 << 20))
    assert packed(made, f"unet.{kind}").stat().st_size < 1 << 17
    monkeypatch.setattr(fetched, "MOST_WEIGHTS", 8 << 20)
    with pytest.raises(BundleError, match="more than 8 MB"):
        load_bundle(f"{url}/unet.{kind}")
    assert not list(cache.iterdir())


def test_what_is_no_bundle_is_told(web: Served, made: Path, cache: Path) -> None:
    _, url, _ = web
    whole = packed(made, "unet.tar.gz").read_bytes()
    (made.parent / "cut.tar.gz").write_bytes(whole[:-3000])
    whole = packed(made, "unet.zip").read_bytes()
    (made.parent / "bad.zip").write_bytes(whole[:200] + bytes(300) + whole[500:])
    (made.parent / "page.html").write_text("<html>", "utf-8")
    with zipfile.ZipFile(made.parent / "two.zip", "w") as archive:
        for name in ("a/model.toml", "b/model.toml"):
            archive.writestr(name, "")
    with zipfile.ZipFile(made.parent / "none.zip", "w") as archive:
        archive.writestr("a/model.yaml", "")
    told = {
        "cut.tar.gz": "damaged archive|cannot be unpacked",
        "bad.zip": "damaged archive|cannot be unpacked|not valid TOML",
        "page.html": "is not valid TOML",
        "two.zip": "has 2 bundles; expected one folder with a model.toml",
        "none.zip": "has 0 bundles",
        "nothing.zip": "cannot fetch .*404",
    }
    for name, reason in told.items():
        with pytest.raises(BundleError, match=reason):
            load_bundle(f"{url}/{name}")
    assert not list(cache.iterdir())


def test_no_program_is_run_that_comes_with_a_bundle(
    web: Served, tmp_path: Path, cache: Path
) -> None:
    _, url, _ = web
    packed(pointwise_bundle(tmp_path / "served" / "code", mpp=0.5), "code.zip", top="")
    for name in ("code/", "code.zip"):
        with pytest.raises(
            BundleError, match=r"program\.pt, from .* is a program, and none is run"
        ):
            load_bundle(f"{url}/{name}")
    result = CliRunner().invoke(group, ["models", "add", f"{url}/code.zip"])
    assert result.exit_code == 1
    # Nor one that its model.toml has fetched.
    folder = tmp_path / "served" / "code"
    entry = f'{{ url = "{url}/code/program.pt", sha256 = "{sha256_of(folder / "program.pt")}" }}'
    text = (folder / "model.toml").read_text("utf-8").replace('"program.pt"', entry)
    (folder / "model.toml").write_text(text, "utf-8")
    with pytest.raises(BundleError, match=r"the file that it names, from .* is a program"):
        load_bundle(f"{url}/code/")
    assert not (cache.parent / "models").exists()


def test_an_onnx_file_is_data_and_comes(web: Served, tmp_path: Path, cache: Path) -> None:
    _, url, _ = web
    folder = small_unet_bundle(tmp_path / "served" / "net")
    export_onnx(load_bundle(folder), folder / "model.onnx")
    toml = (folder / "model.toml").read_text("utf-8").replace('"swish_unet"', '"onnx"')
    head, _, tail = toml.replace("model.safetensors", "model.onnx").partition("[network_options]")
    tail = tail[tail.index("[input]") :]
    (folder / "model.toml").write_text(head + tail, "utf-8")
    bundle = load_bundle(f"{url}/net/")
    patches = random_patches(bundle, 3)
    found = run(build(bundle).module, patches)["mask"]
    assert torch.equal(found, run(build(load_bundle(folder)).module, patches)["mask"])
    # Under its name a program is one still.
    torch.jit.script(Pointwise()).save(folder / "model.onnx")
    with pytest.raises(BundleError, match=r"no ONNX file"):
        build(load_bundle(folder))


def test_add_keeps_what_was_fetched_and_where_from(
    web: Served, made: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, url, _ = web
    packed(made, "unet.zip")
    assert CliRunner().invoke(group, ["models", "add", f"{url}/unet.zip"]).stdout == "test-unet\n"
    stop(server)
    monkeypatch.chdir(tmp_path)
    bundle = load_bundle("test-unet")
    assert bundle.path == cache.parent / "models" / "test-unet"
    assert bundle.origin["url"] == f"{url}/unet.zip"


SHOW = """
import json, sys
from wsi_pipeline.bundle import load_bundle
from wsi_pipeline.errors import BundleError
try:
    found = load_bundle(sys.argv[1])
    print(json.dumps([found.digest, dict(found.origin), str(found.path), found.mpp]))
except BundleError as error:
    print(json.dumps(str(error)))
assert "huggingface_hub" not in sys.modules or sys.argv[1].startswith("hf://")
assert not {"torch", "transformers"} & {*sys.modules}
"""


def asking(location: str, endpoint: str = "") -> subprocess.Popen[str]:
    environment = os.environ | {"HF_ENDPOINT": endpoint, "HF_HUB_ETAG_TIMEOUT": "2"}
    command = [sys.executable, "-c", SHOW, location]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def answer(process: subprocess.Popen[str]) -> list[object] | str:
    told, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    found: list[object] | str = json.loads(told)
    return found


def test_two_processes_fetch_the_same_at_once(web: Served, made: Path, cache: Path) -> None:
    _, url, _ = web
    packed(made, "unet.zip")
    answers = [answer(p) for p in [asking(f"{url}/unet.zip") for _ in range(3)]]
    assert answers[0] == answers[1] == answers[2]
    assert answers[0][0] == load_bundle(made).digest
    assert len([path for path in cache.iterdir() if path.is_dir()]) == 1
    assert not [path for path in cache.iterdir() if path.name.startswith(".")]


class Hub(http.server.BaseHTTPRequestHandler):
    """One repository as Hugging Face serves it: what it is at a revision, and its files."""

    commits: dict[str, dict[str, bytes]]
    heads: dict[str, str]

    def do_GET(self) -> None:
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts[:4] == ["api", "models", "lab", "nets"]:
            revision = parts[5] if len(parts) > 5 else "main"
            commit = self.heads.get(revision, revision)
            if commit not in self.commits:
                return self.give(404, b"", {"X-Error-Code": "RevisionNotFound"})
            files = [
                {"rfilename": name, "size": len(data), "blobId": "0" * 40, "lfs": {
                    "sha256": hashlib.sha256(data).hexdigest(),
                    "size": len(data),
                    "pointerSize": 1,
                }}
                for name, data in self.commits[commit].items()
            ]  # fmt: skip
            facts = {"id": "lab/nets", "sha": commit, "siblings": files, "private": False}
            return self.give(200, json.dumps(facts).encode(), {"Content-Type": "application/json"})
        if parts[:3] == ["lab", "nets", "resolve"]:
            data = self.commits[parts[3]]["/".join(parts[4:])]
            return self.give(200, data, {"ETag": f'"{hashlib.sha256(data).hexdigest()}"',
                                         "X-Repo-Commit": parts[3]})  # fmt: skip
        return self.give(404, b"", {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def give(self, code: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(code)
        for name, value in (headers | {"Content-Length": str(len(data))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *_: object) -> None: ...


@pytest.mark.slow
def test_a_bundle_comes_from_a_hub_and_stays(made: Path, cache: Path) -> None:
    pytest.importorskip("huggingface_hub", reason="hf:// needs the extra hub")
    old, new = "a" * 40, "b" * 40
    files = {path.name: path.read_bytes() for path in made.iterdir()}
    # a repository may hold anything beside
    first = {f"nets/unet/{name}": data for name, data in files.items()} | {"setup.py": b"raise"}
    toml = files["model.toml"].replace(b"mpp = 0.5", b"mpp = 0.25")
    commits = {old: first, new: first | {"nets/unet/model.toml": toml}}
    heads = {"main": old, "v1": old}
    served = serve(type("Repository", (Hub,), {"commits": commits, "heads": heads}), [])
    _, url, _ = next(served)
    expected = load_bundle(made)
    told = answer(asking("hf://lab/nets/nets/unet", url))
    pinned = f"hf://lab/nets@{old}/nets/unet"
    assert told == [expected.digest, {"url": pinned}, str(cache / Path(str(told[2])).name), 0.5]
    assert sorted(p.name for p in Path(str(told[2])).iterdir()) == [
        ".origin.json", "README.md", "model.safetensors", "model.toml",
    ]  # fmt: skip
    assert answer(asking("hf://lab/nets/nets/unet/model.toml", url)) == told
    heads["main"] = new
    moved = answer(asking("hf://lab/nets@main/nets/unet", url))
    assert moved[1:] == [{"url": f"hf://lab/nets@{new}/nets/unet"}, moved[2], 0.25]
    assert answer(asking("hf://lab/nets@v1/nets/unet", url)) == told
    refused = {
        "hf://lab/nets": "holds no model.toml",
        "hf://lab/nets@nowhere": "cannot fetch hf://lab/nets@nowhere",
        "hf://lab/other": "cannot fetch hf://lab/other@main",
        "hf://nets": "expected hf://owner/name[@revision][/file]",
    }
    for location, reason in refused.items():
        assert reason in answer(asking(location, url))
    next(served, None)
    # without a server: by commit at once, by name as it last was
    assert answer(asking(pinned, url)) == told
    assert answer(asking("hf://lab/nets/nets/unet", url)) == moved
    assert answer(asking("hf://lab/nets@v1/nets/unet", url)) == told
    assert "cannot fetch" in answer(asking("hf://lab/nets@v2/nets/unet", url))


def test_a_hub_needs_its_client(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(BundleError, match=r'needs pip install "wsi-pipeline\[hub\]"'):
        load_bundle("hf://lab/nets")
