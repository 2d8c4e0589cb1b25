"""Result folders of nnU-Net v2 in, as bundles: `plans.json`, `dataset.json` and weights, no code.

What its predictor reads of them is read here (github.com/MIC-DKFZ/nnUNet, `nnunetv2/inference` and
`utilities/plans_handling`); whatever would be done otherwise than there is refused by its name.
"""

from __future__ import annotations

import _codecs
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import save_file
from torch import Tensor

from wsi_pipeline.bundle import AXES, Bundle, Modality, bundle_toml, load_bundle, parse_bundle
from wsi_pipeline.colors import COLORS
from wsi_pipeline.errors import BundleError, raised_as
from wsi_pipeline.files.atomic import sha256_of
from wsi_pipeline.files.paths import cache_dir
from wsi_pipeline.networks import build
from wsi_pipeline.networks.bundle_writer import CARD, MODEL_TOML, WEIGHTS, written_folder
from wsi_pipeline.networks.weights import read_checkpoint

PREFIX = "nnunet:"
TRAINERS = re.compile(
    r"nnUNetTrainer(_?(\d+|X)?epochs?|_\d+ep|BN|_?NoMirroring|_onlyMirror01|_?DA5|_?DASegOrd0|Segord0"
    r"|ord0|NoDA|DAOrd0|_noDummy2DDA|NoDeepSupervision|(Vanilla)?Adam|Adan|\d+en\d+|_?CosAnneal"
    r"|_warmup|_probabilisticOversampling(_\d+)?|(Dice|CE|Topk?K?10|TopK10)+Loss(LS01)?|_noSmooth"
    r"|_\d+epochs?|Benchmark_5epochs(_noDataLoading)?)*"
)
"""nnU-Net's own that leave prediction as it is; others may build any network."""
ARCHITECTURES = {"PlainConvUNet": "n_conv_per_stage", "ResidualEncoderUNet": "n_blocks_per_stage"}
"""What is built here, and what each calls its layers a stage."""
READ = {
    "n_stages", "features_per_stage", "kernel_sizes", "strides", "n_conv_per_stage_decoder",
    "norm_op", *ARCHITECTURES.values(),
}  # fmt: skip
TRAINING = {"conv_op", "dropout_op", "dropout_op_kwargs", "deep_supervision"}
"""Arguments of architectures that play no part in prediction."""
USUAL = {
    "conv_bias": True,
    "norm_op_kwargs": {"eps": 1e-5, "affine": True},
    "nonlin": "torch.nn.LeakyReLU",
    "nonlin_kwargs": {"inplace": True},
}
"""What all plans of nnU-Net say of them."""
SCALARS: list[Any] = [
    (np.float64(0).__reduce__()[0], "numpy.core.multiarray.scalar"),
    (np.float64(0).__reduce__()[0], "numpy._core.multiarray.scalar"),
    (_codecs.encode, "_codecs.encode"),
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i4", "i8", "u1", "?")),
]
"""What the numbers of numpy are made of that nnU-Net saves beside its tensors."""
PICTURES = (".png", ".bmp", ".tif", ".jpg", ".jpeg")
SLIDES = {"ZScoreNormalization": 1.0, "RGBTo01Normalization": 1.0, "NoNormalization": 1 / 255}
"""What is done to slides, and by what their values are divided then."""
SCALES: dict[str, Any] = {
    "ZScoreNormalization": "zscore",
    "RescaleTo01Normalization": "minmax",
    "RGBTo01Normalization": [0.0, 255.0],
    "NoNormalization": "range",
}
"""How images and volumes are scaled."""


def load_model(location: str | Path) -> Bundle:
    """Read a bundle, or a result folder of nnU-Net made one in the user's cache; return it.

    Args:
        location: see `load_bundle`; or `nnunet:FOLDER`, with `@MPP` behind for slides.

    Raises:
        BundleError: no such bundle or folder, or one that cannot be used.
    """
    if not str(location).startswith(PREFIX):
        return load_bundle(location)
    folder, mpp = parse_location(str(location))
    # Large files are known by their size and time.
    files = [(p.name, s.st_size, s.st_mtime_ns) for p in _files(folder) for s in [p.stat()]]
    key = hashlib.sha256(repr((str(folder.resolve()), files, mpp, 3)).encode()).hexdigest()[:32]
    kept = cache_dir() / "nnunet" / key
    if (kept / MODEL_TOML).is_file():
        return load_bundle(kept)
    kept.parent.mkdir(parents=True, exist_ok=True)
    return import_nnunet(folder, kept, mpp=mpp)


