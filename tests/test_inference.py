"""The predictor and the cache of straddling patches."""

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
import torch
from bundles import (
    THRESHOLDS,
    classify,
    lightmuseg_bundle,
    pointwise_bundle,
    small_unet_bundle,
    write_toml,
)
from safetensors.torch import load_file, save_file
from scans import scan_bundle

from wsi_pipeline.bundle import load_bundle
from wsi_pipeline.errors import BundleError
from wsi_pipeline.geometry import Block
from wsi_pipeline.inference.classes import best_class
from wsi_pipeline.inference.ensemble import kept_predictor
from wsi_pipeline.inference.patch_cache import PatchCache
from wsi_pipeline.inference.predictor import (
    Predictor,
    _warn,
    choose_device,
    choose_dtype,
    tell_choice,
)
from wsi_pipeline.networks import build
from wsi_pipeline.options import PredictOptions, turns
from wsi_pipeline.schedule.worker_state import WorkerCache

PIXELS = np.random.default_rng(0).integers(0, 256, (150, 200, 3), np.uint8)
REGION = torch.from_numpy(PIXELS)
ORIGINS = np.array([[0, 0], [0, 72], [22, 72], [10, 11], [22, 1]])


@pytest.mark.parametrize("batch_size", [1, 2, 4, 8])
def test_a_pointwise_program_sees_the_right_pixels(tmp_path, batch_size):
    bundle = load_bundle(pointwise_bundle(tmp_path, mpp=0.5, patch_size=128))
    predictor = Predictor(bundle, device="cpu", batch_size=batch_size)
    found = list(predictor.predict(REGION, ORIGINS))
    assert len(found) == len(ORIGINS)
    for (y, x), probabilities in zip(ORIGINS, found, strict=True):
        assert probabilities.shape == (3, 128, 128)
        expected = classify(PIXELS[y : y + 128, x : x + 128])
        assert (probabilities.argmax(0).numpy() == expected).all()
        assert torch.allclose(probabilities.sum(0), torch.ones(128, 128))
    assert THRESHOLDS == (150, 215)


def test_inputs_are_scaled_then_normalised(tmp_path):
    bundle = load_bundle(lightmuseg_bundle(tmp_path, mpp=0.5, patch_size=128))
    (found,) = Predictor(bundle, device="cpu", precision="fp32").predict(REGION, ORIGINS[:1])
    x = torch.from_numpy(PIXELS[:128, :128].copy()).permute(2, 0, 1).float() / 255
    mean, std = (torch.tensor(v).reshape(3, 1, 1) for v in (bundle.input.mean, bundle.input.std))
    with torch.inference_mode():
        expected = build(bundle).module(((x - mean) / std)[None]).softmax(1)[0]
    assert torch.allclose(found, expected, atol=1e-5)


def test_logits_are_divided_by_the_temperature(tmp_path):
    bundle = load_bundle(lightmuseg_bundle(tmp_path, mpp=0.5, patch_size=128))
    plain, soft = (
        next(Predictor(replace(bundle, temperature=t), device="cpu").predict(REGION, ORIGINS))
        for t in (1.0, 2.5)
    )
    torch.testing.assert_close(soft, (plain.log() / 2.5).softmax(0), atol=1e-4, rtol=0)


def shown(pixels, tta):
    """Yield how a patch (*patch, C) is shown, and what brings (K, *patch) back, by numpy."""
    axes = range(pixels.ndim - 1)
    for exchanged in (False, True)[: 1 + (tta == "d4")]:
        for flags in itertools.product((False, True), repeat=len(axes)):
            if tta == "flip" and any(flags[:-1]):
                continue
            flips = [axis for axis, is_flipped in zip(axes, flags, strict=True) if is_flipped]
            y, x = axes[-2:]
            seen = np.flip(np.swapaxes(pixels, y, x) if exchanged else pixels, flips)

            def back(planes, exchanged=exchanged, flips=flips, y=y, x=x):
                planes = np.flip(planes, [axis + 1 for axis in flips])
                return np.swapaxes(planes, y + 1, x + 1) if exchanged else planes

            yield np.ascontiguousarray(seen), back


