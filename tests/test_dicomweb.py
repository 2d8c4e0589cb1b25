"""Slides on DICOMweb servers: on Orthanc, and on one of our own that answers in other words."""

import contextlib
import http.client
import json
import pickle
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

import dicomwebs
import highdicom
import numpy as np
import openslide
import pytest
import zarr
from bundles import pointwise_bundle
from click.testing import CliRunner
from dicoms import write_pyramid
from PIL import ImageCms
from pydicom import Dataset, dcmread
from pydicom.uid import generate_uid

from wsi_pipeline.cli import group
from wsi_pipeline.errors import SourceError, StoreError, UnreachableError, WsiPipelineError
from wsi_pipeline.files import dicomweb
from wsi_pipeline.files.dicomweb import Client
from wsi_pipeline.files.paths import as_path
from wsi_pipeline.run.jobs import find_slides
from wsi_pipeline.sources import open_source

MPP = (0.25, 0.3)


class Served:
    """A server with what it was asked for."""

    def __init__(self, listener, folder, port):
        self.address, self.listener, self.folder, self.port = (
            listener.address,
            listener,
            folder,
            port,
        )

    @property
    def log(self):
        return self.listener.log

    def add(self, *paths):
        """Send files as any other program would; return the address of their series."""
        for path in paths:
            if self.port:
                there = http.client.HTTPConnection("127.0.0.1", self.port)
                there.request("POST", "/instances", path.read_bytes())
                assert there.getresponse().status == 200
                there.close()
            else:
                shutil.copy(path, self.folder / f"{dcmread(path).SOPInstanceUID}.dcm")
        own = dcmread(paths[0], stop_before_pixels=True)
        return f"{self.address}/studies/{own.StudyInstanceUID}/series/{own.SeriesInstanceUID}"