def parse_location(location: str) -> tuple[Path, float | None]:
    """Return the folder and the µm per pixel of `nnunet:FOLDER[@MPP]`.

    Example:
        >>> parse_location("nnunet:results/a@0.5")[1]
        0.5
    """
    parts = re.fullmatch(r"nnunet:(.+?)(?:@(\d+\.?\d*|\.\d+))?", location, re.DOTALL)
    if parts is None:
        raise BundleError(f"{location}: expected nnunet:FOLDER, for slides with @ and µm per pixel")
    return Path(parts[1]), float(parts[2]) if parts[2] else None


def import_nnunet(
    folder: Path, output: Path, *, mpp: float | None = None, overwrite: bool = False
) -> Bundle:
    """Write a bundle of a result folder of nnU-Net v2, all of its folds in one; return it.

    Args:
        mpp: µm per pixel of the training images, which makes it a model for slides.

    Raises:
        BundleError: what is missing, damaged, or done in a way that is not known here.
    """
    plans_path, dataset_path, *checkpoints = _files(folder)
    folds = []
    for path in checkpoints:
        held = read_checkpoint(path, allowed=SCALARS)
        if not isinstance(held, Mapping) or not isinstance(held.get("network_weights"), Mapping):
            raise BundleError(f"{path}: no checkpoint of nnU-Net v2: it holds no network_weights")
        folds.append(held)
    damaged = (KeyError, TypeError, ValueError, IndexError, AttributeError)
    with raised_as(BundleError, damaged, f"{folder}: plans.json, dataset.json or checkpoint"):
        plans, dataset = (json.loads(p.read_bytes()) for p in (plans_path, dataset_path))
        reading = _Reading(folder, plans, dataset, folds[0], len(folds), mpp)
        bundle = parse_bundle(reading.table(), output / MODEL_TOML)
        state = reading.state([held["network_weights"] for held in folds])
    if odd := [name for name, tensor in state.items() if not tensor.isfinite().all()]:
        raise BundleError(f"{folder}: {odd[0]} holds values that are not finite")
    with written_folder(output, overwrite=overwrite) as partial:
        save_file(state, partial / WEIGHTS)
        (partial / MODEL_TOML).write_text(bundle_toml(bundle, weights=WEIGHTS), "utf-8")
        told = "\n".join(
            f"- `{p.relative_to(folder)}`, sha256 `{sha256_of(p)}`" for p in checkpoints
        )
        (partial / CARD).write_text(
            f"# {bundle.name}\n\nnnU-Net v2's `{reading.trainer}`, configuration "
            f"`{reading.name}`, the mean logits of:\n\n{told}\n\n**For research. Not a medical "
            "device; not for diagnosis.**\n",
            "utf-8",
        )
        # Before the folder appears: what does not fit its plans is not left behind.
        build(load_bundle(partial))
    return load_bundle(output)


def _files(folder: Path) -> list[Path]:
    """Return plans, dataset and the checkpoint of each fold, as nnU-Net finds them."""
    if not folder.is_dir():
        raise BundleError(f"{folder}: no such folder")
    if not (folder / "plans.json").is_file():
        inner = sorted(path.parent.name for path in folder.glob("*__*__*/plans.json"))
        known = f"; name one of its {', '.join(inner)}" if inner else ""
        raise BundleError(f"{folder}: no plans.json: no result folder of nnU-Net v2{known}")
    for name in ("checkpoint_final.pth", "checkpoint_best.pth"):
        found = sorted(folder.glob(f"fold_[0-9]*/{name}")) or [*folder.glob(f"fold_all/{name}")]
        if found:
            break
    else:
        raise BundleError(f"{folder}: no fold_0/checkpoint_final.pth or that of another fold")
    if not (folder / "dataset.json").is_file():
        raise BundleError(f"{folder}: no dataset.json, which tells channels and labels")
    return [folder / "plans.json", folder / "dataset.json", *found]