def each_told(bundle, pixels, tta):
    """Return mask, labels and features of one patch."""
    labels, features = [], []
    predictor = Predictor(bundle, device="cpu", precision="fp32", tta=tta)
    origin = np.zeros((1, pixels.ndim - 1), np.int64)
    with closing(predictor):
        (mask,) = predictor.predict(
            predictor.upload(pixels), origin, labels=labels, features=features
        )
    return [part.numpy() for part in (mask, *labels, *features)]


class Lopsided(torch.nn.Module):
    """Logits, and labels, that depend on the place in the patch along every axis."""

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        ramp = torch.zeros_like(x[:, :1])
        for axis in range(2, x.ndim):
            size = [1] * x.ndim
            size[axis] = x.shape[axis]
            ramp = ramp + axis * torch.linspace(0, 1, x.shape[axis]).reshape(size)
        told = (ramp * x[:, :1]).flatten(1).mean(1)
        mask = torch.cat([ramp, x[:, :1] * 3, x[:, :1] + ramp * ramp], dim=1)
        return {"mask": mask, "label": torch.stack([told, 1 - told], dim=1)}


@pytest.mark.parametrize(
    ("kind", "tta", "passes"),
    [
        ("network", "flip", 2), ("network", "mirror", 4), ("network", "d4", 8),
        ("sigmoid", "d4", 8), ("wide", "mirror", 4),
        ("volume", "flip", 2), ("volume", "mirror", 8), ("volume", "d4", 16),
    ],
)  # fmt: skip
def test_augmented_probabilities_are_the_mean_over_single_runs(tmp_path, kind, tta, passes):
    if kind in ("network", "sigmoid"):
        bundle = load_bundle(small_unet_bundle(tmp_path))
        if kind == "sigmoid":
            weights = load_file(tmp_path / "model.safetensors")
            weights |= {name: weights[name][:1] for name in ("outc.weight", "outc.bias")}
            save_file(weights, tmp_path / "model.safetensors")
            bundle = replace(
                bundle,
                network_options=bundle.network_options | {"classes": 1},
                classes=bundle.classes[:2],
                activation="sigmoid",
            )
    else:
        size = {"wide": (32, 48), "volume": (6, 10, 10)}[kind]
        modality, resolution = {
            "wide": ("image", "fit = [32, 48]"),
            "volume": ("volume", "spacing_mm = [2.0, 1.0, 1.0]"),
        }[kind]  # fmt: skip
        bundle = load_bundle(
            scan_bundle(
                tmp_path, modality=modality, resolution=resolution, patch_size=size,
                program=Lopsided, labels='labels = ["one", "other"]',
            )
        )  # fmt: skip
    bundle = replace(bundle, temperature=1.7)
    shape = (*bundle.input.patch_size, bundle.input.channels)
    rng = np.random.default_rng(1)
    pixels = rng.integers(0, 256, shape, np.uint8)
    if bundle.modality == "volume":
        pixels = rng.random(shape, np.float32)
    found = each_told(bundle, pixels, tta)
    singles = [(each_told(bundle, seen, "none"), back) for seen, back in shown(pixels, tta)]
    assert len(singles) == passes
    expected = np.mean([back(told[0]) for told, back in singles], axis=0)
    np.testing.assert_allclose(found[0], expected, atol=2e-6)
    assert np.abs(found[0] - singles[0][0][0]).max() > 1e-3
    # labels of the one, features of the other
    assert len(found) == 2
    np.testing.assert_allclose(found[1], np.mean([told[1] for told, _ in singles], 0), atol=2e-5)
    assert not np.allclose(found[1], singles[0][0][1], atol=2e-5)
    # the bundle's own counts where nobody says
    np.testing.assert_array_equal(each_told(replace(bundle, tta=tta), pixels, None)[0], found[0])
    np.testing.assert_array_equal(
        each_told(replace(bundle, tta=tta), pixels, "none")[0], singles[0][0][0]
    )


