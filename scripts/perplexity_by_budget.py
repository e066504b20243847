"""Perplexity of a comparison's methods at each budget with 95 % intervals, as Markdown.

    python scripts/perplexity_by_budget.py experiments/paper/gard/comparison.yaml --scale small

A second table holds what each perplexity is in per cent of the reference's at that budget, less
100: the geometric mean over the seeds, paired, with its interval.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

from rankwise.experiments.board import Board
from rankwise.experiments.config import load_experiment
from rankwise.experiments.results import make_results
from rankwise.experiments.rows import Row
from rankwise.experiments.statistics import summarise
from rankwise.tables import markdown_table


def perplexity(row: Row) -> str:
    """Mean over the seeds with its interval."""
    found = summarise(list(row.others["perplexity"].values()))
    interval = "" if math.isnan(found.low) else f" [{found.low:.3f}, {found.high:.3f}]"
    return f"{found.mean:.3f}{interval}, {found.count}"


def less_reference(row: Row) -> str:
    """Per cent of the reference's perplexity, less 100; the loss is the perplexity's logarithm."""
    if row.against is None:
        return ""
    found = row.against.difference
    mean, low, high = (100 * math.expm1(x) for x in (found.mean, found.low, found.high))
    interval = "" if math.isnan(low) else f" [{low:+.2f}, {high:+.2f}]"
    return f"{mean:+.2f} %{interval}"


def print_table(rows: list[Row], show: Callable[[Row], str], suffix: str) -> None:
    """A line a method, a column a budget; a dash where there is no run."""
    ranks = sorted({row.rank for row in rows})
    columns = ["method", *(f"r = {rank}{suffix}" for rank in ranks)]
    table = []
    for label in dict.fromkeys(row.label for row in rows):
        found = {row.rank: show(row) for row in rows if row.label == label}
        table.append([label, *(found.get(rank, "–") for rank in ranks)])
    print(markdown_table(columns, table), end="\n\n")


def main() -> None:
    """Print both tables for every task that measures perplexity."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("experiment", type=Path)
    parser.add_argument("--scale", choices=("full", "small"), default="full")
    given = parser.parse_args()
    results = make_results(Board(load_experiment(given.experiment, scale=given.scale)))
    rows = [r for r in results.rows if r.metric == "loss" and r.others.get("perplexity")]
    if not rows:
        parser.error("no finished run is judged by loss and has a perplexity")
    for task in dict.fromkeys(row.task for row in rows):
        print(f"{task}: perplexity, interval, seeds; then against {results.reference}\n")
        own = [row for row in rows if row.task == task]
        print_table(own, perplexity, "")
        print_table(own, less_reference, f", against {results.reference}")


if __name__ == "__main__":
    main()
