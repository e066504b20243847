"""Plans of every rule at one budget, side by side, from a saved profile, as Markdown.

    python scripts/compare_plans.py PROFILE [r]

Needs the extra `compare` (scipy), and a profile made with `--statistics gram`.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Mapping

import numpy as np
from scipy.stats import spearmanr

import rankwise as rw
from rankwise.methods import Method

EDGES = (0, 1, 3, 5, 8, 9, 13, 17, 33, 65)


def methods(r: int) -> dict[str, Method]:
    """The rules that are compared, all at LoRA r's budget."""
    return {
        "uniform": rw.Lora(r=r),
        "GARD": rw.Gard(r=r),
        "GID": rw.LoraGid(r=r, budget="exact"),
        "sensitivity": rw.LsLora(r=r),
        "water-fill": rw.WaterFill(r=r),
        "gradient norm": rw.Compose(r=r, estimator="gradient-norm"),
        "depth": rw.Compose(r=r, estimator="depth"),
        "random": rw.Compose(r=r, estimator="random"),
    }


def captured(profile: rw.GradientProfile, ranks: Mapping[str, int]) -> float:
    """Share of `sum sigma^2` of the mean gradients that updates of these ranks can hold."""
    energies = {name: values.numpy() ** 2 for name, values in profile.singular_values.items()}
    kept = sum(float(energies[name][:rank].sum()) for name, rank in ranks.items())
    return kept / sum(float(values.sum()) for values in energies.values())


def row(cells: list[object]) -> str:
    """A Markdown table row."""
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def main(folder: str, r: int = 8) -> None:
    """Print the comparison."""
    profile = rw.GradientProfile.load(folder)
    names = list(profile.modules)
    ranks = {}
    parameters = {}
    for label, method in methods(r).items():
        plan = method.plan(profile)
        parameters[label] = plan.parameters
        ranks[label] = {n: plan.modules[n].rank if n in plan.modules else 0 for n in names}
    p = profile.provenance
    print(f"{p.model}: N = {p.batches} batches, {p.tokens:,} tokens, {p.dtype}; LoRA r = {r}.\n")
    bins = [f"{low}-{high - 1}" for low, high in itertools.pairwise(EDGES)]
    print(row(["rule", "parameters", "captured energy", "min", "median", "max", *bins]))
    print(row(["---"] * (6 + len(bins))))
    for label, chosen in ranks.items():
        values = np.array(list(chosen.values()))
        counts = np.histogram(values, EDGES)[0].tolist()
        energy = f"{captured(profile, chosen):.2%}"
        spread = [values.min(), int(np.median(values)), values.max()]
        print(row([label, f"{parameters[label]:,}", energy, *spread, *counts]))
    for label, centred in (("uncentred", False), ("centred", True)):
        values = sorted(profile.energy_ranks(centred=centred).values())
        median = values[len(values) // 2]
        print(
            f"\nEnergy ranks at 0.9, {label}: lowest {values[:3]}, median {median}, "
            f"highest {values[-1]}, of M = {p.batches}."
        )
    labels = [label for label in ranks if label != "uniform"]
    print("\nSpearman correlation over modules of the ranks that two rules give:\n")
    print(row(["", *labels]))
    print(row(["---"] * (1 + len(labels))))
    for a in labels:
        cells = [
            spearmanr(list(ranks[a].values()), list(ranks[b].values())).statistic for b in labels
        ]
        print(row([a, *(f"{value:+.2f}" for value in cells)]))


if __name__ == "__main__":
    main(sys.argv[1], *(int(value) for value in sys.argv[2:3]))