@pytest.mark.parametrize(
    ("size", "spacing", "told"),
    [((16, 24), (), r"\(16, 24\)"), ((8, 16, 16), (1.0, 1.0, 2.0), r"\(1.0, 2.0\)")],
)
def test_what_cannot_be_turned_by_a_right_angle_is_refused(size, spacing, told):
    with pytest.raises(ValueError, match=f"along y and x they have {told}; expected the same"):
        turns("d4", size, spacing)
    assert len(turns("mirror", size, spacing)) == 2 ** len(size)
    assert turns("none", size, spacing) == [(False, ())]


def predicted(bundle, origins, **options):
    predictor = Predictor(load_bundle(bundle), device="cpu", precision="fp32", **options)
    return torch.stack(list(predictor.predict(REGION, origins)))


def test_neither_threads_nor_company_change_a_bit(tmp_path):
    """What makes masks independent of block size and number of workers."""
    bundle = lightmuseg_bundle(tmp_path, mpp=0.5, patch_size=128)
    alone = torch.cat([predicted(bundle, ORIGINS[i : i + 1], threads=1) for i in range(5)])
    for threads in (1, 2, 3):
        assert torch.equal(predicted(bundle, ORIGINS, threads=threads), alone)
        assert torch.equal(predicted(bundle, ORIGINS[1:4], threads=threads), alone[1:4])


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_lower_precision_is_near(tmp_path, precision):
    bundle = load_bundle(lightmuseg_bundle(tmp_path, mpp=0.5, patch_size=128))
    (exact,) = Predictor(bundle, device="cpu", precision="fp32").predict(REGION, ORIGINS[:1])
    (near,) = Predictor(bundle, device="cpu", precision=precision).predict(REGION, ORIGINS[:1])
    assert near.dtype == torch.float32
    assert (near - exact).abs().mean() < 0.05


class Exported(torch.nn.Module):
    def forward(self, x):
        return (0.5 - x[:, 1:2]) * 50


def test_an_exported_program_of_one_batch_size_gets_full_batches(tmp_path):
    write_toml(
        tmp_path,
        mpp=0.5,
        patch_size=128,
        overlap=0,
        network='"exported"',
        weights='"program.pt2"',
        activation='"sigmoid"',
        classes='[ { name = "Background" }, { name = "Tumor" } ]',
    )
    program = torch.export.export(Exported(), (torch.rand(3, 3, 128, 128),))
    torch.export.save(program, tmp_path / "program.pt2")
    predictor = Predictor(load_bundle(tmp_path), device="cpu", batch_size=2)
    found = list(predictor.predict(REGION, ORIGINS))
    assert len(found) == 5
    for (y, x), probabilities in zip(ORIGINS, found, strict=True):
        dark = PIXELS[y : y + 128, x : x + 128, 1] < 127.5
        assert ((probabilities[0] > 0.5).numpy() == dark).all()


def test_an_answer_of_the_wrong_shape_is_refused(tmp_path):
    folder = pointwise_bundle(tmp_path, mpp=0.5, patch_size=128)
    text = (folder / "model.toml").read_text()
    (folder / "model.toml").write_text(
        text.replace('  { name = "Stroma", color = [150, 200, 150] },\n', "")
    )
    predictor = Predictor(load_bundle(folder), device="cpu")
    with pytest.raises(BundleError, match=r"\(1, 3, 128, 128\).*\(1, 2, 128, 128\)"):
        list(predictor.predict(REGION, ORIGINS))


