"""From records to the numbers of a comparison: one row per task, budget and method."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rankwise.artifacts import RESULTS_FILE
from rankwise.errors import ConfigError
from rankwise.experiments.board import Board
from rankwise.experiments.cell_records import CellRecord
from rankwise.experiments.config import ExperimentConfig
from rankwise.experiments.rows import Row, task_rows
from rankwise.experiments.statistics import Comparison, compare_with, holm, mean_ranks
from rankwise.experiments.trade import Curve, Trade, trade
from rankwise.files import write_text

SCHEMA_VERSION = 1
TABLE_FILE = "results.md"


@dataclass(frozen=True)
class Pooled:
    """A method against the reference over several tasks.

    Attributes:
        rank: Budget.
        metric: What the tasks have in common.
        tasks: Their names.
        against: The comparison; its pairs are tasks and seeds.
    """

    rank: int
    metric: str
    tasks: list[str]
    against: Comparison


@dataclass(frozen=True)
class Results:
    """Everything a page or a table needs.

    Attributes:
        title: Of the experiment.
        reference: Label of the method that the others are compared with.
        rows: All methods at all tasks and budgets, in the experiment's order.
        mean_ranks: Budget rank -> method -> mean rank over tasks and seeds; 1 is best.
        pooled: Comparisons over all tasks that have a metric in common, where there are several.
        trades: How many parameters each method needs for the reference's result.
        cells: How many there are.
        finished: How many have a record.
        commits: Of the records.
        hardware: Processors and accelerators of the records.
        hours: Spent on all records together, without loading and profiles.
        experiment: The configuration.
    """

    title: str
    reference: str
    rows: list[Row]
    mean_ranks: dict[str, dict[str, float]]
    pooled: list[Pooled]
    trades: list[Trade]
    cells: int
    finished: int
    commits: list[str]
    hardware: list[str]
    hours: float
    experiment: dict[str, Any]
    schema_version: int = SCHEMA_VERSION

    def save(self, folder: Path) -> None:
        """Write `results.json`; NaN becomes null."""
        document = _plain(asdict(self))
        write_text(folder / RESULTS_FILE, json.dumps(document, indent=1, allow_nan=False) + "\n")


def make_results(board: Board) -> Results:
    """Read the records and compare.

    Raises:
        ConfigError: Records of one task were made with different data or base models.
    """
    config = board.config
    records = board.records()
    _refuse_mixed(records)
    rows = [row for task in config.make_tasks() for row in task_rows(board, task)]
    rows = _compared(rows, config.reference_label)
    seconds = sum(r.seconds[part] for r in records for part in ("prepare", "train", "evaluate"))
    return Results(
        title=config.title or Path(config.output).name,
        reference=config.reference_label,
        rows=rows,
        mean_ranks=_mean_ranks(rows),
        pooled=_pooled(rows, config.reference_label),
        trades=_trades(rows, config),
        cells=board.total(),
        finished=len(records),
        commits=sorted({record.commit or "none" for record in records}),
        hardware=sorted({_machine(record) for record in records}),
        hours=round(seconds / 3600, 3),
        experiment=config.model_dump(mode="json"),
    )


def _compared(rows: list[Row], reference: str) -> list[Row]:
    """Each row against the reference's at the same task and budget, over the seeds of both."""
    found: dict[tuple[str, int, str], Comparison] = {}
    for task, rank in dict.fromkeys((row.task, row.rank) for row in rows):
        cells = {r.label: r.values for r in rows if (r.task, r.rank) == (task, rank) and r.values}
        if reference not in cells:
            continue
        lower = next(r.lower_is_better for r in rows if r.task == task)
        for comparison in compare_with(
            reference, _pairable(cells, reference), lower_is_better=lower
        ):
            found[task, rank, comparison.method] = comparison
    corrected = dict(zip(found, holm([c.t_p for c in found.values()]), strict=True))
    return [
        replace(
            row,
            against=found.get((row.task, row.rank, row.label)),
            holm_all=corrected.get((row.task, row.rank, row.label)),
        )
        for row in rows
    ]


