"""Result folders of nnU-Net v2, against its published algorithm written out here in numpy."""

import itertools
import json
import os
from contextlib import closing

import nibabel
import numpy as np
import pytest
import torch
import zarr
from click.testing import CliRunner
from PIL import Image
from scipy.ndimage import binary_fill_holes, gaussian_filter, map_coordinates
from skimage.transform import resize
from torch.nn import functional as F

from wsi_pipeline import segment
from wsi_pipeline.bundle import load_bundle
from wsi_pipeline.cli import group
from wsi_pipeline.errors import BundleError
from wsi_pipeline.inference.predictor import Predictor
from wsi_pipeline.networks.nnunet_folder import load_model
from wsi_pipeline.options import Rule, turns
from wsi_pipeline.run.again import export_again
from wsi_pipeline.run.thresholds import copy_ruled
from wsi_pipeline.training.validate import chances

RESAMPLING = {
    f"resampling_fn_{what}": "resample_data_or_seg_to_shape" for what in ("data", "probabilities")
} | {
    f"resampling_fn_{what}_kwargs": {"is_seg": False, "order": order, "order_z": 0,
                                     "force_separate_z": None}
    for what, order in (("data", 3), ("probabilities", 1))
}  # fmt: skip


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def random_state(plan, *, channels, classes, seed):
    """Return tensors by dynamic-network-architectures' names, those that come twice included."""
    rng, state = torch.Generator().manual_seed(seed), {}
    widths, kernels, strides = plan["features"], plan["kernels"], plan["strides"]
    residual, axes = plan["residual"], len(kernels[0])

    def conv(name, inputs, outputs, kernel, bias=True):
        shape, fan = (outputs, inputs, *kernel), inputs * np.prod(kernel)
        own = {"conv.weight": torch.randn(shape, generator=rng) * (2 / fan) ** 0.5}
        if bias:
            own["conv.bias"] = torch.randn(outputs, generator=rng) * 0.1
        own["norm.weight"] = 1 + torch.randn(outputs, generator=rng) * 0.1
        own["norm.bias"] = torch.randn(outputs, generator=rng) * 0.1
        for key, tensor in own.items():
            state[f"{name}.{key}"] = tensor
            place = key.replace("conv", "all_modules.0").replace("norm", "all_modules.1")
            state[f"{name}.{place}"] = tensor

    inputs = channels
    if residual:
        conv("encoder.stem.convs.0", channels, widths[0], kernels[0])
        inputs = widths[0]
    for i, (width, kernel) in enumerate(zip(widths, kernels, strict=True)):
        for n in range(plan["blocks"][i]):
            if not residual:
                conv(f"encoder.stages.{i}.0.convs.{n}", inputs, width, kernel)
            else:
                name = f"encoder.stages.{i}.blocks.{n}"
                conv(f"{name}.conv1", inputs, width, kernel)
                conv(f"{name}.conv2", width, width, kernel)
                if inputs != width:
                    at = int(n == 0 and max(strides[i]) > 1)
                    conv(f"{name}.skip.{at}", inputs, width, (1,) * axes, bias=False)
            inputs = width
    for i, width in enumerate(widths[-2::-1]):
        up = (widths[-1 - i], width, *strides[-1 - i])
        state[f"decoder.transpconvs.{i}.weight"] = torch.randn(up, generator=rng) * up[0] ** -0.5
        state[f"decoder.transpconvs.{i}.bias"] = torch.zeros(width)
        conv(f"decoder.stages.{i}.convs.0", 2 * width, width, kernels[-2 - i])
        head = (classes, width, *(1,) * axes)
        state[f"decoder.seg_layers.{i}.weight"] = torch.randn(head, generator=rng)
        state[f"decoder.seg_layers.{i}.bias"] = torch.randn(classes, generator=rng) * 0.3
    encoder = {f"decoder.{k}": v for k, v in state.items() if k.startswith("encoder.")}
    return state | encoder


