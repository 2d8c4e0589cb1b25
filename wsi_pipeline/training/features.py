"""What a frozen encoder gives of crops: computed once for all trainings of a recipe, and kept."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Generator

from wsi_pipeline.errors import BundleError, raised_as
from wsi_pipeline.files.remote import write_whole
from wsi_pipeline.networks.check import FAILS
from wsi_pipeline.networks.decoder import Decoder, FrozenEncoder, packed
from wsi_pipeline.training.crops import Sampler, Survey, weighted
from wsi_pipeline.training.fit import Batch, crop_batch, new_network, seed_of
from wsi_pipeline.training.recipe import Recipe
from wsi_pipeline.training.samples import Sample
from wsi_pipeline.training.validate import measure

CROPS = 256
"""Of each patient, where the recipe does not say."""


class Features:
    """Crops of patients, which stay the same, and what a frozen encoder gives of them.

    They follow from the patient's own images: whoever is left out, those of the others are there.

    Args:
        folder: of their files, one for each batch of crops of a patient.
    """

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        self._recipe, self._folder = recipe, folder
        decoder = new_network(recipe, folder)
        assert isinstance(decoder, Decoder)
        assert recipe.bundle.encoder
        decoder.encoder = self.encoder = FrozenEncoder(recipe.bundle.encoder, decoder)
        self.encoder.kept, self._decoder = folder / "patches", decoder.eval()
        self.encoder.kept.mkdir(parents=True, exist_ok=True)
        # batches of crops of each patient
        self._parts = math.ceil((recipe.train.crops or CROPS) / recipe.train.batch_size)

    def compute(
        self,
        surveys: Mapping[Sample, Survey],
        device: torch.device,
        progress: Callable[[str, int, int, float, None], None],
    ) -> None:
        """Compute the features of all crops, and of the patches that judge, unless they are there.

        Args:
            progress: told what is computed, batches and images done, all of them, NaN and None.
        """
        if (whole := self._folder / "whole").exists():
            return
        owned: dict[str, list[Sample]] = {}
        for sample, found in surveys.items():
            if found.totals.any():
                owned.setdefault(sample.patient, []).append(sample)
        done, total = 0, len(owned) * self._parts + len(surveys)

        def told() -> None:
            nonlocal done
            done += 1
            progress("features", done, total, math.nan, None)

        for patient, own in owned.items():
            sampler = Sampler(own, [surveys[s] for s in own], balance=self._recipe.train.balance)
            for part in range(self._parts):
                if not (path := self._path(patient, part)).is_file():
                    multiple, where = self._decoder.size_multiple, (int(path.parent.name, 16), part)
                    images, truths, _ = crop_batch(self._recipe, sampler, multiple, where)
                    with raised_as(BundleError, FAILS, "the encoder"):
                        features = self.encoder.encode(images.to(device))
                    path.parent.mkdir(exist_ok=True)
                    write_whole(path, packed(features, truths=truths))
                told()
        for sample in surveys:
            # Whatever the decoder answers: it asks for the patches that all others are judged by.
            measure(self._decoder.to(device), self._recipe.bundle, [sample])
            told()
        write_whole(whole, b"")

    def batch(self, samples: Sequence[Sample], where: tuple[int, ...]) -> Batch:
        """Return features of crops and their truths, as `crop_batch` does images."""
        spec = self._recipe.train
        generator = Generator().manual_seed(seed_of(spec.seed, *where))
        shares = {s.patient: s.weight for s in samples if self._path(s.patient, 0).is_file()}
        patients, crops = sorted(shares), []
        for _ in range(spec.batch_size):
            patient = patients[weighted(np.array([shares[p] for p in patients]), generator)]
            drawn = int(torch.randint(self._parts * spec.batch_size, (), generator=generator))
            part, row = divmod(drawn, spec.batch_size)
            with safe_open(self._path(patient, part), "pt") as file:
                crops.append([file.get_slice(name)[row] for name in ("features", "truths")])
        features, truths = map(torch.stack, zip(*crops, strict=True))
        return features.float(), truths, None

    def _path(self, patient: str, part: int) -> Path:
        digest = hashlib.sha256(patient.encode()).hexdigest()[:16]
        return self._folder / digest / f"{part}.safetensors"
