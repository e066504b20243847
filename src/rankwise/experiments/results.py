"""From records to the numbers of a comparison: one row per task, budget and method."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from rankwise.errors import ConfigError
from rankwise.experiments.board import Board, Choice
from rankwise.experiments.cell_records import CellRecord
from rankwise.experiments.cells import Group
from rankwise.experiments.config import TaskSpec
from rankwise.experiments.statistics import (
    Comparison,
    Summary,
    compare_with,
    holm,
    mean_ranks,
    summarise,
)
from rankwise.files import write_text

SCHEMA_VERSION = 1
RESULTS_FILE, TABLE_FILE = "results.json", "results.md"


@dataclass(frozen=True)
class Row:
    """One method at one task and budget.

    Attributes:
        task: Name of the task.
        metric: The task's metric.
        lower_is_better: Whether a smaller one is better.
        rank: LoRA rank whose parameters are the budget.
        label: The method as the experiment calls it.
        method: Name of the method.
        ours: Whether it is this project's or the papers' own.
        budget: The budget in parameters; None before a record is there.
        parameters: Trainable parameters of the adapters, the largest of the seeds'.
        matched: Whether all seeds lie within 2 % of the budget; None where no budget applies.
        trainable: What the optimizer updates, heads not counted.
        learning_rate: Chosen or fixed; None while the search goes on, or where nothing is trained.
        at_edge: Whether the chosen rate is the grid's smallest or largest.
        rates: Learning rate -> mean validation metric of the search; None where a run diverged.
        values: Seed -> metric on the test part.
        others: Name of another metric -> seed -> value.
        summary: Of `values`; None without any.
        curve: Steps, and the mean of the validation metric over the seeds.
        against: Compared with the reference method of the same budget; None for itself.
        holm_all: p of the t-test corrected for all comparisons of the experiment.
        wanted: How many seeds there are to be.
        diverged: Seeds whose training diverged.
        failed: Seed or search -> error.
        seconds: Mean of a run's `prepare`, `train`, `evaluate`, and of its `profile`.
        peak_memory_mib: Largest of the seeds'.
        tokens: Trained on in a run.
        steps: Optimizer steps.
        status: `"finished"`, `"running"`, or why there is nothing.
    """

    task: str
    metric: str
    lower_is_better: bool
    rank: int
    label: str
    method: str
    ours: bool
    budget: int | None = None
    parameters: int | None = None
    matched: bool | None = None
    trainable: int | None = None
    learning_rate: float | None = None
    at_edge: bool = False
    rates: dict[str, float | None] = field(default_factory=dict)
    values: dict[str, float] = field(default_factory=dict)
    others: dict[str, dict[str, float]] = field(default_factory=dict)
    summary: Summary | None = None
    curve: list[tuple[int, float]] = field(default_factory=list)
    against: Comparison | None = None
    holm_all: float | None = None
    wanted: int = 0
    diverged: list[int] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    peak_memory_mib: float | None = None
    tokens: int = 0
    steps: int = 0
    status: str = "not started"


@dataclass(frozen=True)
class Results:
    """Everything a page or a table needs.

    Attributes:
        title: Of the experiment.
        reference: Label of the method that the others are compared with.
        rows: All methods at all tasks and budgets, in the experiment's order.
        mean_ranks: Budget rank -> method -> mean rank over tasks and seeds; 1 is best.
        cells: How many there are.
        finished: How many have a record.
        commits: Of the records.
        hardware: Processors and accelerators of the records.
        hours: Spent on all records together: profiles, training, evaluation.
        experiment: The configuration.
    """

    title: str
    reference: str
    rows: list[Row]
    mean_ranks: dict[str, dict[str, float]]
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
    rows = [row for task in config.make_tasks() for row in _task_rows(board, task)]
    rows = _compared(rows, config.reference.method)
    seconds = sum(sum(record.seconds.values()) for record in records)
    return Results(
        title=config.title or Path(config.output).name,
        reference=config.reference.method,
        rows=rows,
        mean_ranks=_mean_ranks(rows),
        cells=board.total(),
        finished=len(records),
        commits=sorted({record.commit or "none" for record in records}),
        hardware=sorted({_machine(record) for record in records}),
        hours=round(seconds / 3600, 3),
        experiment=config.model_dump(mode="json"),
    )


def _task_rows(board: Board, task: TaskSpec) -> list[Row]:
    """Every method at every budget; one that no budget changes stands at each."""
    rows = []
    groups = [group for group in board.groups if group.task.name == task.name]
    for rank in task.budgets:
        for method in board.config.make_methods():
            empty = Row(
                task.name,
                task.task.metric,
                task.task.lower_is_better,
                rank,
                method.label,
                method.name,
                method.contestant.ours,
                wanted=len(board.config.seeds),
            )
            if method.reason is not None:
                rows.append(replace(empty, status=f"not available: {method.reason}", wanted=0))
                continue
            group = next(
                g for g in groups if g.method.label == method.label and g.rank in (rank, None)
            )
            rows.append(_filled(empty, board, group))
    return rows


def _filled(row: Row, board: Board, group: Group) -> Row:
    choice = board.choice(group)
    finals = board.finals(group)
    failed = {
        f"seed {cell.seed}" if cell.phase == "final" else f"search {cell.learning_rate:g}": f.error
        for cell in (*group.search, *finals)
        if (f := board.failure(cell)) is not None
    }
    records = [record for cell in finals if (record := board.record(cell)) is not None]
    row = replace(
        row,
        learning_rate=choice.rate,
        at_edge=choice.at_edge,
        rates={f"{rate:g}": score for rate, score in choice.scores.items()},
        failed=failed,
        status=_status(choice, group, records, failed),
    )
    return _measured(row, records) if records else row


def _status(
    choice: Choice, group: Group, records: Sequence[CellRecord], failed: Mapping[str, str]
) -> str:
    if not choice.final:
        return "choosing the learning rate"
    if choice.rate is None and group.grid:
        return "no learning rate of the grid works"
    if len(records) == len(group.seeds):
        return "finished"
    return "failed" if failed else "running"


def _measured(row: Row, records: Sequence[CellRecord]) -> Row:
    """What the records say of cost and outcome."""
    sizes = [record.size for record in records if record.size is not None]
    values = {str(r.seed): r.value for r in records if r.value is not None}
    names = sorted({name for r in records for name in r.test or {} if name != row.metric})
    others = {
        name: {str(r.seed): r.test[name] for r in records if r.test and name in r.test}
        for name in names
    }
    parts = records[0].seconds.keys()
    peaks = [r.peak_memory_mib for r in records if r.peak_memory_mib is not None]
    return replace(
        row,
        budget=sizes[0].budget if sizes else None,
        parameters=max((size.parameters for size in sizes), default=None),
        matched=all(size.matched for size in sizes) if sizes else None,
        trainable=max(record.trainable_parameters for record in records),
        values=values,
        others=others,
        summary=summarise(list(values.values())) if values else None,
        curve=_curve(row.metric, records),
        diverged=[record.seed for record in records if record.value is None],
        seconds={part: round(fmean(r.seconds[part] for r in records), 3) for part in parts},
        peak_memory_mib=max(peaks, default=None),
        tokens=records[0].tokens,
        steps=records[0].steps,
    )


def _curve(metric: str, records: Sequence[CellRecord]) -> list[tuple[int, float]]:
    """The validation metric at the steps that all records have, over the seeds."""
    curves = [{e.step: e.metrics[metric] for e in record.validation} for record in records]
    shared = set.intersection(*(set(curve) for curve in curves))
    return [(step, fmean(curve[step] for curve in curves)) for step in sorted(shared)]


def _compared(rows: list[Row], reference: str) -> list[Row]:
    """Each row against the reference's at the same task and budget, over the seeds of both."""
    found: dict[tuple[str, int, str], Comparison] = {}
    for task, rank in dict.fromkeys((row.task, row.rank) for row in rows):
        cells = {r.label: r.values for r in rows if (r.task, r.rank) == (task, rank) and r.values}
        if reference not in cells:
            continue
        cells = {name: v for name, v in cells.items() if v.keys() & cells[reference].keys()}
        lower = next(r.lower_is_better for r in rows if r.task == task)
        for comparison in compare_with(reference, cells, lower_is_better=lower):
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


def _refuse_mixed(records: Sequence[CellRecord]) -> None:
    for task in {record.task for record in records}:
        for what in ("data_fingerprint", "model_fingerprint"):
            found = sorted({getattr(r, what) for r in records if r.task == task})
            if len(found) > 1:
                raise ConfigError(
                    f"task {task}: its records were made with different {what.split('_')[0]}s "
                    f"({', '.join(found)}), although the settings are the same; restore what "
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