class Several(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [x]


class Otherwise(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"out": x}


class NoNumber(torch.nn.Module):
    """One pixel of the last patch but one is none."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / (x - x[:, :1, :1, :1] + (x.mean() != 0.5).float())


@pytest.mark.parametrize(
    ("program", "told"),
    [
        (Several, r"answers with mask .*'list'.* make it mask \(1, 3, 64, 64\)"),
        (Otherwise, r"answers with ; .* make it mask \(1, 3, 64, 64\)"),
        (NoNumber, "values that are no numbers; try `models check`"),
    ],
)
def test_an_answer_that_is_no_mask_is_told(tmp_path, program, told):
    bundle = load_bundle(pointwise_bundle(tmp_path, mpp=0.5, patch_size=64, program=program))
    grey = torch.full((64, 64, 3), 0.5)
    with (
        closing(Predictor(bundle, device="cpu")) as predictor,
        pytest.raises(BundleError, match=told),
    ):
        list(predictor.predict(grey, np.zeros((1, 2), np.int64)))


def test_a_program_that_fails_is_named(tmp_path):
    folder = pointwise_bundle(tmp_path, mpp=0.5, patch_size=128)
    text = (folder / "model.toml").read_text()
    (folder / "model.toml").write_text(
        text.replace("channels = 3", "channels = 1")
        .replace("[0.0, 0.0, 0.0]", "[0.0]")
        .replace("[1.0, 1.0, 1.0]", "[1.0]")
    )
    predictor = Predictor(load_bundle(folder), device="cpu")
    with pytest.raises(BundleError, match="test-"):
        list(predictor.predict(REGION[..., :1], ORIGINS))


class Hungry(torch.nn.Module):
    """More memory than there is for three patches and more."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch.empty(2**60 * (len(x) > 2))
        return x


def test_a_cpu_that_has_no_memory_is_asked_for_smaller_passes(tmp_path):
    bundle = load_bundle(pointwise_bundle(tmp_path, mpp=0.5, patch_size=128))
    with closing(Predictor(bundle, device="cpu", batch_size=4, network=Hungry())) as predictor:
        assert len(list(predictor.predict(REGION, ORIGINS))) == len(ORIGINS)
        assert predictor.queue.batch == 2


class Watching(torch.nn.Module):
    """Notes whether cuDNN may round, at the beginning of a pass and at its end."""

    def __init__(self, seen: list[bool], begun: threading.Event, other: threading.Event) -> None:
        super().__init__()
        self.seen, self.begun, self.other = seen, begun, other

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.begun.set()
        # a pass of the other model begins and ends, if it may
        self.other.wait(0.3)
        self.seen.append(torch.backends.cudnn.allow_tf32)
        return x


@pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda'")
def test_a_model_beside_another_has_exact_products_to_the_end_of_its_pass(tmp_path):
    bundle = load_bundle(pointwise_bundle(tmp_path, mpp=0.5, patch_size=128))
    seen, before = list[bool](), torch.backends.cudnn.allow_tf32
    marks = [threading.Event(), threading.Event()]
    models = [Watching(seen, *marks), Watching(seen, threading.Event(), threading.Event())]
    predictors = [Predictor(bundle, device="cpu", network=model) for model in models]
    inputs = torch.zeros(1, 3, 128, 128)
    for predictor in predictors:
        # the flags can be set without a card
        predictor.device = torch.device("cuda")
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(predictors[0]._answer, inputs)
        assert marks[0].wait(10)
        # it begins in the middle of the first one, and ends after it
        second = pool.submit(predictors[1]._answer, inputs)
        first.result(10)
        second.result(10)
    assert seen == [False, False]
    assert torch.backends.cudnn.allow_tf32 == before


def test_sources_that_a_worker_begins_at_once_have_one_predictor(tmp_path):
    bundle = load_bundle(lightmuseg_bundle(tmp_path, mpp=0.5, patch_size=64))
    keep, start = WorkerCache(), threading.Barrier(3)

    def begin(precision):
        start.wait(10)
        options = PredictOptions(device="cpu", precision=precision)
        return kept_predictor(bundle, options, 1, keep, ())

    with ThreadPoolExecutor(3) as pool:
        one, same, other = pool.map(begin, ["fp32", "fp32", "bf16"])
    assert one is same is not other
    # both formats go on, as of runs that were begun on other machines
    for predictor in (one, other):
        assert len(list(predictor.predict(REGION, ORIGINS[:2]))) == 2
        predictor.close()


def test_what_is_too_much_for_the_memory_is_predicted_in_smaller_passes(tmp_path, monkeypatch):
    bundle = load_bundle(pointwise_bundle(tmp_path, mpp=0.5, patch_size=32, overlap=0))
    origins = np.array([(y, x) for y in range(0, 118, 11) for x in range(0, 168, 16)])
    passes = []

    def short(self, patches):
        passes.append(len(patches))
        if len(passes) > 1 and len(patches) > 3:
            raise torch.OutOfMemoryError
        return run(self, patches)

    run = Predictor._run
    monkeypatch.setattr(Predictor, "_run", short)
    predictor = Predictor(bundle, device="cpu", batch_size=8, threads=1)
    found = list(predictor.predict(REGION, origins))
    assert len(found) == len(origins) == 121
    for (y, x), probabilities in zip(origins, found, strict=True):
        expected = classify(PIXELS[y : y + 32, x : x + 32])
        np.testing.assert_array_equal(probabilities.argmax(0), expected)
    assert passes[:4] == [8, 8, 4, 2]  # the first fits
    assert set(passes[4:]) == {2}
    monkeypatch.setattr(Predictor, "_run", lambda self, _: short(self, range(9)))
    predictor = Predictor(bundle, device="cpu", batch_size=4, threads=1)
    with pytest.raises(BundleError, match="with 1 patches at a time"):
        list(predictor.predict(REGION, origins))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_an_error():
    assert choose_device("auto") == torch.device("cpu")
    with pytest.raises(BundleError, match="--device cpu"):
        choose_device("cuda:0")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_auto_tells_what_it_takes_and_names_a_gpu_left_alone(tmp_path, monkeypatch, caplog):
    # as NVIDIA's driver writes it
    (tmp_path / "0000:01:00.0").mkdir()
    text = "Model: \t\t NVIDIA H100 80GB HBM3\nIRQ:   \t\t 16\n"
    (tmp_path / "0000:01:00.0" / "information").write_text(text, "utf-8")
    monkeypatch.setattr("wsi_pipeline.inference.predictor.NVIDIA", tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    _warn.cache_clear()
    with caplog.at_level("INFO"):
        tell_choice()
    assert "--device auto: the CPU, as torch shows no CUDA GPU" in caplog.text
    assert "H100" not in caplog.text
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    tell_choice()
    assert "NVIDIA H100 80GB HBM3 is there and not used: torch 2" in caplog.text


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="this machine has one")
def test_apples_gpu_is_taken_where_it_is():
    with pytest.raises(BundleError, match="--device mps: this machine shows no GPU of Apple's"):
        choose_device("mps")
    with pytest.raises(BundleError, match="expected auto, cpu, cuda, cuda:N or mps"):
        choose_device("mps:0")


@pytest.mark.skipif(
    not torch.cpu._is_avx512_bf16_supported(), reason="this processor computes no bf16"
)
@pytest.mark.parametrize("side", [96, 128, 256])
def test_light_networks_have_several_patches_a_pass_with_the_same_bits(tmp_path, side):
    bundle = load_bundle(lightmuseg_bundle(tmp_path, mpp=0.5, patch_size=side))
    region = torch.from_numpy(np.random.default_rng(3).integers(0, 256, (300, 290, 3), np.uint8))
    origins = np.array([(0, 0), (7, 3), (31, 30), (44, 34), (2, 19), (40, 1), (11, 11)])
    several = Predictor(bundle, device="cpu", precision="bf16")
    alone = Predictor(bundle, device="cpu", precision="bf16", batch_size=1)
    assert several.queue.batch == {96: 8, 128: 8, 256: 4}[side]
    found = [list(p.predict(region, origins)) for p in (several, alone)]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert Predictor(bundle, device="cpu", precision="fp32").queue.batch == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_gpu_agrees_with_the_cpu(tmp_path):
    bundle = load_bundle(lightmuseg_bundle(tmp_path, mpp=0.5, patch_size=128))
    gpu = Predictor(bundle, device="cuda", precision="fp32")
    ours = list(gpu.predict(gpu.upload(PIXELS), ORIGINS))
    theirs = list(Predictor(bundle, device="cpu", precision="fp32").predict(REGION, ORIGINS))
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a.cpu(), b, atol=1e-3)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("shape", [(37, 53), (5, 37, 53)])
def test_the_highest_probability_is_the_first_of_equals_in_16_bits(device, shape):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    # eighths, so that many are equal, and a half of a 16-bit step, which goes to the even one
    planes = np.random.default_rng(1).integers(0, 9, (4, *shape)).astype(np.float32) / 8
    planes[:, 0, 0] = np.float32(2.5 / 65535)
    fixed, chosen = best_class(torch.from_numpy(planes).to(device), with_probability=True)
    assert (chosen == planes.argmax(0)).all()
    assert (fixed == np.rint(planes.max(0) * np.float32(65535))).all()
    none, again = best_class(torch.from_numpy(planes).to(device), with_probability=False)
    assert none.size == 0
    assert (again == chosen).all()