class _Reading:
    """What a result folder says, as a `model.toml` says it.

    nnU-Net turns volumes so that the longest side of their voxels comes first. Weights, sizes and
    axes are turned back here in place of all volumes; a 2-D network of volumes becomes one whose
    patches are a slice deep.
    """

    def __init__(
        self,
        folder: Path,
        plans: Mapping[str, Any],
        dataset: Mapping[str, Any],
        first: Mapping[str, Any],
        folds: int,
        mpp: float | None,
    ) -> None:
        self.folder, self.plans, self.dataset = folder, plans, dataset
        self.folds, self.mpp = folds, mpp
        self.mirror = first.get("inference_allowed_mirroring_axes") or ()
        self.trainer, self.name = str(first["trainer_name"]), first["init_args"]["configuration"]
        if not TRAINERS.fullmatch(self.trainer):
            self.refuse(f"trainer {self.trainer!r}, which may build or do anything")
        self.config = self._configuration(self.name)
        if self.config.get("previous_stage"):
            self.refuse("a cascade, which wants the masks of the stage before")
        self.channels = dataset.get("channel_names") or dataset["modality"]
        self.is_flat = len(self.config["patch_size"]) == 2
        pictures = dataset["file_ending"].lower() in PICTURES
        if mpp is not None and (not self.is_flat or len(self.channels) != 3):
            self.refuse("µm per pixel for what is no 2-D network of RGB: slides take no other")
        self.is_picture = self.is_flat and pictures and not mpp
        self.modality: Modality = "slide" if mpp else "image" if self.is_picture else "volume"
        back = plans.get("transpose_backward", [0, 1, 2])
        if sorted(back) != [0, 1, 2]:
            self.refuse(f"transpose_backward {back}")
        self.ndim = AXES[self.modality]
        # Which axis of the network each axis of the file is.
        self.order = back if self.ndim == 3 else [axis - 1 for axis in back[1:]]
        if sorted(self.order) != [*range(self.ndim)]:
            self.refuse(f"transpose_backward {back} in two dimensions")

    def refuse(self, what: str) -> None:
        """Raise that something cannot be done here."""
        raise BundleError(f"{self.folder}: {what}: not known here")

    def _configuration(self, name: str | None) -> dict[str, Any]:
        config: dict[str, Any] = {}
        for _ in self.plans["configurations"] or "?":
            config = self.plans["configurations"][name] | config
            if not (name := config.pop("inherits_from", None)):
                return config
        self.refuse("configurations that inherit from each other")
        return config

    def turned(self, sides: Sequence[Any], *, alone: Any) -> list[Any]:
        """Return numbers of the network's axes in the file's order; `alone` of a slice's depth."""
        sides = [alone, *sides] if len(sides) < self.ndim else sides
        return [sides[axis] for axis in self.order]

    def table(self) -> dict[str, Any]:
        """Return the `model.toml`."""
        patch = self.turned(self.config["patch_size"], alone=1)
        labels = {k: v for k, v in self.dataset["labels"].items() if k != "ignore"}
        if any(isinstance(value, list) for value in labels.values()):
            self.refuse("labels that are regions, which overlap")
        names = sorted(labels, key=lambda name: int(labels[name]))
        if [int(labels[name]) for name in names] != [*range(len(names))]:
            self.refuse(f"labels {labels}, which are not 0, 1, 2 and so on")
        colors = cycle(COLORS)
        if self.mirror and len(self.mirror) < len(self.config["patch_size"]):
            self.refuse(f"mirroring along {[*self.mirror]} alone")
        options = self.options() | {"classes": len(names)}
        title = f"{self.plans.get('dataset_name') or self.folder.resolve().parent.name} {self.name}"
        return {
            "name": title,
            "modality": self.modality,
            "network": "nnunet",
            "tta": "mirror" if self.mirror else "none",
            "network_options": options,
            "input": {
                "channels": len(self.channels),
                "patch_size": patch,
                "overlap": [side // 2 for side in patch],
                "convention": "nnunet",
                **self.scaling(options),
                **self.resolution(),
            },
            "output": {
                "activation": "softmax",
                "classes": [
                    {"name": n, **({"color": next(colors)} if i else {})}
                    for i, n in enumerate(names)
                ],
            },
        }

    def resolution(self) -> dict[str, Any]:
        """Return the pixels that the network sees."""
        spacing = self.config["spacing"]
        if self.mpp is not None:
            return {"mpp": self.mpp}
        if self.is_picture:
            if any(side != 1 for side in spacing):
                self.refuse(f"pictures whose pixels are {spacing}")
            return {}
        for what, order in (("data", 3), ("probabilities", 1)):
            usual = {"is_seg": False, "order": order, "order_z": 0, "force_separate_z": None}
            key = f"resampling_fn_{what}"
            name, given = self.config[key], self.config[f"{key}_kwargs"]
            if (name, usual | given) != ("resample_data_or_seg_to_shape", usual):
                self.refuse(f"{key} {name} with {given}")
        return {
            "spacing_mm": self.turned([float(s) for s in spacing], alone=1.0),
            **({"time_points": [*range(len(self.channels))]} if len(self.channels) > 1 else {}),
        }

    def scaling(self, options: dict[str, Any]) -> dict[str, Any]:
        """Return how values are scaled; of slides, patch by patch where it is by their own."""
        count, schemes = len(self.channels), {*self.config["normalization_schemes"]}
        scheme = min(schemes)
        plain = {"mean": [0.0] * count, "std": [1.0] * count}
        if len(schemes) > 1:
            self.refuse(f"channels of several normalisations, {', '.join(sorted(schemes))}")
        if scheme == "ZScoreNormalization" and any(self.config["use_mask_for_norm"]):
            self.refuse("use_mask_for_norm, a normalisation within what is not 0")
        if self.mpp is not None:
            if scheme not in SLIDES:
                self.refuse(f"{scheme} for slides")
            options["zscore"] = scheme == "ZScoreNormalization"
            return plain | {"std": [SLIDES[scheme]] * count}
        if scheme == "CTNormalization":
            key = "foreground_intensity_properties_"
            found = self.plans.get(f"{key}per_channel") or self.plans[f"{key}by_modality"]
            if count > 1:
                self.refuse("CTNormalization of several channels")
            low, high, mean, std = (
                float(found["0"][name])
                for name in ("percentile_00_5", "percentile_99_5", "mean", "std")
            )
            width = high - low
            told = {"mean": [(mean - low) / width], "std": [max(std, 1e-8) / width]}
            return {"scale": [low, high], **told}
        if scheme not in SCALES:
            self.refuse(f"normalisation {scheme}")
        return {"scale": SCALES[scheme], **plain}

    def options(self) -> dict[str, Any]:
        """Return the network's options."""
        config = self.config
        found = config.get("architecture") or self._old_architecture()
        kind = found["network_class_name"].rpartition(".")[2]
        given = found["arch_kwargs"]
        if kind not in ARCHITECTURES:
            self.refuse(f"architecture {kind}")
        for key, value in given.items():
            if key not in READ | TRAINING and (key not in USUAL or value != USUAL[key]):
                self.refuse(f"{kind} with {key} {value}")
        if lacking := {*USUAL} - {*given}:
            self.refuse(f"{kind} without {min(lacking)}")
        norm = str(given["norm_op"]).rpartition(".")[2]
        if not norm.startswith(("InstanceNorm", "BatchNorm")):
            self.refuse(f"{kind} with {norm}")

        def sides(key: str) -> list[int]:
            return [side for stage in given[key] for side in self.turned(stage, alone=1)]

        return {
            "channels": len(self.channels),
            "ndim": self.ndim,
            "folds": self.folds,
            "features": given["features_per_stage"],
            "kernels": sides("kernel_sizes"),
            "strides": sides("strides"),
            "blocks": given[ARCHITECTURES[kind]],
            "decoder": given["n_conv_per_stage_decoder"],
            "residual": kind == "ResidualEncoderUNet",
            "batch_norm": "BN" in self.trainer or norm.startswith("BatchNorm"),
        }

    def _old_architecture(self) -> dict[str, Any]:
        """Return the architecture of plans from before 2.4, which do not write it out."""
        old, kind = self.config, self.config["UNet_class_name"]
        blocks, width = old["n_conv_per_stage_encoder"], old["UNet_base_num_features"]
        most = old["unet_max_num_features"]
        given = USUAL | {
            "features_per_stage": [min(width * 2**i, most) for i in range(len(blocks))],
            "kernel_sizes": old["conv_kernel_sizes"],
            "strides": old["pool_op_kernel_sizes"],
            ARCHITECTURES.get(kind, "n_conv_per_stage"): blocks,
            "n_conv_per_stage_decoder": old["n_conv_per_stage_decoder"],
            "norm_op": "InstanceNorm",
        }
        return {"network_class_name": kind, "arch_kwargs": given}

    def state(self, folds: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Return the tensors of all folds by the names that the network has for them."""
        state = {}
        for number, weights in enumerate(folds):
            heads = [name.split(".") for name in weights if ".seg_layers." in name]
            last = f"seg_layers.{max(int(parts[-2]) for parts in heads)}."
            for name, tensor in weights.items():
                # Some are there twice; of the heads the last alone predicts.
                if ".all_modules." in name or "decoder.encoder." in name:
                    continue
                if ".seg_layers." in name and last not in name:
                    continue
                name = name.removeprefix("module.").replace(last, "seg_layers.0.")
                if tensor.ndim > 3:
                    lying = tensor[:, :, None] if tensor.ndim - 2 < self.ndim else tensor
                    tensor = lying.permute(0, 1, *(axis + 2 for axis in self.order))
                state[f"nets.{number}.{name}"] = tensor.detach().contiguous()
        return state
