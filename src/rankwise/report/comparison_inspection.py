"""What `rankwise inspect` says of a comparison."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from pydantic import ConfigDict, NonNegativeInt

from rankwise.files import parse_json, read_text
from rankwise.report.comparison_view import ComparisonView, load_comparison
from rankwise.report.comparison_words import extent
from rankwise.report.summary import comparison_texts
from rankwise.report.words import joined, whole

# the file holds more than is asked of it here
_IGNORE = ConfigDict(extra="ignore")


@dataclass(frozen=True)
class _FailedRow:
    """The errors of one method at one task and budget, by seed or search."""

    __pydantic_config__: ClassVar[ConfigDict] = _IGNORE

    task: str
    rank: NonNegativeInt
    label: str
    failed: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Settings:
    __pydantic_config__: ClassVar[ConfigDict] = _IGNORE

    seeds: list[NonNegativeInt] = field(default_factory=list)


@dataclass(frozen=True)
class _Beside:
    """What `results.json` holds and a report does not show."""

    __pydantic_config__: ClassVar[ConfigDict] = _IGNORE

    rows: list[_FailedRow]
    experiment: _Settings


def describe_comparison(path: Path) -> str:
    """Tasks, methods, budgets, seeds, how much is done, the results, and what failed.

    Args:
        path: A `results.json`.

    Raises:
        FileError: It is missing, malformed, of another schema, or without rows.
    """
    comparison, what = load_comparison(path), "comparison"
    beside = parse_json(read_text(path, what), _Beside, path=path, what=what)
    seeds = ", ".join(map(str, beside.experiment.seeds)) or "not recorded"
    head = [
        f"comparison: {comparison.title}",
        *_tasks(comparison),
        f"methods: {', '.join(_methods(comparison))}",
        f"seeds: {seeds}",
        extent(comparison),
        f"commits: {', '.join(comparison.commits) or 'none yet'}",
    ]
    return "\n\n".join(["\n".join(head), *comparison_texts(comparison), *_failures(beside.rows)])


def _tasks(comparison: ComparisonView) -> list[str]:
    """A line a task: its metric and its budgets."""
    lines = []
    for task in dict.fromkeys(task for task, _ in comparison.tables):
        budgets = []
        for (name, rank), rows in comparison.tables.items():
            if name == task:
                cost = next((row.budget for row in rows if row.budget is not None), None)
                known = "" if cost is None else f" ({whole(cost)} parameters)"
                budgets.append(f"r = {rank}{known}")
        first = next(row for row in comparison.rows if row.task == task)
        better = "lower" if first.lower_is_better else "higher"
        lines.append(
            f"task {task}: {first.metric}, {better} is better; budgets of LoRA {joined(budgets)}"
        )
    return lines


def _methods(comparison: ComparisonView) -> list[str]:
    reference = comparison.reference
    labels = dict.fromkeys(row.label for row in comparison.rows)
    return [f"{label} (reference)" if label == reference else label for label in labels]


def _failures(rows: list[_FailedRow]) -> list[str]:
    """A line a failure; one that stands at several budgets is said once."""
    ranks: dict[tuple[str, str, str, str], list[str]] = {}
    for row in rows:
        for where, error in row.failed.items():
            key = row.task, row.label, where, " ".join(error.split())
            ranks.setdefault(key, []).append(str(row.rank))
    lines = [
        f"  {task}, r = {joined(at)}, {label}, {where}: {error}"
        for (task, label, where, error), at in ranks.items()
    ]
    return ["\n".join(["failed:", *lines])] if lines else []
