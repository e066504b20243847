"""Losses of a comparison's methods less the reference's, on three measures, as Markdown.

    python scripts/loss_differences.py experiments/main/gsm8k.yaml gsm8k 4 --seeds 0 1 2

Of one task and budget, paired over the seeds, with 95 % intervals: the test loss, the median over
the test problems (where all records have it), and the loss on the validation part, which no single
problem of the test part can move.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, stdev

from rankwise.experiments.board import Board
from rankwise.experiments.cell_records import CellRecord
from rankwise.experiments.config import load_experiment
from rankwise.experiments.statistics import summarise

Runs = dict[int, CellRecord]
Measure = Callable[[CellRecord], float | None]

MEASURES: dict[str, Measure] = {
    "test": lambda record: (record.test or {}).get("loss"),
    "of the median problem": lambda record: (record.test or {}).get("median_loss"),
    "on the validation part": lambda record: record.validation[-1].metrics["loss"],
}


def finished_runs(board: Board, task: str, rank: int, seeds: list[int]) -> dict[str, Runs]:
    """Label -> seed -> record, of the methods that have a record of every seed."""
    found = {}
    for group in board.groups:
        if group.task.name != task or group.rank not in (rank, None):
            continue
        cells = [cell for cell in board.finals(group) if cell.seed in seeds]
        runs = {cell.seed: record for cell in cells if (record := board.record(cell))}
        if len(runs) == len(seeds):
            found[group.method.label] = runs
    return found


def difference(runs: Runs, reference: Runs, measure: Measure) -> str:
    """Mean paired difference with its interval; a dash where a record lacks the measure."""
    pairs = [(measure(runs[seed]), measure(reference[seed])) for seed in runs]
    found = [ours - theirs for ours, theirs in pairs if ours is not None and theirs is not None]
    if runs is reference or len(found) < len(pairs) or len(found) < 2:
        return "–"
    summary = summarise(found)
    return f"{summary.mean:+.4f} [{summary.low:+.4f}, {summary.high:+.4f}]"


def main() -> None:
    """Print the table, best mean first."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("experiment", type=Path)
    parser.add_argument("task")
    parser.add_argument("rank", type=int, help="the budget, as a rank of LoRA")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    given = parser.parse_args()
    config = load_experiment(given.experiment)
    runs = finished_runs(Board(config), given.task, given.rank, given.seeds)
    if config.reference_label not in runs:
        parser.error(f"{config.reference_label} has no record of every seed at that place")
    reference = runs[config.reference_label]
    losses = {
        label: [loss for run in own.values() if (loss := MEASURES["test"](run)) is not None]
        for label, own in runs.items()
    }
    print("| method | loss | sd | largest |", " | ".join(MEASURES), "|")
    print("|---|" + "---:|" * (3 + len(MEASURES)))
    for label in sorted(losses, key=lambda label: fmean(losses[label])):
        own = losses[label]
        spread = f"{stdev(own):.4f}" if len(own) > 1 else "–"
        cells = [difference(runs[label], reference, measure) for measure in MEASURES.values()]
        print(f"| {label} | {fmean(own):.4f} | {spread} | {max(own):.4f} |", " | ".join(cells), "|")


if __name__ == "__main__":
    main()