def logits_of(plan, state, x):
    """Return (classes, *patch) of (channels, *patch), by the names of the tensors."""
    axes = x.ndim - 1
    conv, up, pool = ((F.conv2d, F.conv_transpose2d, F.avg_pool2d),
                      (F.conv3d, F.conv_transpose3d, F.avg_pool3d))[axes - 2]  # fmt: skip

    def layer(name, x, stride=1, nonlin=True):
        weight = state[f"{name}.conv.weight"]
        pad = [(n - 1) // 2 for n in weight.shape[2:]]
        x = conv(x, weight, state.get(f"{name}.conv.bias"), stride, pad)
        x = F.instance_norm(x, weight=state[f"{name}.norm.weight"], bias=state[f"{name}.norm.bias"])
        return F.leaky_relu(x) if nonlin else x

    x, skips = x[None], []
    if plan["residual"]:
        x = layer("encoder.stem.convs.0", x)
    for i, stride in enumerate(plan["strides"]):
        for n in range(plan["blocks"][i]):
            step = tuple(stride) if n == 0 else (1,) * axes
            if not plan["residual"]:
                x = layer(f"encoder.stages.{i}.0.convs.{n}", x, step)
                continue
            name = f"encoder.stages.{i}.blocks.{n}"
            out = layer(f"{name}.conv2", layer(f"{name}.conv1", x, step), nonlin=False)
            skip = pool(x, step, step) if max(step) > 1 else x
            at = int(max(step) > 1)
            if f"{name}.skip.{at}.conv.weight" in state:
                skip = layer(f"{name}.skip.{at}", skip, nonlin=False)
            x = F.leaky_relu(out + skip)
        skips.append(x)
    x = skips.pop()
    for i in range(len(skips)):
        x = up(x, state[f"decoder.transpconvs.{i}.weight"],
               state[f"decoder.transpconvs.{i}.bias"], tuple(plan["strides"][-1 - i]))  # fmt: skip
        x = layer(f"decoder.stages.{i}.convs.0", torch.cat([x, skips.pop()], 1))
    head = f"decoder.seg_layers.{len(plan['features']) - 2}"
    return conv(x, state[f"{head}.weight"], state[f"{head}.bias"])[0]


def folder_of(path, plan, *, channel_names, scheme, ending, mirror, spacing, labels=3, folds=2,
              trainer="nnUNetTrainer", old=False, **told):  # fmt: skip
    """Write a result folder; return the tensors of its folds."""
    stages, axes = len(plan["features"]), len(plan["patch"])
    config = {
        "patch_size": plan["patch"],
        "spacing": spacing,
        "normalization_schemes": [scheme] * len(channel_names),
        "use_mask_for_norm": [False] * len(channel_names),
        **RESAMPLING,
    }
    if old:
        config |= {
            "UNet_class_name": "PlainConvUNet",
            "UNet_base_num_features": plan["features"][0],
            "unet_max_num_features": max(plan["features"]),
            "n_conv_per_stage_encoder": plan["blocks"],
            "n_conv_per_stage_decoder": [1] * (stages - 1),
            "conv_kernel_sizes": plan["kernels"],
            "pool_op_kernel_sizes": plan["strides"],
            "num_pool_per_axis": [1] * axes,
        }
    else:
        kind = "ResidualEncoderUNet" if plan["residual"] else "PlainConvUNet"
        module = "dynamic_network_architectures.architectures.unet"
        config["architecture"] = {
            "network_class_name": f"{module}.{kind}",
            "arch_kwargs": {
                "n_stages": stages,
                "features_per_stage": plan["features"],
                "conv_op": f"torch.nn.modules.conv.Conv{axes}d",
                "kernel_sizes": plan["kernels"],
                "strides": plan["strides"],
                "n_blocks_per_stage" if plan["residual"] else "n_conv_per_stage": plan["blocks"],
                "n_conv_per_stage_decoder": [1] * (stages - 1),
                "conv_bias": True,
                "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{axes}d",
                "norm_op_kwargs": {"eps": 1e-5, "affine": True},
                "dropout_op": None,
                "dropout_op_kwargs": None,
                "nonlin": "torch.nn.LeakyReLU",
                "nonlin_kwargs": {"inplace": True},
            },
            "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
        }
    config |= told.pop("config", {})
    numbers = {"percentile_00_5": -60.0, "percentile_99_5": 300.0, "mean": 90.0, "std": 77.0}
    plans = {
        "dataset_name": "Dataset001_Test",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "foreground_intensity_properties_per_channel": {"0": numbers},
        "configurations": {"base": config, "own": {"inherits_from": "base"}},
    } | told
    dataset = {
        "channel_names": {str(i): name for i, name in enumerate(channel_names)},
        "labels": {"background": 0} | {f"class {i}": i for i in range(1, labels)},
        "file_ending": ending,
    } | told.pop("dataset", {})
    path.mkdir(parents=True)
    (path / "plans.json").write_text(json.dumps(plans))
    (path / "dataset.json").write_text(json.dumps(dataset))
    states = []
    for fold in range(folds):
        states.append(random_state(plan, channels=len(channel_names), classes=labels, seed=fold))
        # So that all classes occur.
        noise = torch.randn(len(channel_names), *plan["patch"])
        head = states[-1][f"decoder.seg_layers.{stages - 2}.bias"]
        head -= logits_of(plan, states[-1], noise).flatten(1).median(1).values
        (path / f"fold_{fold}").mkdir()
        torch.save(
            {
                "network_weights": states[-1],
                "optimizer_state": {"state": {}, "param_groups": [{"lr": 0.01}]},
                "grad_scaler_state": None,
                "logging": {"ema_fg_dice": [np.float64(0.5), np.float32(0.25)]},
                "_best_ema": np.float64(0.5),
                "current_epoch": 1000,
                "init_args": {"configuration": "own", "fold": fold, "plans": plans,
                              "device": torch.device("cpu")},
                "trainer_name": trainer,
                "inference_allowed_mirroring_axes": mirror,
            },
            path / f"fold_{fold}" / "checkpoint_final.pth",
        )  # fmt: skip
    return states


def steps(length, patch):
    count = int(np.ceil((length - patch) / (patch * 0.5))) + 1
    each = (length - patch) / max(count - 1, 1)
    return [int(np.round(each * i)) for i in range(count)]


def predicted(plan, states, image, mirror):
    """Return blended logits (classes, *shape) of a normalised image (channels, *shape)."""
    patch = plan["patch"]
    lacks = [max(p - n, 0) for p, n in zip(patch, image.shape[1:], strict=True)]
    before = [n // 2 for n in lacks]
    around = [(0, 0), *((b, n - b) for b, n in zip(before, lacks, strict=True))]
    padded = torch.from_numpy(np.pad(image, around).astype(np.float32))
    peak = np.zeros(patch)
    peak[tuple(p // 2 for p in patch)] = 1
    weight = gaussian_filter(peak, [p / 8 for p in patch], mode="constant")
    weight = np.maximum(weight / weight.max(), 1e-30)
    total = norm = 0.0
    sets = [a for n in range(len(mirror) + 1) for a in itertools.combinations(mirror, n)]
    places = itertools.product(*map(steps, padded.shape[1:], patch))
    total, norm = np.zeros((3, *padded.shape[1:])), np.zeros(padded.shape[1:])
    for place in places:
        part = tuple(slice(a, a + p) for a, p in zip(place, patch, strict=True))
        mean = 0
        for state, axes in itertools.product(states, sets):
            axes = [a + 1 for a in axes]
            mean = mean + logits_of(plan, state, padded[(slice(None), *part)].flip(axes)).flip(axes)
        total[(slice(None), *part)] += mean.numpy() / len(states) / len(sets) * weight
        norm[part] += weight
    inside = [slice(b, b + n) for b, n in zip(before, image.shape[1:], strict=True)]
    return (total / norm)[(slice(None), *inside)]


def cropped(image):
    """Return the slices of what is not 0 in an image (channels, *shape)."""
    mask = binary_fill_holes(image.any(0))
    return tuple(slice(a.min(), a.max() + 1) for a in np.nonzero(mask))


PLAIN = {
    "patch": [48, 32], "features": [6, 12, 16], "kernels": [[3, 3]] * 3,
    "strides": [[1, 1], [2, 2], [2, 2]], "blocks": [2, 1, 1], "residual": False,
}  # fmt: skip
DEEP = {
    "patch": [10, 24, 16], "features": [6, 12, 12], "kernels": [[1, 3, 3], [3, 3, 3], [3, 3, 3]],
    "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2]], "blocks": [1, 1, 2], "residual": True,
}  # fmt: skip


USUAL = {
    "channel_names": "RGB", "scheme": "ZScoreNormalization", "ending": ".png", "mirror": (0, 1),
    "spacing": [1.0, 1.0],
}  # fmt: skip


def coarse(shape, seed, channels):
    """Return smooth noise from 0 to 255, uint8 (*shape, channels)."""
    small = np.random.default_rng(seed).random((*(n // 6 + 2 for n in shape), channels))
    return (resize(small, (*shape, channels), order=1) * 255).astype(np.uint8)


@pytest.mark.parametrize(
    ("mirror", "scheme"),
    [((0, 1), "ZScoreNormalization"), (None, "RescaleTo01Normalization"),
     (None, "RGBTo01Normalization")],
)  # fmt: skip
@pytest.mark.parametrize("shape", [(101, 77), (40, 29)])
def test_a_picture_gets_nnunets_labels(tmp_path, shape, mirror, scheme):
    states = folder_of(tmp_path / "results", PLAIN, channel_names="RGB", scheme=scheme,
                       ending=".png", mirror=mirror, spacing=[1.0, 1.0])  # fmt: skip
    pixels = coarse(shape, 1, 3)
    # What is black all around is cropped before anything else.
    pixels[:7] = pixels[:, :3] = pixels[:, -5:] = 0
    Image.fromarray(pixels).save(tmp_path / "a.png")
    (run,) = segment(tmp_path / "a.png", model=f"nnunet:{tmp_path / 'results'}",
                     output=tmp_path / "out", precision="fp32", device="cpu")  # fmt: skip
    image = pixels.transpose(2, 0, 1).astype(np.float64)
    crop = cropped(image)
    image = image[(slice(None), *crop)]
    rest = (1, 2)
    if scheme.startswith("Z"):
        image = (image - image.mean(rest, keepdims=True)) / image.std(rest, keepdims=True)
    elif scheme.startswith("Rescale"):
        image -= image.min(rest, keepdims=True)
        image /= image.max(rest, keepdims=True)
    else:
        image /= 255
    expected = np.zeros(shape, np.uint8)
    expected[crop] = predicted(PLAIN, states, image, mirror or ()).argmax(0)
    mask = np.asarray(Image.open(tmp_path / "out" / "a" / "mask.png"))
    assert run.status == "done"
    assert (np.bincount(mask.ravel(), minlength=3) > 50).all()
    assert (mask == expected).mean() > 0.9999


def resampled(image, shape, axis, order):
    """Return an image (channels, *shape) as nnU-Net resamples it, one axis alone where it does."""
    if image.shape[1:] == tuple(shape):
        return image
    if axis is None:
        return np.stack([resize(c, shape, order, mode="edge", anti_aliasing=False) for c in image])
    flat = [n for a, n in enumerate(shape) if a != axis]
    made = []
    for channel in image:
        slices = np.moveaxis(channel, axis, 0)
        fine = [resize(s, flat, order, mode="edge", anti_aliasing=False) for s in slices]
        fine = np.moveaxis(np.stack(fine), 0, axis)
        places = [
            (np.arange(n) + 0.5) * m / n - 0.5 for n, m in zip(shape, fine.shape, strict=True)
        ]
        grid = np.meshgrid(*places, indexing="ij")
        made.append(map_coordinates(fine, grid, order=0, mode="nearest"))
    return np.stack(made)


@pytest.mark.parametrize(
    ("own", "wanted", "scheme", "transpose"),
    [
        ((2.0, 1.0, 1.1), (2.3, 0.9, 1.0), "ZScoreNormalization", (0, 1, 2)),
        pytest.param(
            *((5.0, 1.0, 1.1), (3.4, 0.9, 1.0), "CTNormalization", (0, 1, 2)),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *((1.0, 1.1, 2.0), (2.3, 0.9, 1.0), "NoNormalization", (2, 0, 1)),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_volume_gets_nnunets_labels(tmp_path, own, wanted, scheme, transpose):
    back = list(np.argsort(transpose))
    states = folder_of(tmp_path / "results", DEEP, channel_names=["any"], scheme=scheme,
                       ending=".nii.gz", mirror=(0, 1, 2), spacing=list(wanted),
                       transpose_forward=list(transpose),
                       transpose_backward=[int(n) for n in back])  # fmt: skip
    shape = tuple(np.array((17, 73, 37))[back])
    voxels = coarse(shape, 2, 1)[..., 0].astype(np.int16) * 2 - 100
    if scheme.startswith("No"):
        voxels = voxels // 100
    voxels[voxels == 0] = 1
    voxels[:2] = voxels[:, :3] = voxels[:, :, -4:] = 0
    image = nibabel.Nifti1Image(voxels.transpose(2, 1, 0), np.diag([*own[::-1], 1]))
    nibabel.save(image, tmp_path / "a.nii.gz")
    segment(tmp_path / "a.nii.gz", model=f"nnunet:{tmp_path / 'results'}", output=tmp_path / "out",
            precision="fp32", device="cpu", block_size=64)  # fmt: skip
    data = voxels.transpose(transpose)[None].astype(np.float64)
    own = [own[a] for a in transpose]
    crop = cropped(data)
    data = data[(slice(None), *crop)]
    if scheme.startswith("Z"):
        data = (data - data.mean()) / data.std()
    elif scheme.startswith("CT"):
        data = (np.clip(data, -60, 300) - 90) / 77
    shape = [round(o / w * n) for o, w, n in zip(own, wanted, data.shape[1:], strict=True)]
    thick = next((int(np.argmax(s)) for s in (own, wanted) if max(s) / min(s) > 3), None)
    logits = predicted(DEEP, states, resampled(data, shape, thick, 3), (0, 1, 2))
    thick = next((int(np.argmax(s)) for s in (wanted, own) if max(s) / min(s) > 3), None)
    logits = resampled(logits, data.shape[1:], thick, 1)
    expected = np.zeros(voxels.transpose(transpose).shape, np.uint8)
    expected[crop] = logits.argmax(0)
    mask = np.asarray(nibabel.load(tmp_path / "out" / "a" / "mask.nii.gz").dataobj)
    mask = mask.transpose(2, 1, 0).transpose(transpose)
    assert (np.bincount(mask.ravel(), minlength=3) > 50).all()
    assert (mask == expected).mean() > 0.999


def test_mirroring_is_left_to_tta(tmp_path):
    volumes = {"channel_names": ["any"], "ending": ".nii.gz", "spacing": [2.0, 1.0, 1.0]}
    folder_of(tmp_path / "flat", PLAIN, folds=1, **USUAL | volumes)
    bundle = load_model(f"nnunet:{tmp_path / 'flat'}")
    assert (bundle.modality, bundle.input.patch_size) == ("volume", (1, 48, 32))
    # The slice has no other side.
    assert turns(bundle.tta, bundle.input.patch_size) == turns("mirror", (48, 32))
    folder_of(tmp_path / "one", PLAIN, folds=1, **USUAL | {"mirror": (1,)})
    with pytest.raises(BundleError, match=r"mirroring along \[1\] alone"):
        load_model(f"nnunet:{tmp_path / 'one'}")


@pytest.mark.parametrize("kind", ["image", "volume"])
def test_other_thresholds_leave_alone_what_was_cropped(tmp_path, kind):
    flat = kind == "image"
    pixels = coarse((101, 77) if flat else (7, 61, 45), 1, 3 if flat else 1)
    own = np.ones(pixels.shape[:-1], bool)
    for axis, (before, after) in enumerate([(7, 4), (0, 5)] if flat else [(2, 1), (6, 0), (5, 3)]):
        np.moveaxis(own, axis, 0)[:before] = False
        np.moveaxis(own, axis, 0)[own.shape[axis] - after :] = False
    pixels[~own] = 0
    if flat:
        path, given, plan = tmp_path / "a.png", USUAL, PLAIN
        Image.fromarray(pixels).save(path)
    else:
        # By nearest planes along z.
        path, plan = tmp_path / "a.nii.gz", DEEP
        given = {"channel_names": ["any"], "scheme": "ZScoreNormalization", "ending": ".nii.gz",
                 "mirror": None, "spacing": [2.0, 1.1, 0.9]}  # fmt: skip
        nibabel.save(nibabel.Nifti1Image(pixels[..., 0].T, np.diag([1.0, 1, 4, 1])), path)
    folder_of(tmp_path / "results", plan, folds=1, **given)
    for name, rule in {"usual": {}, "ruled": {"thresholds": {"class 1": 0.05}}}.items():
        (run,) = segment(path, model=f"nnunet:{tmp_path / 'results'}", output=tmp_path / name,
                         precision="fp32", device="cpu", tta="none", **rule)  # fmt: skip
        assert run.status == "done", run.reason
    new = copy_ruled(tmp_path / "usual" / "a", tmp_path / "new", Rule(thresholds={"class 1": 0.05}))
    export_again(new, {})
    found, expected = map(seen, (new, tmp_path / "ruled" / "a"))
    assert not found[~own].any()
    assert (found == 1).mean() > 0.3
    # Of 8 bits some are near enough a threshold, and of logits other pixels are interpolated.
    assert (found == expected).mean() > (0.99 if flat else 0.95)


def seen(folder):
    if (folder / "mask.png").is_file():
        return np.asarray(Image.open(folder / "mask.png"))
    return np.asarray(nibabel.load(folder / "mask.nii.gz").dataobj).T


def test_validation_sees_probabilities(tmp_path):
    folder_of(tmp_path / "results", PLAIN, folds=1, **USUAL | {"mirror": None})
    bundle = load_model(f"nnunet:{tmp_path / 'results'}")
    image = torch.from_numpy(coarse((70, 61), 5, 3)).movedim(-1, 0)
    with closing(Predictor(bundle, device="cpu", precision="fp32")) as predictor:
        found = chances(predictor, image)
    assert torch.allclose(found.sum(0), torch.ones(70, 61), atol=1e-5)
    assert found.min() >= 0


def test_plans_of_older_versions_mean_the_same(tmp_path):
    for name in ("new", "old"):
        folder_of(tmp_path / name, PLAIN, folds=1, old=name == "old", **USUAL)
    new, old = (load_model(f"nnunet:{tmp_path / name}") for name in ("new", "old"))
    assert (new.network_options, new.input) == (old.network_options, old.input)


def test_commands_take_a_folder_as_segment_does(tmp_path):
    folder_of(tmp_path / "results", PLAIN, folds=1, **USUAL)
    Image.fromarray(coarse((70, 61), 5, 3)).save(tmp_path / "a.png")
    folder = f"nnunet:{tmp_path / 'results'}"
    for line, told in (
        (["models", "show", folder], "nnunet (channels = 3"),
        (["models", "check", folder], "answers as its model.toml says"),
        (["info", str(tmp_path / "a.png"), "--model", folder], "own takes it"),
    ):
        done = CliRunner().invoke(group, line)
        assert done.exit_code == 0, done.output
        assert told in done.output


class Payload:
    """Makes a folder where a pickle runs what it names."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_nothing_of_a_checkpoint_is_run(tmp_path):
    folder = tmp_path / "results"
    folder_of(folder, PLAIN, **USUAL)
    path = folder / "fold_1" / "checkpoint_final.pth"
    held = torch.load(path, weights_only=False) | {"logging": Payload(tmp_path / "ran")}
    torch.save(held, path)
    with pytest.raises(
        BundleError, match=r"fold_1.*holds \S*mkdir.* nothing of a weight file is run"
    ):
        load_model(f"nnunet:{folder}")
    assert not (tmp_path / "ran").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "ran").exists()


ODD = {"network_class_name": "a.b.PlainConvUNet", "arch_kwargs": {"nonlin": "torch.nn.ReLU"}}
KIND = {"network_class_name": "a.b.Primus", "arch_kwargs": {}, "_kw_requires_import": []}


@pytest.mark.parametrize(
    ("told", "reason"),
    [
        ({"trainer": "nnUNetTrainerMine"}, "trainer 'nnUNetTrainerMine'"),
        ({"config": {"architecture": KIND}}, "architecture Primus"),
        ({"config": {"previous_stage": "3d_lowres"}}, "a cascade"),
        ({"config": {"use_mask_for_norm": [True] * 3}}, "use_mask_for_norm"),
        ({"config": {"normalization_schemes": ["CTNormalization", "ZScoreNormalization"]}},
         "several normalisations, CTNormalization, ZScore"),
        ({"config": {"normalization_schemes": ["Mine"]}}, "normalisation Mine"),
        ({"dataset": {"labels": {"background": 0, "whole": [1, 2], "core": 2}}}, "regions"),
        ({"dataset": {"labels": {"background": 0, "a": 2}}}, "which are not 0, 1, 2"),
        ({"config": {"spacing": [0.5, 1.0]}}, "pictures whose pixels are"),
        ({"config": {"architecture": ODD}}, "PlainConvUNet with nonlin torch.nn.ReLU"),
        ({"configurations": {}}, "plans.json, dataset.json or checkpoint: 'own'"),
        ({"configurations": {"own": {"inherits_from": "b"}, "b": {"inherits_from": "own"}}},
         "inherit from each other"),
    ],
)  # fmt: skip
def test_what_nnunet_would_do_otherwise_is_refused_by_name(tmp_path, told, reason):
    folder_of(tmp_path / "results", PLAIN, folds=1, **USUAL, **told)
    with pytest.raises(BundleError, match=reason):
        load_model(f"nnunet:{tmp_path / 'results'}")


def test_folders_that_lack_something_say_what(tmp_path):
    folder = tmp_path / "D" / "nnUNetTrainer__nnUNetPlans__2d"
    folder_of(folder, PLAIN, folds=1, **USUAL)
    for location, reason in (
        ("nnunet:", "expected nnunet:FOLDER"),
        (f"nnunet:{tmp_path / 'none'}", "no such folder"),
        (f"nnunet:{tmp_path / 'D'}", "name one of its nnUNetTrainer__nnUNetPlans__2d"),
    ):
        with pytest.raises(BundleError, match=reason):
            load_model(location)
    (folder / "fold_0" / "checkpoint_final.pth").unlink()
    with pytest.raises(BundleError, match=r"no fold_0/checkpoint_final.pth"):
        load_model(f"nnunet:{folder}")


def test_a_slide_is_seen_at_the_resolution_that_is_told(tmp_path, make_slide):
    """Patches lie as those of any model; seams are what other tilings change."""
    states = folder_of(tmp_path / "results", PLAIN, folds=2, **USUAL | {"mirror": None})
    pixels = coarse((150, 113), 3, 3)
    slide = make_slide(tmp_path / "a.tif", pixels, 0.5)
    model = f"nnunet:{tmp_path / 'results'}@0.5"
    masks = []
    for overlap in (16, 24):
        segment(slide, model=model, output=tmp_path / str(overlap), tissue="none", overlap=overlap,
                precision="fp32", device="cpu", outputs=("zarr",))  # fmt: skip
        (mask,) = (tmp_path / str(overlap)).glob("a/mask.ome.zarr/0")
        masks.append(zarr.open_array(mask, mode="r")[:])
    image = torch.from_numpy(pixels.transpose(2, 0, 1).astype(np.float32))
    total, norm = np.zeros((3, 150, 113)), np.zeros((150, 113))
    window = [np.exp(-0.5 * ((np.arange(p) - (p - 1) / 2) / (p / 8)) ** 2) for p in PLAIN["patch"]]
    for y, x in itertools.product([*range(0, 102, 32), 102], [*range(0, 81, 16), 81]):
        part = image[:, y : y + 48, x : x + 32]
        part = part - part.mean((1, 2), keepdim=True)
        part = part / part.std((1, 2), keepdim=True, correction=0)
        mean = sum(logits_of(PLAIN, state, part) for state in states) / 2
        weight = np.outer(*window)
        total[:, y : y + 48, x : x + 32] += mean.numpy() * weight
        norm[y : y + 48, x : x + 32] += weight
    assert (masks[0] == (total / norm).argmax(0)).mean() > 0.9999
    # Other places of patches, other means: but of few pixels.
    assert 0.9 < (masks[0] == masks[1]).mean() < 1
    found = load_bundle(
        json.loads((tmp_path / "16/a/run.json").read_text())["certificate"]["bundle"]
    )
    assert (found.modality, found.mpp, found.network) == ("slide", 0.5, "nnunet")
