"""A comparison of methods over seeds, as `rankwise compare` leaves it in `results.json`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from pydantic import ConfigDict, FiniteFloat, NonNegativeInt

from rankwise.errors import FileError
from rankwise.files import parse_json, read_text

SIGNIFICANT = 0.05
"""Corrected p below which a difference is said to hold."""
# the file holds more than a page shows
_IGNORE = ConfigDict(extra="ignore")


@dataclass(frozen=True)
class SummaryView:
    """Mean over seeds with its 95 % interval, which one value alone does not have."""

    __pydantic_config__: ClassVar[ConfigDict] = _IGNORE

    mean: FiniteFloat
    deviation: FiniteFloat | None
    low: FiniteFloat | None
    high: FiniteFloat | None
    count: NonNegativeInt


@dataclass(frozen=True)
class AgainstView:
    """Paired difference from the reference method, method minus reference.

    Attributes:
        difference: Mean and interval.
        t_p: p of the paired t-test.
        wilcoxon_p: p of Wilcoxon's signed-rank test.
        holm_p: `t_p` corrected by Holm for all comparisons at this task and budget.
        wins: Seeds at which the method is strictly better.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _IGNORE

    difference: SummaryView
    t_p: FiniteFloat | None
    wilcoxon_p: FiniteFloat | None
    holm_p: FiniteFloat | None
    wins: NonNegativeInt


@dataclass(frozen=True)
class ComparisonRow:
    """One method at one task and budget; see `rankwise.experiments.results.Row`."""

    __pydantic_config__: ClassVar[ConfigDict] = _IGNORE

    task: str
    metric: str
    lower_is_better: bool
    rank: NonNegativeInt
    label: str
    method: str
    ours: bool
    status: str
    budget: NonNegativeInt | None = None
    parameters: NonNegativeInt | None = None
    trainable: NonNegativeInt | None = None
    matched: bool | None = None
    learning_rate: FiniteFloat | None = None
    at_edge: bool = False
    values: dict[str, FiniteFloat] = field(default_factory=dict)
    summary: SummaryView | None = None
    against: AgainstView | None = None
    holm_all: FiniteFloat | None = None
    wanted: NonNegativeInt = 0
    diverged: list[NonNegativeInt] = field(default_factory=list)

    @property
    def size(self) -> int | None:
        """Adapter parameters, or what trains where there is no adapter; None for neither."""
        return self.parameters or self.trainable or None


@dataclass(frozen=True)
class ComparisonView:
    """A whole experiment; see `rankwise.experiments.results.Results`."""

    __pydantic_config__: ClassVar[ConfigDict] = _IGNORE

    title: str
    reference: str
    rows: list[ComparisonRow]
    cells: NonNegativeInt
    finished: NonNegativeInt
    commits: list[str]
    hardware: list[str]
    hours: FiniteFloat

    @property
    def tables(self) -> dict[tuple[str, int], list[ComparisonRow]]:
        """The rows of each task and budget rank, in the experiment's order."""
        found: dict[tuple[str, int], list[ComparisonRow]] = {}
        for row in self.rows:
            found.setdefault((row.task, row.rank), []).append(row)
        return found


def load_comparison(path: Path) -> ComparisonView:
    """Read `results.json`.

    Raises:
        FileError: Missing, malformed, of another schema, or without rows.
    """
    what = "comparison"
    found = parse_json(read_text(path, what), ComparisonView, path=path, what=what, version=1)
    if not found.rows:
        raise FileError(f"comparison {path}: holds no row; let rankwise compare run first.")
    return found


def best_first(rows: list[ComparisonRow]) -> list[ComparisonRow]:
    """Rows with a result, the best mean first."""
    known = [(row.summary.mean, row) for row in rows if row.summary is not None]
    sign = -1 if known and not known[0][1].lower_is_better else 1
    return [row for _, row in sorted(known, key=lambda pair: sign * pair[0])]