def cache_of(*wanted, max_bytes=10**6):
    """Return a cache of 4 × 4 predictions for some blocks, each of which wants some patches."""
    blocks = {block(n): np.array(patches) for n, patches in enumerate(wanted)}
    return PatchCache(blocks, lambda *_: (slice(0, 4), slice(0, 4)), max_bytes=max_bytes)


def block(number):
    return Block(index=(number,), start=(number,), stop=(number + 1,))


def predictions(claim):
    return (torch.full((1, 4, 4), float(patch)) for patch in claim.mine)


def claimed(cache, number, patches):
    with cache.claim(block(number), np.array(patches)) as claim:
        fresh = predictions(claim)
        results = [float(claim.result(p, fresh)[0, 0, 0]) for p in patches]
        return claim.mine.tolist(), results


def test_what_straddles_is_predicted_once_and_then_let_go():
    cache = cache_of([1, 2, 3], [2, 3, 4], [3, 4])
    assert claimed(cache, 0, [1, 2, 3]) == ([1, 2, 3], [1, 2, 3])
    assert claimed(cache, 1, [2, 3, 4]) == ([4], [2, 3, 4])
    assert claimed(cache, 2, [3, 4]) == ([], [3, 4])
    assert cache._bytes == 0
    assert not cache._parts
    assert claimed(cache, 0, [3]) == ([3], [3])  # asked for once more than was said


