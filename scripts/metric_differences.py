"""Metrics of a comparison's methods less the reference's, on several measures, as Markdown.

    python scripts/metric_differences.py experiments/main/gsm8k.yaml gsm8k 4 --seeds 0 1 2
    python scripts/metric_differences.py experiments/main/gsm8k.yaml gsm8k 8 4
    python scripts/metric_differences.py experiments/main/gsm8k.yaml gsm8k 8 \
        --with selection.extend=0
    python scripts/metric_differences.py experiments/main/gsm8k_start.yaml gsm8k 8 \
        --against experiments/main/gsm8k.yaml
    python scripts/metric_differences.py experiments/main/choice.yaml choice 8 --metric choice_loss

Of one task, paired over the seeds, with 95 % intervals: the test loss, the median over the test
problems (where all records have it), and the loss on the validation part, which no single problem
of the test part can move; or another metric of the task on both parts. The p are of the paired
t-test on the test part, as they are and corrected by Holm for all rows. Of several budgets a seed
counts once, with its mean over them. With `--against` each method is held against itself in another
experiment instead of the reference.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, stdev

from rankwise.experiments.board import Board
from rankwise.experiments.cell_records import CellRecord
from rankwise.experiments.config import load_experiment
from rankwise.experiments.statistics import Comparison, compare_with, holm
from rankwise.experiments.tasks.base import LOWER_IS_BETTER

Runs = dict[int, list[CellRecord]]
"""Seed -> a record of each budget."""
Measure = Callable[[CellRecord], float | None]


def measures_of(metric: str) -> dict[str, Measure]:
    """What is compared, the test's metric first."""
    measures: dict[str, Measure] = {"test": lambda record: (record.test or {}).get(metric)}
    if metric == "loss":
        measures["of the median problem"] = lambda record: (record.test or {}).get("median_loss")
    measures["on the validation part"] = lambda record: record.validation[-1].metrics.get(metric)
    return measures


def finished_runs(board: Board, task: str, ranks: list[int], seeds: list[int]) -> dict[str, Runs]:
    """Label -> runs, of the methods that have a record of every budget and seed."""
    found: dict[str, Runs] = {}
    for group in board.groups:
        if group.task.name != task or group.rank not in (*ranks, None):
            continue
        runs = found.setdefault(group.method.label, {seed: [] for seed in seeds})
        for cell in board.finals(group):
            if cell.seed in runs and (record := board.record(cell)):
                runs[cell.seed] += [record] * (len(ranks) if group.rank is None else 1)
    return {
        label: runs
        for label, runs in found.items()
        if all(len(records) == len(ranks) for records in runs.values())
    }


def values(runs: Runs, measure: Measure) -> list[float] | None:
    """One a seed; None where a record lacks the measure."""
    found = [[measure(record) for record in records] for records in runs.values()]
    known = [[value for value in own if value is not None] for own in found]
    return None if known != found else [fmean(own) for own in known]


def comparison(runs: Runs, reference: Runs, measure: Measure) -> Comparison | None:
    """Paired over the seeds; None for the reference and where a record lacks the measure."""
    ours, theirs = values(runs, measure), values(reference, measure)
    if runs is reference or ours is None or theirs is None:
        return None
    cells = {
        who: {str(seed): value for seed, value in zip(runs, each, strict=True)}
        for who, each in (("ours", ours), ("theirs", theirs))
    }
    # the direction decides about wins alone, which are not printed
    [found] = compare_with("theirs", cells, lower_is_better=True)
    return found


def difference(found: Comparison | None) -> str:
    """Mean with its interval; a dash where there is none."""
    if found is None or found.difference.count < 2:
        return "–"
    summary = found.difference
    return f"{summary.mean:+.4f} [{summary.low:+.4f}, {summary.high:+.4f}]"


def main() -> None:
    """Print the table, best mean first."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("experiment", type=Path)
    parser.add_argument("task")
    parser.add_argument("ranks", type=int, nargs="+", help="the budgets, as ranks of LoRA")
    parser.add_argument("--seeds", type=int, nargs="+", help="the experiment's if none are named")
    parser.add_argument("--scale", choices=("full", "small"), default="full")
    parser.add_argument("--with", nargs="+", default=[], dest="overrides", metavar="KEY=VALUE")
    parser.add_argument("--against", type=Path, help="another experiment with that task")
    parser.add_argument("--metric", default="loss", help="of the task, instead of the loss")
    given = parser.parse_args()
    config = load_experiment(given.experiment, given.overrides, scale=given.scale)
    asked = given.task, given.ranks, given.seeds or config.seeds
    runs = finished_runs(Board(config), *asked)
    if given.against is not None:
        other = load_experiment(given.against, scale=given.scale)
        references = finished_runs(Board(other), *asked)
        runs = {label: own for label, own in runs.items() if label in references}
    elif config.reference_label in runs:
        references = dict.fromkeys(runs, runs[config.reference_label])
    else:
        parser.error(f"{config.reference_label} has no record of every seed and budget there")
    if not runs:
        parser.error("no method has a record of every seed and budget in both")
    measures = measures_of(given.metric)
    scores = {label: found for label, r in runs.items() if (found := values(r, measures["test"]))}
    if not scores:
        parser.error(f"no record has a {given.metric} of the test part")
    lower = given.metric.startswith(LOWER_IS_BETTER)  # parts have names of their own behind it
    worst, title = (max, "largest") if lower else (min, "smallest")
    compared = {
        label: [comparison(r, references[label], each) for each in measures.values()]
        for label, r in runs.items()
    }
    uncorrected = [found.t_p if found else math.nan for found, *_ in compared.values()]
    p = dict(zip(runs, zip(uncorrected, holm(uncorrected), strict=True), strict=True))
    print(f"| method | {given.metric} | sd | {title} |", " | ".join(measures), "| p | p (Holm) |")
    print("|---|" + "---:|" * (5 + len(measures)))
    for label in sorted(scores, key=lambda label: fmean(scores[label]), reverse=not lower):
        own = scores[label]
        cells = [
            label,
            f"{fmean(own):.4f}",
            f"{stdev(own):.4f}" if len(own) > 1 else "–",
            f"{worst(own):.4f}",
            *map(difference, compared[label]),
            *("–" if math.isnan(value) else f"{value:.2g}" for value in p[label]),
        ]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
