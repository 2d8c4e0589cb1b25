"""Dice on patients left out, with and without test-time augmentation, and of ensembles.

python benchmarks/left_out_tta.py recipe.toml=trained other.toml=other --data DATA

Takes recipes of the same data with the folders that `train` wrote. Each fold that is through judges
the images that it has not seen, by the patches and the blending of `segment --precision fp32`, with
each --tta; and of the first recipe with each other the mean, as --combine mean. Writes Markdown.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from left_out import left_out

from wsi_pipeline.evaluation.confusion import IGNORE
from wsi_pipeline.networks.decoder import Decoder, FrozenEncoder
from wsi_pipeline.options import Tta
from wsi_pipeline.training.recipe import load_recipe
from wsi_pipeline.training.validate import chances, open_predictor

torch.set_num_threads(1)
parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("trained", nargs="+", metavar="RECIPE=FOLDER")
parser.add_argument("--data", type=Path, required=True)
given = parser.parse_args()
TTA: tuple[Tta, ...] = get_args(Tta)
seconds, shown = defaultdict[str, float](float), dict[tuple[str, str], dict[str, torch.Tensor]]()
truths = dict[tuple[str, str], torch.Tensor]()
for text in given.trained:
    file, _, folder = text.rpartition("=")
    recipe = load_recipe(file)
    for network, sample in left_out(recipe, Path(folder), given.data):
        image, truth = sample.read_all()
        # What shows no class has no Dice.
        if not ((truth > 0) & (truth != IGNORE)).any():
            continue
        if isinstance(network, Decoder) and recipe.bundle.encoder:
            network.encoder = FrozenEncoder(recipe.bundle.encoder, network)
        key = (sample.patient, sample.name)
        truths[key] = truth
        for tta in TTA:
            begun, column = time.process_time(), f"{Path(folder).name}, {tta}"
            with closing(open_predictor(network, replace(recipe.bundle, tta=tta))) as predictor:
                found = chances(predictor, image, outside=sample.outside)
            seconds[column] += time.process_time() - begun
            shown.setdefault(key, {})[column] = found[-1]
names = [Path(text.rpartition("=")[2]).name for text in given.trained]
for found in shown.values():
    for tta in TTA:
        own = {n: found[f"{n}, {tta}"] for n in names if f"{n}, {tta}" in found}
        for other in names[1:]:
            if other in own and names[0] in own:
                found[f"{names[0]} + {other}, {tta}"] = (own[names[0]] + own[other]) / 2
columns = list(dict.fromkeys(column for found in shown.values() for column in found))
sums = defaultdict[tuple[str, str], np.ndarray](lambda: np.zeros(2))
for (patient, name), found in shown.items():
    known = truths[patient, name] != IGNORE
    true = (truths[patient, name] > 0) & known
    for column, chance in found.items():
        called = (chance > 0.5) & known
        sums[patient, column] += [2 * int((called & true).sum()), int(called.sum() + true.sum())]
print("| left out |", " | ".join(columns), "|\n|---|" + "---:|" * len(columns))
dices = {key: part[0] / part[1] for key, part in sums.items()}
for patient in dict.fromkeys(patient for patient, _ in shown):
    print(f"| {patient} |", " | ".join(f"{dices.get((patient, c), 0):.3f}" for c in columns), "|")
means = [np.mean([d for (_, c), d in dices.items() if c == column]) for column in columns]
print("| **mean** |", " | ".join(f"{mean:.3f}" for mean in means), "|")
print("| CPU s |", " | ".join(f"{seconds[c]:.0f}" if c in seconds else "" for c in columns), "|")