@pytest.fixture(scope="module", params=["orthanc", "own"])
def server(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    with contextlib.ExitStack() as closing:
        if request.param == "orthanc":
            if not dicomwebs.ORTHANC or not dicomwebs.PLUGIN:
                pytest.skip("no Orthanc with its DICOMweb plugin (orthanc, orthanc-dicomweb)")
            port = closing.enter_context(dicomwebs.orthanc(folder))
        else:
            port = closing.enter_context(dicomwebs.own(folder))
        listener = closing.enter_context(dicomwebs.listening(port))
        yield Served(listener, folder, port if request.param == "orthanc" else None)


@pytest.fixture
def served(server):
    server.log.clear()
    server.listener.fault = None
    return server


@pytest.fixture(scope="module")
def levels(slide_pixels):
    """Return three levels of odd sizes."""
    found = [slide_pixels]
    for _ in range(2):
        height, width = (n // 4 for n in found[-1].shape[:2])
        cut = found[-1][: 4 * height, : 4 * width].reshape(height, 4, width, 4, 3)
        found.append(cut.mean((1, 3)).round().astype(np.uint8))
    return found


@pytest.fixture(scope="module")
def pyramid(tmp_path_factory, levels):
    """Return the files of a slide of three levels, JPEG, in their folder."""
    return write_pyramid(tmp_path_factory.mktemp("pyramid") / "slide", levels, MPP)


def call(*args):
    return CliRunner().invoke(group, list(map(str, args)))


def segment(slide, model, output, *more):
    options = ("--model", model, "--output", output, "--tissue", "none", "--device", "cpu")
    return call("segment", slide, *options, "--precision", "fp32", "--block-size", "1024", *more)


def mask_of(folder):
    return zarr.open_array(folder / "mask.ome.zarr" / "0", mode="r")[:]


def uid_of(address):
    return address.rpartition("/")[2]


def is_equal(address, path, mpp=None):
    """Compare all levels with OpenSlide's of the same file, which the package's reader is not."""
    with open_source(address, mpp=mpp) as found, openslide.OpenSlide(path) as expected:
        assert found.backend == "dicomweb"
        assert found.size == expected.dimensions
        assert found.pixels.level_sizes == expected.level_dimensions
        x, y = (float(expected.properties[f"openslide.mpp-{axis}"]) for axis in "xy")
        assert mpp or found.mpp == pytest.approx((x, y), rel=1e-9)
        for level, size in enumerate(expected.level_dimensions):
            image = np.asarray(expected.read_region((0, 0), level, size))
            pixels = np.where(image[..., 3:] > 0, image[..., :3], 255)
            assert np.array_equal(found.pixels.read_level(level, 0, 0, *size), pixels)
    return True


@pytest.mark.parametrize(
    "name",
    [
        "dicom/multiframe_camelyon_challenge_image.dcm",
        "dicom_highdicom/sm_image.dcm",
        "dicom_highdicom/sm_image_numbers.dcm",
        "dicom_panimg/full_with_bot.dcm",
        "dicom_panimg/sparse_no_bot.dcm",
    ],
)
def test_real_slides_are_those_of_openslide(served, data_dir, tmp_path, name):
    # By itself: OpenSlide takes all of a series that lie in a folder.
    path = Path(shutil.copy(data_dir / "wsi" / name, tmp_path))
    # Some say what is not believed.
    assert is_equal(served.add(path), path, 100 if "panimg" in name else None)


@pytest.mark.parametrize("kind", ["jpeg", "rgb jpeg", "jpeg 2000", "raw"])
def test_levels_of_odd_sizes_and_pixels_that_are_not_square(served, tmp_path, levels, kind):
    paths = write_pyramid(tmp_path / "slide", levels, MPP, kind=kind)
    address = served.add(*paths)
    assert is_equal(address, paths[0])
    with open_source(address) as found, open_source(paths[0]) as local:
        assert found.level_downsamples == local.level_downsamples
        assert found.mpp == local.mpp == (MPP[1], MPP[0])
        assert found.fingerprint != local.fingerprint
        assert len(found.level_sizes) == 3


def test_only_frames_are_read_and_those_of_the_region_alone(served, pyramid):
    address = served.add(*pyramid)
    whole = sum(path.stat().st_size for path in pyramid)
    with open_source(address) as slide:
        served.log.clear()
        pixels = slide.pixels.read_level(0, 500, 400, 300, 200)
        # Frames of 240 × 176 px: columns 2 and 3, rows 2 and 3; a second time they are there.
        assert np.array_equal(slide.pixels.read_level(0, 500, 400, 300, 200), pixels)
        assert pixels.shape == (200, 300, 3)
    asked = [re.search(r"/instances/[\d.]+/frames/(\d+)$", path) for _, path, *_ in served.log]
    assert sorted(int(found[1]) for found in asked) == [2 * 9 + 3, 2 * 9 + 4, 3 * 9 + 3, 3 * 9 + 4]
    assert sum(size for *_, size in served.log) < 0.1 * whole


@pytest.mark.slow
def test_masks_are_those_of_the_files(served, pyramid, tmp_path):
    model = pointwise_bundle(tmp_path / "model", mpp=0.5)
    address = served.add(*pyramid)
    served.log.clear()
    done = segment(address, model, tmp_path / "web")
    assert done.exit_code == 0, done.output
    folder = tmp_path / "web" / uid_of(address)
    assert segment(pyramid[0], model, tmp_path / "out").exit_code == 0
    assert np.array_equal(mask_of(folder), mask_of(tmp_path / "out" / pyramid[0].stem))
    kinds = Counter(re.sub(r"[\d.]{4,}|(?<=/)\d+", "N", path) for _, path, *_ in served.log)
    assert kinds.keys() == {
        f"{dicomwebs.ROOT}/studies/N/series/N/{what}"
        for what in ("metadata", "instances/N/frames/N")
    }
    # Once for the thumbnail of so small a slide, and once for the blocks that want it.
    asked = Counter(path for _, path, *_ in served.log)
    assert len(asked) <= 1 + 81 + 9 + 1
    assert max(asked.values()) <= 4
    run = json.loads((folder / "run.json").read_text("utf-8"))
    assert run["slide"]["path"] == address
    assert run["slide"]["mpp_source"] == "DICOMweb"
    served.log.clear()
    assert segment(address, model, tmp_path / "web").exit_code == 0
    assert {path.rpartition("/")[2] for _, path, *_ in served.log} <= {"metadata"}


@pytest.mark.slow
def test_a_part_of_the_slide_takes_a_part_of_the_bytes(served, levels, tmp_path):
    large = [np.tile(level, (4, 4, 1)) for level in levels]
    paths = write_pyramid(tmp_path / "slide", large, MPP, tile=(256, 256))
    whole = sum(path.stat().st_size for path in paths)
    ring = [[[2600, 3100], [3100, 3100], [3100, 3400], [2600, 3400], [2600, 3100]]]
    feature = {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": ring}}
    (tmp_path / "roi.geojson").write_text(json.dumps({**feature, "properties": {}}))
    model = pointwise_bundle(tmp_path / "model", mpp=0.25, patch_size=64, overlap=0)
    address = served.add(*paths)
    served.log.clear()
    done = segment(address, model, tmp_path / "web", "--roi", tmp_path / "roi.geojson")
    assert done.exit_code == 0, done.output
    read = sum(size for *_, size in served.log)
    print(f"{read:,} of {whole:,} bytes, {read / whole:.3f}")
    assert read < 0.2 * whole
    own = dcmread(paths[0], stop_before_pixels=True).SOPInstanceUID
    found = {int(path.rpartition("/")[2]) for _, path, *_ in served.log if f"{own}/f" in path}
    # Of 744 those of the ROI, a few around it, and a few where levels are compared.
    assert found >= {1 + row * 31 + column for row in (12, 13) for column in (10, 11, 12)}
    assert len(found) < 50
    assert not [path for _, path, *_ in served.log if re.search(r"/instances/[\d.]+$", path)]


def test_a_study_and_a_server_are_folders_of_slides(
    served, pyramid, data_dir, tmp_path, slide_pixels
):
    address = served.add(*pyramid)
    other = served.add(
        *write_pyramid(tmp_path / "b", [slide_pixels[:300]], MPP, PatientID="OTHER-ONE")
    )
    annotations = served.add(data_dir / "wsi" / "dicom_highdicom" / "sm_annotations.dcm")
    study = address.partition("/series/")[0]
    assert list(map(str, find_slides(study, output=tmp_path))) == [address]
    every = set(map(str, find_slides(served.address, output=tmp_path)))
    assert {address, other} <= every
    assert annotations not in every
    found = find_slides(f"{served.address}/?PatientID=OTHER-ONE", output=tmp_path)
    assert list(map(str, found)) == [other]
    (tmp_path / "list.txt").write_text(f"{address}\n{other}\n{study}\n")
    with open_source(study) as slide, open_source(address) as own:
        assert slide.fingerprint == own.fingerprint
    with pytest.raises(SourceError, match=r"0 series of slides; name one$"):
        open_source(f"{served.address}?PatientID=NOBODY")
    with pytest.raises(
        SourceError, match=f"series of slides; name one of .*{re.escape(served.address)}/"
    ):
        open_source(served.address)
    model = pointwise_bundle(tmp_path / "model", mpp=0.5)
    done = segment(f"{served.address}?PatientID=NOBODY", model, tmp_path / "none")
    assert done.exit_code == 2
    assert "no slides found" in done.output
    assert "NOBODY" not in done.output


def test_info_tells_of_it(served, pyramid):
    address = served.add(*pyramid)
    found = json.loads(call("info", address, "--json").output)
    assert found["path"] == address
    assert found["size"] == [1931, 1487]
    assert found["backend"] == "dicomweb"
    assert len(found["levels"]) == 3
    refused = call("info", address, "--series", "1")
    assert refused.exit_code == 1
    assert "has no series" in refused.output


def test_frames_that_were_left_out_are_computed_and_concatenations_are_one(
    served, levels, tmp_path
):
    left_out = [(0, 0, 0), (1, 1, 1), (1, 0, 0)]
    paths = write_pyramid(tmp_path / "a", levels, MPP, kind="raw", left_out=left_out)
    address = served.add(*paths)
    with open_source(address) as found, open_source(paths[0]) as local:
        assert not found.pixels.holds(0, 0, 0)
        assert found.pixels.holds(0, 1, 0)
        assert np.array_equal(found.thumbnail(300)[0], local.thumbnail(300)[0])
        for mpp in (0.3, 1.2):
            view, expected = found.at(mpp, tolerance=0.2), local.at(mpp, tolerance=0.2)
            assert np.array_equal(view.read((0, 0), view.shape), expected.read((0, 0), view.shape))
    for more in ({}, {"left_out": left_out}):
        paths = write_pyramid(tmp_path / "b", levels, MPP, kind="raw", parts=3, **more)
        with open_source(served.add(*paths)) as slide:
            pixels = slide.pixels.read_level(0, 0, 0, *slide.size)
            expected = levels[0].copy()
            if more:
                expected[:176, :240] = 255
            assert np.array_equal(pixels, expected)


def test_where_frames_lie_is_not_guessed(served, levels, tmp_path):
    (path,) = write_pyramid(tmp_path / "a", levels[1:2], MPP, kind="raw", left_out=[(1, 0, 0)])
    header = dcmread(path)
    del header.PerFrameFunctionalGroupsSequence
    header.save_as(path)
    with pytest.raises(SourceError, match=r"9 frames of 482 × 371 px, 0 expected, in 1 of 1"):
        open_source(served.add(path))
    # Two thirds of a level, and two levels where there can be one.
    parts = write_pyramid(tmp_path / "b", levels[1:2], MPP, kind="raw", parts=3)
    with pytest.raises(SourceError, match="6 frames of 482 × 371 px, 9 expected, in 2 of 3 inst"):
        open_source(served.add(*parts[1:]))
    sparse = {"kind": "raw", "parts": 3, "left_out": [(0, 0, 0)]}
    with pytest.raises(SourceError, match="in 2 of 3 instances: parts are missing"):
        open_source(served.add(*write_pyramid(tmp_path / "c", levels[1:2], MPP, **sparse)[1:]))
    copies = [dcmread(write_pyramid(tmp_path / "d", levels[1:2], MPP, kind="raw")[0])] * 2
    for number, copy in enumerate(copies):
        copy.SOPInstanceUID = copy.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        copy.save_as(tmp_path / f"{number}.dcm")
    with pytest.raises(SourceError, match=r"18 frames .* 9 expected.*there are focal planes"):
        open_source(served.add(tmp_path / "0.dcm", tmp_path / "1.dcm"))


def test_a_proxy_is_asked_where_there_is_one(tmp_path, pyramid, monkeypatch):
    with dicomwebs.own(tmp_path / "server") as port, dicomwebs.listening(port) as proxy:
        address = Served(proxy, tmp_path / "server", None).add(*pyramid)
        there = address.replace(proxy.address, "dicomweb+http://pacs.invalid/dicom-web")
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.server_port}")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        with open_source(there) as slide:
            assert slide.size == (1931, 1487)
        assert all(path.startswith("http://pacs.invalid/") for _, path, *_ in proxy.log)
        proxy.log.clear()
        open_source(address).close()
        assert all(path.startswith(dicomwebs.ROOT) for _, path, *_ in proxy.log)


def test_a_profile_is_read_when_it_is_wanted(served, pyramid, tmp_path):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    header = dcmread(pyramid[0])
    header.OpticalPathSequence = [Dataset()]
    header.OpticalPathSequence[0].ICCProfile = profile + bytes(len(profile) % 2)
    header.SeriesInstanceUID, header.SOPInstanceUID = generate_uid(), generate_uid()
    header.file_meta.MediaStorageSOPInstanceUID = header.SOPInstanceUID
    header.save_as(tmp_path / "a.dcm")
    address = served.add(tmp_path / "a.dcm")
    with open_source(address) as slide, openslide.OpenSlide(tmp_path / "a.dcm") as local:
        found = slide.pixels.icc_profile()
        assert found[: len(profile)] == local.color_profile.tobytes()[: len(profile)] == profile
    with open_source(address, icc="apply") as slide:
        assert "is sRGB already" in "; ".join(slide.doubts)


@pytest.mark.parametrize("style", dicomwebs.STYLES)
def test_servers_answer_in_several_ways(tmp_path, pyramid, style):
    with dicomwebs.own(tmp_path / "server", style) as port, dicomwebs.listening(port) as listener:
        served = Served(listener, tmp_path / "server", None)
        address = served.add(*pyramid)
        assert is_equal(address, pyramid[0])
        # What is not served is not asked for again and again.
        assert Counter(status for *_, status, _ in listener.log)[406] <= 2 * 16


@pytest.mark.slow
def test_a_server_that_is_gone_for_a_while_costs_no_block(served, pyramid, tmp_path):
    model = pointwise_bundle(tmp_path / "model", mpp=0.25, patch_size=64, overlap=0)
    address, asked = served.add(*pyramid), []

    def hang_up(request):
        asked.append(request.path)
        if "/frames/" in request.path and len(asked) > 150:
            request.close_connection = True
            return True
        return False

    served.listener.fault = hang_up
    failed = segment(address, model, tmp_path / "out")
    assert failed.exit_code == 1
    assert "cannot be reached" in failed.output
    assert "the same command goes on" in failed.output
    folder = tmp_path / "out" / uid_of(address)
    assert json.loads((folder / "run.json").read_text("utf-8"))["status"] == "failed"
    done = len(list((folder / ".store" / "blocks").iterdir()))
    assert done
    served.listener.fault = None
    assert segment(address, model, tmp_path / "out").exit_code == 0
    assert segment(pyramid[0], model, tmp_path / "local").exit_code == 0
    assert np.array_equal(mask_of(folder), mask_of(tmp_path / "local" / pyramid[0].stem))


def test_a_hiccup_is_not_even_noticed(served, pyramid):
    address, count = served.add(*pyramid), Counter()

    def hiccup(request):
        count[request.path] += 1
        if count[request.path] == 1:
            request.close_connection = True
            return True
        if count[request.path] == 2:
            request.answer(503)
            return True
        if count[request.path] == 3:
            # It breaks off.
            request.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf")
            request.close_connection = True
            return True
        return False

    served.listener.fault = hiccup
    with open_source(address) as slide:
        slide.pixels.read_level(2, 0, 0, *slide.pixels.level_sizes[2])


def test_a_frame_that_is_not_there_is_damage_to_the_frame_alone(served, pyramid, tmp_path):
    address = served.add(*pyramid)
    # Of level 2, which has one frame for each column and row.
    lost = re.compile(r"/frames/1$")

    def fault(request):
        if lost.search(request.path):
            request.answer(404)
            return True
        return False

    served.listener.fault = fault
    with open_source(address) as slide:
        with pytest.raises(SourceError, match="level 0 cannot be read at x 0, y 0, "):
            slide.pixels.read_level(0, 0, 0, 10, 10)
        slide.pixels.read_level(0, 240, 0, 10, 10)


@pytest.mark.slow
def test_who_asks_is_told_by_token_or_netrc_and_kept_nowhere(
    served, pyramid, tmp_path, monkeypatch
):
    address, wanted = served.add(*pyramid), {}

    def gate(request):
        if request.headers.get("Authorization") in wanted:
            return False
        request.answer(401)
        return True

    served.listener.fault = gate
    with pytest.raises(UnreachableError, match=r"401.*set WSI_PIPELINE_DICOMWEB_TOKEN.*netrc"):
        open_source(address)
    monkeypatch.setenv("WSI_PIPELINE_DICOMWEB_TOKEN", "s3cret\n")
    wanted["Bearer s3cret"] = True
    model = pointwise_bundle(tmp_path / "model", mpp=0.5)
    assert segment(address, model, tmp_path / "out").exit_code == 0
    monkeypatch.delenv("WSI_PIPELINE_DICOMWEB_TOKEN")
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password s3cret\n")
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    wanted["Basic bWU6czNjcmV0"] = True
    open_source(address).close()
    done = segment(address, model, tmp_path / "named")
    assert done.exit_code == 0, done.output
    wanted.clear()
    refused = segment(address, model, tmp_path / "refused")
    assert refused.exit_code == 1
    assert "401" in refused.output
    with pytest.raises(WsiPipelineError, match="say who asks") as told:
        open_source(address.replace("://", "://me:s3cret@"))
    assert "s3cret" not in str(told.value)
    texts = [refused.output.encode(), done.output.encode()]
    texts += [p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and p.name != "netrc"]
    assert not [text for text in texts if b"s3cret" in text]


def test_what_cannot_be_is_told_in_a_sentence(served, data_dir, pyramid, tmp_path, monkeypatch):
    address = served.add(*pyramid)
    label = served.add(data_dir / "wsi" / "dicom" / "test_wsi.dcm")
    with pytest.raises(SourceError, match="without whole-slide images"):
        open_source(label)
    grey = served.add(data_dir / "wsi" / "dicom_highdicom" / "sm_image_grayscale.dcm")
    with pytest.raises(SourceError, match="1 × 16 bits, MONOCHROME2; expected 8-bit RGB"):
        open_source(grey)
    with pytest.raises(SourceError, match=r"the server says 404.*whether the address is right"):
        open_source(address + ".1")
    served.listener.fault = lambda request: request.answer(200, b"<html>") or True
    with pytest.raises(SourceError, match="gives no JSON of DICOM"):
        open_source(address)
    nobody = f"dicomweb+http://127.0.0.1:{dicomwebs.free_port()}/dicom-web/studies/1.2?PatientID=7"
    with pytest.raises(UnreachableError, match=r"cannot be reached: .*refused") as told:
        open_source(nobody)
    assert "PatientID" not in str(told.value)
    with pytest.raises(UnreachableError, match="cannot be reached: Failed to parse"):
        find_slides("dicomweb://h:99999/a", output=tmp_path)
    assert as_path("dicomweb://[::1]:8042/a").url == "https://[::1]:8042/a"
    for wrong in (
        "dicomweb://[::1/a",
        "dicomweb://h:port/a",
        "dicomweb:///a",
        "dicomweb+ftp://a",
        f"{address}/instances/1.2",
    ):
        with pytest.raises(WsiPipelineError, match="no address of DICOMweb; expected dicomweb://"):
            open_source(wrong)


@pytest.mark.parametrize(
    ("text", "shown", "url"),
    [
        ("dicomweb://h/a/b/", "dicomweb://h/a/b", "https://h/a/b"),
        ("dicomweb+https://h:1/a/studies", "dicomweb://h:1/a", "https://h:1/a"),
        ("dicomweb+http://h/series?a=1", "dicomweb+http://h?a=1", "http://h"),
        ("dicomweb://h/x/studies/1.2/series", "dicomweb://h/x/studies/1.2", "https://h/x"),
        ("dicomweb://h/studies/1/series/2/?a", "dicomweb://h/studies/1/series/2?a", "https://h"),
    ],
)
def test_addresses(text, shown, url):
    found = as_path(text)
    assert str(found) == shown
    assert pickle.loads(pickle.dumps(found)) == found == as_path(shown)
    assert found.url == url


def as_json(request, *entries):
    request.answer(200, json.dumps(entries).encode(), "application/dicom+json")
    return True


def listed(series, study="1.1", modality="SM"):
    values = {"0020000D": study, "0020000E": series, "00080060": modality}
    return {tag: {"vr": "UI", "Value": [value]} for tag, value in values.items()}


def test_series_of_other_kinds_hide_no_slides(served, tmp_path):
    """A server that neither leaves out what is no slide nor gives more than asked for."""
    every = [listed(f"1.2.{n}", modality="CT") for n in range(300)]
    every += [listed("1.3.1"), listed("1.3.2")]

    def fault(request):
        query = dict(parse_qsl(urlsplit(request.path).query))
        start = int(query["offset"])
        return as_json(request, *every[start : start + int(query["limit"])])

    served.listener.fault = fault
    found = find_slides(served.address, output=tmp_path)
    assert [uid_of(str(address)) for address in found] == ["1.3.1", "1.3.2"]


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        ({"0020000E": "1.2"}, "no JSON of DICOM"),
        ({"0020000E": {"vr": "UI", "Value": 7}}, "no JSON of DICOM"),
        (listed("a/../../b"), r"no series of DICOM, '/studies/1.1/series/a/../../b'"),
        (listed(7, study=None), "no series of DICOM, '/series/7'"),
        (b"[" * 200_000, "no JSON of DICOM"),
    ],
)
def test_strange_answers_are_told_in_a_sentence(served, tmp_path, entry, told):
    served.listener.fault = lambda request: (
        request.answer(200, entry) or True if isinstance(entry, bytes) else as_json(request, entry)
    )
    with pytest.raises(SourceError, match=told):
        find_slides(served.address, output=tmp_path)


