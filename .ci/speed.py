"""How fast is the training? Prints seed-epochs a second, of ten seeds at once and of one.

Laptop size by default, measured after each epoch, medians of rounds that are taken in turn. With
--preset paper: one seed at the paper's size.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import revcurse  # noqa: E402


def seed_epochs_a_second(seeds, preset, epochs):
    """Train these seeds for some epochs, and measure after each."""
    make = revcurse.Reversal.paper if preset == "paper" else revcurse.Reversal
    experiment, _, _ = revcurse.prepare(make(epochs=epochs))
    experiment.measurements = 10**4
    models, datasets = [], []
    for seed in seeds:
        datasets.append(experiment.make_data(seed))
        torch.manual_seed(seed)
        models.append(experiment.make_model(datasets[-1]))
    began = time.monotonic()
    revcurse.train(experiment, models, datasets, seeds)
    return len(seeds) * epochs / (time.monotonic() - began)


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--preset", choices=["laptop", "paper"], default="laptop")
parser.add_argument("--rounds", type=int, default=3)
flags = parser.parse_args()
ways = {"ten seeds at once": (range(10), 20), "one seed": (range(1), 20)}
if flags.preset == "paper":
    ways = {"one seed": (range(1), 2)}
found = {way: [] for way in ways}
for _ in range(flags.rounds):
    for way, (seeds, epochs) in ways.items():
        found[way].append(seed_epochs_a_second(seeds, flags.preset, epochs))
for way, rates in found.items():
    print(
        f"{way}: {statistics.median(rates):.3g} seed-epochs a second "
        f"(from {min(rates):.3g} to {max(rates):.3g} in {flags.rounds} rounds)"
    )
