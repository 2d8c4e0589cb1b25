from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from bundles import Pointwise, pointwise_bundle, small_unet_bundle, spoil
from torch import Tensor

from wsi_pipeline.bundle import load_bundle
from wsi_pipeline.errors import BundleError
from wsi_pipeline.networks.check import (
    check_shapes,
    largest_difference,
    random_patches,
    try_bundle,
    with_patch_size,
)

MODELS = Path(__file__).parents[1] / "models"


class NoNumbers(Pointwise):
    """A program that divides by zero."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.log(-x[:, :1].abs() - 1).repeat(1, 3, 1, 1)


class Several(Pointwise):
    """A program that gives its logits beside others."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


class Picky(Pointwise):
    """A program for a size that no bundle here has."""

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(-1, 3, 100, 100)


def test_a_trained_bundle_answers(tmp_path: Path) -> None:
    trial = try_bundle(load_bundle(small_unet_bundle(tmp_path)))
    assert trial.shapes == {"input": (1, 3, 32, 32), "mask": (1, 3, 32, 32)}
    assert trial.has_weights
    assert trial.seconds > 0
    assert trial.difference is not None
    assert 0 < trial.difference < 1e-5


def test_a_program_answers_and_has_no_inference_form(tmp_path: Path) -> None:
    trial = try_bundle(load_bundle(pointwise_bundle(tmp_path, mpp=0.5)), patch_size=(40, 24))
    assert trial.shapes["mask"] == (1, 3, 40, 24)
    assert (trial.difference, trial.seconds_folded) == (None, None)


def test_an_answer_in_several_is_told(tmp_path: Path) -> None:
    bundle = load_bundle(pointwise_bundle(tmp_path, mpp=0.5, program=Several))
    with pytest.raises(BundleError, match=r"answers with mask .*'tuple'.* make it mask \(1, 3, "):
        try_bundle(bundle)


def test_a_program_of_a_fixed_batch_gets_one(tmp_path: Path) -> None:
    folder = pointwise_bundle(tmp_path, mpp=0.5, patch_size=64)
    program = torch.export.export(Pointwise(), (torch.rand(4, 3, 64, 64),))
    torch.export.save(program, folder / "program.pt2")
    toml = (folder / "model.toml").read_text("utf-8").replace("program.pt", "program.pt2")
    (folder / "model.toml").write_text(toml.replace("torchscript", "exported"), "utf-8")
    assert try_bundle(load_bundle(folder)).shapes["mask"] == (4, 3, 64, 64)
    with pytest.raises(BundleError, match="failed on a batch"):
        try_bundle(load_bundle(folder), patch_size=(128,))


def test_random_weights_leave_the_random_numbers_of_others_alone() -> None:
    bundle = load_bundle(MODELS / "swish-unet-breast")
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    one = try_bundle(bundle, patch_size=(16,))
    assert torch.equal(torch.rand(3), expected)
    assert not one.has_weights
    assert one.difference == try_bundle(bundle, patch_size=(16,)).difference


@pytest.mark.parametrize(
    ("program", "message"), [(NoNumbers, "not finite: mask"), (Picky, "failed on a batch")]
)
def test_a_bad_program_is_refused(
    tmp_path: Path, program: type[torch.nn.Module], message: str
) -> None:
    bundle = load_bundle(pointwise_bundle(tmp_path, mpp=0.5, patch_size=64, program=program))
    with pytest.raises(BundleError, match=message):
        try_bundle(bundle)


def test_an_inference_form_that_differs_is_refused(tmp_path: Path) -> None:
    folder = small_unet_bundle(tmp_path)
    spoil(folder)
    with pytest.raises(BundleError, match=r"inference form differs from the network by \d"):
        try_bundle(load_bundle(folder))


def test_other_classes_and_labels_are_refused(tmp_path: Path) -> None:
    bundle = with_patch_size(load_bundle(MODELS / "nmtnet-mri"), (32,))
    answer = {"mask": torch.zeros(2, 1, 32, 32), "label": torch.zeros(2, 2)}
    check_shapes(answer, bundle, 2)
    for other in (
        {**answer, "mask": torch.zeros(2, 2, 32, 32)},
        {**answer, "mask": torch.zeros(2, 1, 16, 16)},
        {**answer, "label": torch.zeros(2, 3)},
        {"mask": answer["mask"]},
    ):
        with pytest.raises(BundleError, match=r"model\.toml make it mask \(2, 1, 32, 32\), label"):
            check_shapes(other, bundle, 2)
    with pytest.raises(BundleError, match=r"answers with mask .*, label \(2, 2\)"):
        check_shapes(answer, dataclasses.replace(bundle, labels=()), 2)


def test_patch_sizes_have_the_bundles_axes() -> None:
    volume = load_bundle(MODELS / "mm3d-unet-dcemri")
    assert with_patch_size(volume, (16,)).input.patch_size == (16, 16, 16)
    assert with_patch_size(volume, (8, 16, 24)).input.patch_size == (8, 16, 24)
    with pytest.raises(BundleError, match="2 sizes for patches of 3 axes"):
        with_patch_size(volume, (16, 16))


def test_random_patches_are_pixels_as_the_network_sees_them() -> None:
    bundle = with_patch_size(load_bundle(MODELS / "lightmuseg-bcss-demo"), (64,))
    patches = random_patches(bundle, 2)
    assert patches.shape == (2, 3, 64, 64)
    mean, std = (torch.tensor(v).reshape(3, 1, 1) for v in (bundle.input.mean, bundle.input.std))
    pixels = patches * std + mean
    assert float(pixels.min()) > -1e-6
    assert float(pixels.max()) < 1 + 1e-6


def test_a_difference_is_the_largest_of_all_outputs_and_may_be_none() -> None:
    one = {"mask": torch.tensor([2.0, -8.0]), "label": torch.tensor([1.0, 0.0])}
    two = {"mask": torch.tensor([2.0, -7.0]), "label": torch.tensor([1.0, 0.5])}
    assert largest_difference(one, two) == 0.5
    assert largest_difference(one, one) == 0
    lost = {**one, "label": torch.tensor([float("nan"), 0.0])}
    assert not largest_difference(one, lost) <= 1