def test_more_than_was_asked_for_is_not_kept(served, pyramid, monkeypatch):
    address, sent = served.add(*pyramid), []

    def fault(request):
        if "/frames/" not in request.path:
            return False
        request.send_response(200)
        request.send_header("Content-Length", str(1 << 40))
        request.end_headers()
        with contextlib.suppress(OSError):
            while len(sent) < 1000:
                request.wfile.write(bytes(1 << 20))
                sent.append(1)
        request.close_connection = True
        return True

    served.listener.fault = fault
    with open_source(address) as slide:
        # Twice a frame of 240 × 176 px, and 64 KiB.
        with pytest.raises(SourceError, match="more than 311 KiB came; is the address right"):
            slide.pixels.read_level(2, 0, 0, 10, 10)
        assert len(sent) < 100
    served.listener.fault = None
    monkeypatch.setattr(dicomweb, "MOST_JSON", 1000)
    with pytest.raises(SourceError, match=r"more than 0 KiB came.*metadata"):
        open_source(address)


@pytest.mark.parametrize("token", ["a\nb", "a b", "schlüssel"])
def test_a_token_that_no_header_takes_is_not_shown(served, tmp_path, monkeypatch, token):
    monkeypatch.setenv("WSI_PIPELINE_DICOMWEB_TOKEN", token)
    with pytest.raises(WsiPipelineError, match="DICOMWEB_TOKEN has spaces, or letters") as told:
        find_slides(served.address, output=tmp_path)
    assert token not in str(told.value)