def _pooled(rows: Sequence[Row], reference: str) -> list[Pooled]:
    """Of the methods that are finished on every task, paired over tasks and seeds."""
    found = []
    for rank, metric in dict.fromkeys((row.rank, row.metric) for row in rows):
        chosen = [r for r in rows if (r.rank, r.metric) == (rank, metric)]
        tasks = list(dict.fromkeys(row.task for row in chosen))
        cells = {
            label: _over_tasks([row for row in chosen if row.label == label], tasks)
            for label in dict.fromkeys(row.label for row in chosen)
        }
        cells = {label: values for label, values in cells.items() if values}
        if len(tasks) < 2 or reference not in cells:
            continue
        lower = chosen[0].lower_is_better
        for comparison in compare_with(
            reference, _pairable(cells, reference), lower_is_better=lower
        ):
            found.append(Pooled(rank, metric, tasks, comparison))
    return found


def _pairable(cells: dict[str, dict[str, float]], reference: str) -> dict[str, dict[str, float]]:
    """Those that share a cell with the reference, which may have diverged where they did not."""
    return {name: v for name, v in cells.items() if v.keys() & cells[reference].keys()}


def _over_tasks(rows: Sequence[Row], tasks: Sequence[str]) -> dict[str, float]:
    """Task and seed -> metric; nothing if a task is missing, unfinished or has no value."""
    if {row.task for row in rows if row.status == "finished" and row.values} != set(tasks):
        return {}
    return {f"{row.task} {seed}": v for row in rows for seed, v in row.values.items()}


def _mean_ranks(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Over the tasks and seeds that all finished methods of a budget share."""
    found: dict[str, dict[str, float]] = {}
    for rank in dict.fromkeys(row.rank for row in rows):
        cells: dict[str, dict[str, float]] = {}
        tasks = {row.task for row in rows if row.rank == rank and row.values}
        for row in rows:
            if row.rank == rank and row.status == "finished" and not row.diverged:
                sign = 1.0 if row.lower_is_better else -1.0
                own = cells.setdefault(row.label, {})
                own |= {f"{row.task} {seed}": sign * v for seed, v in row.values.items()}
        complete = {
            label: values
            for label, values in cells.items()
            if {key.split(" ")[0] for key in values} == tasks
        }
        if len(complete) > 1:
            found[str(rank)] = mean_ranks(complete, lower_is_better=True)
    return found


def _trades(rows: Sequence[Row], config: ExperimentConfig) -> list[Trade]:
    """Of every method with a size at two budgets or more, the reference's own left out."""
    found = []
    for task in dict.fromkeys(row.task for row in rows):
        sized = [row for row in rows if row.task == task and row.parameters and row.values]
        rank = config.reference_rank([row.rank for row in rows if row.task == task])
        key = config.reference_label, rank
        goal = next((row for row in sized if (row.label, row.rank) == key), None)
        if goal is None:
            continue
        assert goal.parameters is not None
        against = goal.label, goal.rank, goal.parameters, goal.values
        for label in dict.fromkeys(row.label for row in sized if row.label != goal.label):
            curve = _size_curve([row for row in sized if row.label == label])
            if curve.values.keys() & goal.values.keys() and len(curve.parameters) > 1:
                lower = goal.lower_is_better
                found.append(trade(task, label, curve, against, lower_is_better=lower))
    return found


def _size_curve(rows: Sequence[Row]) -> Curve:
    """The seeds that every budget has; of equal sizes the first counts."""
    by_size: dict[int, Row] = {}
    for row in rows:
        assert row.parameters is not None
        by_size.setdefault(row.parameters, row)
    sizes = sorted(by_size)
    seeds = set.intersection(*(set(row.values) for row in by_size.values()))
    return Curve(sizes, {seed: [by_size[n].values[seed] for n in sizes] for seed in seeds})


def _refuse_mixed(records: Sequence[CellRecord]) -> None:
    """A task has the same data everywhere, and one base model by seed, which may draw of it."""
    data: dict[tuple[Any, ...], set[str]] = {}
    for record in records:
        data.setdefault((record.task, "data"), set()).add(record.data_fingerprint)
        models = data.setdefault((record.task, "base models", record.seed), set())
        models.add(record.model_fingerprint)
    for (task, what, *_), found in data.items():
        if len(found) > 1:
            raise ConfigError(
                f"task {task}: its records were made with different {what} "
                f"({', '.join(sorted(found))}), although the settings are the same; restore what "
                "changed, or choose another output."
            )


def _machine(record: CellRecord) -> str:
    facts = record.hardware
    return str(facts.get("accelerator") or facts.get("processor") or "unknown")


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity; what is unknown is null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
