"""One row of a comparison: a method at a task and a budget, from its records."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from statistics import fmean

from rankwise.experiments.board import Board, Choice
from rankwise.experiments.cell_records import CellRecord
from rankwise.experiments.cells import Group
from rankwise.experiments.config import TaskSpec
from rankwise.experiments.statistics import Comparison, Summary, summarise
from rankwise.report.views import Spread


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
        off: Least and largest part of the budget by which a seed misses it; None likewise.
        trainable: What the optimizer updates, heads not counted.
        ranks: Over all modules that a method adapts and all seeds, 0 where this one leaves one out;
            or of whatever unit the method's size has.
        blocks: Likewise, where a profile decided them.
        learning_rate: Chosen or fixed; None while the search goes on, or where nothing is trained.
        at_edge: Whether the chosen rate is the grid's smallest or largest.
        searched_at: Task and budget of the search, which several tasks and budgets may share.
        rates: Learning rate -> mean validation metric of the search; None where a run diverged.
        values: Seed -> metric on the test part.
        others: Name of another metric -> seed -> value.
        summary: Of `values`; None without any.
        search_metric: What the learning rate was chosen by on the validation part.
        curve: Steps, and the mean of that metric over the seeds.
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
    search_metric: str = ""
    budget: int | None = None
    parameters: int | None = None
    matched: bool | None = None
    off: tuple[float, float] | None = None
    trainable: int | None = None
    ranks: Spread | None = None
    blocks: Spread | None = None
    learning_rate: float | None = None
    at_edge: bool = False
    searched_at: str = ""
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


def task_rows(board: Board, task: TaskSpec) -> list[Row]:
    """Every method at every budget; one that no budget changes stands at each."""
    rows = []
    modules: dict[int | None, set[str]] = {}
    for record in board.records():
        if record.task == task.name:
            modules.setdefault(record.budget_rank, set()).update(record.ranks)
    groups = [group for group in board.groups if group.task.name == task.name]
    for rank in task.budgets:
        for method in board.config.methods_of(task):
            empty = Row(
                task.name,
                task.task.metric,
                task.task.lower_is_better,
                rank,
                method.label,
                method.name,
                method.contestant.ours,
                task.search_metric,
                wanted=len(board.config.seeds),
            )
            if method.reason is not None:
                rows.append(replace(empty, status=f"not available: {method.reason}", wanted=0))
                continue
            group = next(
                g for g in groups if g.method.label == method.label and g.rank in (rank, None)
            )
            rows.append(_filled(empty, board, group, modules.get(rank, set())))
    return rows


def _filled(row: Row, board: Board, group: Group, modules: Set[str]) -> Row:
    choice = board.choice(group)
    finals = board.finals(group)
    failed = {
        f"seed {cell.seed}" if cell.phase == "final" else f"search {cell.learning_rate:g}": f.error
        for cell in (*board.search(group), *finals)
        if (f := board.failure(cell)) is not None
    }
    records = [record for cell in finals if (record := board.record(cell)) is not None]
    row = replace(
        row,
        learning_rate=choice.rate,
        at_edge=choice.at_edge,
        searched_at=_searched_at(group),
        rates={f"{rate:g}": score for rate, score in choice.scores.items()},
        failed=failed,
        status=_status(choice, group, records, failed),
    )
    return _measured(row, records, modules) if records else row


def _searched_at(group: Group) -> str:
    """Of a method that no budget changes, the first budget."""
    task = group.search_task
    rank = group.search_rank or task.selection.budget or task.budgets[0]
    return f"{task.name}, r = {rank}"


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


def _measured(row: Row, records: Sequence[CellRecord], modules: Set[str]) -> Row:
    """What the records say of cost and outcome; `modules` are all that a method adapts."""
    sizes = [record.size for record in records if record.size is not None]
    off = [size.parameters / size.budget - 1 for size in sizes]
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
        off=(min(off), max(off)) if off else None,
        trainable=max(record.trainable_parameters for record in records),
        ranks=_over_modules(_with_empty(record.ranks, modules) for record in records),
        blocks=_over_modules(record.blocks for record in records),
        values=values,
        others=others,
        summary=summarise(list(values.values())) if values else None,
        curve=_curve(row.search_metric, records),
        diverged=[record.seed for record in records if record.diverged_at is not None],
        seconds={part: round(fmean(r.seconds[part] for r in records), 3) for part in parts},
        peak_memory_mib=max(peaks, default=None),
        tokens=records[0].tokens,
        steps=records[0].steps,
    )


def _with_empty(ranks: Mapping[str, int], modules: Set[str]) -> Mapping[str, int]:
    """The ranks with the modules that the method left out, which a record does not name, at 0."""
    return dict.fromkeys(modules, 0) | dict(ranks) if ranks else ranks


def _over_modules(found: Iterable[Mapping[str, int]]) -> Spread | None:
    """Of module -> number, once a seed."""
    values = [value for modules in found for value in modules.values()]
    return Spread.of(values) if values else None


def _curve(metric: str, records: Sequence[CellRecord]) -> list[tuple[int, float]]:
    """The validation metric at the steps that all records have, over the seeds."""
    curves = [{e.step: e.metrics[metric] for e in record.validation} for record in records]
    shared = set.intersection(*(set(curve) for curve in curves))
    return [(step, fmean(curve[step] for curve in curves)) for step in sorted(shared)]