def test_the_cache_keeps_to_its_size_and_what_is_wanted_first():
    patches = list(range(10))
    cache = cache_of(patches, [8, 9], patches, max_bytes=3 * 64)  # predictions of 4 × 4 float32
    claimed(cache, 0, patches)
    assert cache._bytes == 3 * 64
    assert claimed(cache, 1, [8, 9]) == ([], [8, 9])
    mine, results = claimed(cache, 2, patches)
    assert results == patches
    assert len(mine) == 9


def test_only_the_part_that_a_block_needs_is_kept_for_it():
    first, second = (slice(2, 4), slice(0, 1)), (slice(0, 4), slice(3, 4))
    where = {block(1): first, block(2): second}
    wanted = {block(n): np.array([0]) for n in range(3)}
    cache = PatchCache(wanted, lambda _, at: where[at], max_bytes=10**6)
    whole = torch.rand(2, 4, 4)
    with cache.claim(block(0), np.array([0])) as claim:
        assert claim.result(0, iter([whole])) is whole
    assert cache._bytes == 2 * (2 + 4) * 4
    for at, (rows, columns) in where.items():
        with cache.claim(at, np.array([0])) as claim:
            found = claim.result(0, iter([]))
        assert found.shape == whole.shape
        assert torch.equal(found[:, rows, columns], whole[:, rows, columns])
    assert cache._bytes == 0