def test_what_says_who_asks_and_how_may_be_damaged(served, tmp_path, monkeypatch):
    (tmp_path / "netrc").write_bytes(b"machine 127.0.0.1 login \xff\xfe password x\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    served.listener.fault = as_json
    assert find_slides(served.address, output=tmp_path) == []
    monkeypatch.setenv("http_proxy", "127.0.0.1:3128")
    monkeypatch.setenv("no_proxy", "")
    with pytest.raises(WsiPipelineError, match="http_proxy: Proxy URL had no scheme"):
        find_slides(served.address, output=tmp_path)


def test_frames_between_tiles_are_refused(served, levels, tmp_path):
    (path,) = write_pyramid(tmp_path / "a", levels[1:2], MPP, kind="raw", left_out=[(0, 0, 0)])
    header = dcmread(path)
    place = header.PerFrameFunctionalGroupsSequence[1].PlanePositionSlideSequence[0]
    place.ColumnPositionInTotalImagePixelMatrix += 7
    header.save_as(path)
    with pytest.raises(SourceError, match=r"a frame at x \d+, y \d+, between tiles of \(240, 176"):
        open_source(served.add(path))


def test_a_server_is_no_folder(served, pyramid, tmp_path):
    model = pointwise_bundle(tmp_path / "model", mpp=0.5)
    for args in (
        ("segment", pyramid[0], "--model", model, "--output", served.address),
        ("status", served.address),
    ):
        found = call(*args)
        assert found.exit_code in (1, 2)
        assert "DICOMweb" in found.output
        assert found.exception is None or isinstance(found.exception, SystemExit)


# --- sent there ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sent(server, pyramid, tmp_path_factory):
    """Return the run of a slide, of which all DICOM was sent to where the slide came from."""
    server.listener.fault = None
    folder = tmp_path_factory.mktemp("sent")
    address = server.add(*pyramid)
    model = pointwise_bundle(folder / "model", mpp=0.5)
    outputs = ("--outputs", "zarr,geojson,probability,dicom")
    done = segment(address, model, folder / "out", *outputs)
    assert done.exit_code == 0, done.output
    done = call("export", folder / "out", "--store", server.address)
    assert done.exit_code == 0, done.output
    assert "stored: 4 files of DICOM, 0 were there" in done.output
    return folder / "out" / uid_of(address)


def fetched(server, path):
    """Return what a server gives for a file's instance, as another program would get it."""
    own = dcmread(path, stop_before_pixels=True)
    if server.port is None:
        (found,) = [
            p
            for p in server.folder.glob("*.dcm")
            if dcmread(p, specific_tags=["SOPInstanceUID"]).SOPInstanceUID == own.SOPInstanceUID
        ]
        return found.read_bytes()
    there = http.client.HTTPConnection("127.0.0.1", server.port)
    where = f"/studies/{own.StudyInstanceUID}/series/{own.SeriesInstanceUID}/instances"
    accept = {"Accept": 'multipart/related; type="application/dicom"; transfer-syntax=*'}
    there.request("GET", f"{dicomwebs.ROOT}{where}/{own.SOPInstanceUID}", headers=accept)
    with contextlib.closing(there), there.getresponse() as answer:
        mark = answer.headers["Content-Type"].partition("boundary=")[2].partition(";")[0].strip('"')
        body = (b"\r\n" + answer.read()).split(f"\r\n--{mark}".encode())[1]
    return body.partition(b"\r\n\r\n")[2]


@pytest.mark.slow
def test_what_was_sent_comes_back_bit_by_bit(server, sent, tmp_path):
    run = sent
    names = {"mask.dcm", "mask-1.dcm", "probability.dcm", "annotations.dcm"}
    assert {path.name for path in run.glob("*.dcm")} == names
    for name in names:
        (tmp_path / name).write_bytes(fetched(server, run / name))
    for name, array in (("mask", "mask.ome.zarr/0"), ("mask-1", "mask.ome.zarr/1")):
        found = highdicom.seg.segread(tmp_path / f"{name}.dcm")
        pixels = found.get_total_pixel_matrix(combine_segments=True)
        assert np.array_equal(pixels, zarr.open_array(run / array, mode="r")[:])
    found = highdicom.seg.segread(tmp_path / "probability.dcm")
    planes = found.get_total_pixel_matrix(rescale_fractional=False)
    stored = zarr.open_array(run / "probability.ome.zarr" / "0", mode="r")[:]
    assert np.array_equal(np.moveaxis(planes, -1, 0), stored)
    groups, own = (
        highdicom.ann.annread(folder / "annotations.dcm").get_annotation_groups()
        for folder in (tmp_path, run)
    )
    assert len(groups) == len(own) > 1
    for group_there, group_here in zip(groups, own, strict=True):
        here, there = (g.get_graphic_data("2D") for g in (group_here, group_there))
        assert all(np.array_equal(a, b) for a, b in zip(here, there, strict=True))
        assert group_here.label == group_there.label


@pytest.mark.slow
def test_files_of_a_slide_there_are_those_of_its_files_here(server, sent, pyramid, tmp_path):
    run = sent
    model = run.parents[1] / "model"
    outputs = ("--outputs", "zarr,geojson,probability,dicom")
    done = segment(pyramid[0], model, tmp_path / "local", *outputs)
    assert done.exit_code == 0, done.output
    local = tmp_path / "local" / pyramid[0].stem
    source = dcmread(pyramid[0], stop_before_pixels=True)
    # Which run it was is told in identifiers alone.
    of_run = {"SOPInstanceUID", "SeriesInstanceUID", "PyramidUID", "AnnotationGroupUID"}
    of_run |= {"DimensionOrganizationUID", "MediaStorageSOPInstanceUID"}
    for path in run.glob("*.dcm"):
        ours, theirs = dcmread(path), dcmread(local / path.name)
        for header in (ours, theirs):
            (series,) = header.ReferencedSeriesSequence
            assert series.SeriesInstanceUID == source.SeriesInstanceUID
            (instance,) = series.ReferencedInstanceSequence
            assert instance.ReferencedSOPInstanceUID == source.SOPInstanceUID
            header.ReferencedSeriesSequence = []
            header.walk(lambda item, e: item.__delitem__(e.tag) if e.keyword in of_run else None)
        assert ours == theirs


@pytest.mark.slow
def test_it_is_sent_once_and_what_is_not_stored_is_named(server, sent, tmp_path, pyramid):
    run = sent
    server.listener.fault = None
    server.log.clear()
    # Made again, it has the same identifier.
    made = (run / "mask-1.dcm").read_bytes()
    (run / "mask-1.dcm").unlink()
    again = call("export", run, "--store", f"{server.address}/")
    assert (run / "mask-1.dcm").read_bytes() == made
    assert again.exit_code == 0, again.output
    assert "stored: 0 files of DICOM, 4 were there" in again.output
    assert {method for method, *_ in server.log} == {"GET"}
    with (
        dicomwebs.own(tmp_path / "b", refuses=lambda own: own.Modality == "ANN") as port,
        dicomwebs.listening(port) as other,
    ):
        failed = call("export", run, "--store", other.address)
        assert failed.exit_code == 1
        uid = dcmread(run / "annotations.dcm", specific_tags=["SOPInstanceUID"]).SOPInstanceUID
        assert f"annotations.dcm (instance {uid}) is not stored at" in failed.output
        assert "reason A700" in failed.output

        def hang_up(request):
            request.close_connection = True
            return request.command == "POST"

        other.fault = hang_up
        failed = call("export", run, "--store", other.address)
        assert failed.exit_code == 1
        assert "the same command goes on" in failed.output
    without = tmp_path / "none"
    segment(pyramid[2], run.parents[1] / "model", without, "--any-resolution", "--outputs", "zarr")
    failed = call("export", without, "--store", server.address)
    assert failed.exit_code == 1
    assert "no DICOM to send: --outputs dicom writes it" in failed.output
    wrong = call("export", run, "--store", "https://server/dicom-web")
    assert wrong.exit_code == 2
    assert "no address of DICOMweb; expected dicomweb://" in wrong.output


def test_what_a_server_tells_of_others_keeps_no_file_back(pyramid, tmp_path):
    """Neither instances that were not asked for nor answers of nonsense."""
    refused = {"00081198": {"vr": "SQ", "Value": [{"00081197": {"vr": "US", "Value": ["x"]}}]}}
    with dicomwebs.own(tmp_path / "server") as port, dicomwebs.listening(port) as listener:
        other = {"00080018": {"vr": "UI", "Value": ["1.2.3"]}}
        listener.fault = lambda request: request.command == "GET" and as_json(request, other)
        assert Client(as_path(listener.address)).send(pyramid[0])
        assert len(list((tmp_path / "server").iterdir())) == 1
        own = {"00080018": {"vr": "UI", "Value": [dcmread(pyramid[0]).SOPInstanceUID]}}
        listener.fault = lambda request: request.command == "GET" and as_json(request, other, own)
        assert not Client(as_path(listener.address)).send(pyramid[0])
        listener.fault = lambda request: (
            as_json(request, other)
            if request.command == "GET"
            else (request.answer(409, json.dumps(refused).encode()) or True)
        )
        (tmp_path / "a.dcm").write_bytes(b"no DICOM")
        with pytest.raises(StoreError, match=r"a\.dcm is no DICOM; remove it, and export again"):
            Client(as_path(listener.address)).send(tmp_path / "a.dcm")
        with pytest.raises(StoreError, match=r"is not stored at .*: the server says 409"):
            Client(as_path(listener.address)).send(pyramid[1])


MEASURE = """
import resource, sys
from pathlib import Path
from wsi_pipeline.files.dicomweb import Client, read_address
client = Client(read_address(sys.argv[1]))
small = client.send(Path(sys.argv[2]))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert client.send(Path(sys.argv[3]))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_does_not_grow_with_a_file_that_is_sent(server, tmp_path):
    server.listener.fault = None
    paths = []
    for side in (100, 6000):
        pixels = np.zeros((side, side, 3), np.uint8)
        paths += write_pyramid(tmp_path / str(side), [pixels], MPP, kind="raw")
    size = paths[1].stat().st_size
    assert size > 100 << 20
    command = [sys.executable, "-c", MEASURE, server.address, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) * 1024 < size / 5