def test_two_blocks_share_what_one_predicts():
    cache = cache_of([1, 2], [2, 3])
    inside, done = threading.Event(), threading.Event()
    found = {}

    def first():
        with cache.claim(block(0), np.array([1, 2])) as claim:
            inside.set()
            done.wait(10)
            fresh = predictions(claim)
            found["first"] = [float(claim.result(p, fresh)[0, 0, 0]) for p in (1, 2)]

    def second():
        inside.wait(10)
        with cache.claim(block(1), np.array([2, 3])) as claim:
            found["mine"] = claim.mine.tolist()
            done.set()
            wait(claim.others.values(), timeout=10)
            fresh = predictions(claim)
            found["second"] = [float(claim.result(p, fresh)[0, 0, 0]) for p in (2, 3)]

    threads = [threading.Thread(target=work) for work in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert found == {"first": [1, 2], "mine": [3], "second": [2, 3]}


def test_an_error_reaches_who_waits_and_nothing_of_it_stays():
    cache = cache_of([1], [1], [1])
    waiting = []

    def fail():
        with cache.claim(block(0), np.array([1])):
            with cache.claim(block(1), np.array([1])) as claim:
                waiting.extend(claim.others.values())
            raise BundleError("first failed")

    with pytest.raises(BundleError, match="first"):
        fail()
    with pytest.raises(BundleError, match="first failed"):
        waiting[0].result(timeout=1)
    assert claimed(cache, 2, [1]) == ([1], [1])


def test_threads_that_come_after_a_predictor_have_their_cores(tmp_path):
    usual = torch.get_num_threads()
    torch.set_num_threads(3)
    predictor = Predictor(load_bundle(small_unet_bundle(tmp_path)), device="cpu", threads=2)
    list(predictor.predict(REGION, ORIGINS))
    predictor.close()
    with ThreadPoolExecutor(1) as pool:
        cores = pool.submit(torch.get_num_threads).result()
    torch.set_num_threads(usual)
    assert cores == 3


@pytest.mark.parametrize("has_bf16", [True, False])
def test_bf16_on_a_processor_without_it_is_slow_and_said_once(monkeypatch, caplog, has_bf16):
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: has_bf16)
    _warn.cache_clear()
    cpu = torch.device("cpu")
    assert choose_dtype("auto", cpu) == (torch.bfloat16 if has_bf16 else torch.float32)
    assert not caplog.messages
    assert [choose_dtype("bf16", cpu) for _ in range(2)] == [torch.bfloat16] * 2
    assert len(caplog.messages) == (0 if has_bf16 else 1)


def test_a_program_is_run_as_it_was_made_unless_its_bundle_allows_another(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    cpu, bundle = torch.device("cpu"), load_bundle(pointwise_bundle(tmp_path, mpp=0.5))
    assert choose_dtype("auto", cpu, bundle) == torch.float32
    assert choose_dtype("bf16", cpu, bundle) == torch.bfloat16
    allowing = replace(bundle, network_options={"precision": "bf16"})
    assert choose_dtype("auto", cpu, allowing) == torch.bfloat16
    other = replace(bundle, network_options={"precision": "fp16"})
    assert choose_dtype("auto", cpu, other) == torch.float32
    ours = load_bundle(lightmuseg_bundle(tmp_path / "ours", mpp=0.5))
    assert choose_dtype("auto", cpu, ours) == torch.bfloat16
    with closing(Predictor(bundle, device="cpu")) as predictor:
        assert predictor.how.startswith("fp32 ")
