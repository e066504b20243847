"""Does a record reproduce: one cell run again, or an experiment against another's records."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from scipy import stats

from rankwise.errors import ConfigError, FileError, nearest
from rankwise.experiments.bench import Bench
from rankwise.experiments.board import Board
from rankwise.experiments.cell_records import FAILED, RECORDS, CellRecord
from rankwise.experiments.compare import choose_device
from rankwise.experiments.running import run_cell
from rankwise.experiments.statistics import CONFIDENCE, Summary, summarise
from rankwise.tables import make_table, render


@dataclass(frozen=True)
class Check:
    """A cell that was run again.

    Attributes:
        name: Of the cell.
        metric: What is compared.
        recorded: The value of the record; None where the run diverged.
        found: The value now; likewise.
        exact: Whether every metric that both measured and every training loss is the same to the
            last bit.
        interval: Where a further run of this method, task and budget lies in 95 of 100 cases, from
            the spread of the recorded seeds, its own among them; None where fewer than two are.
    """

    name: str
    metric: str
    recorded: float | None
    found: float | None
    exact: bool
    interval: tuple[float, float] | None

    @property
    def reproduced(self) -> bool:
        """Exactly, or within the interval."""
        if self.exact or None in (self.interval, self.found, self.recorded):
            return self.exact
        assert self.interval is not None and self.found is not None
        return self.interval[0] <= self.found <= self.interval[1]

    def __str__(self) -> str:
        values = f"{self.metric} {_value(self.found)}, recorded {_value(self.recorded)}"
        if self.exact:
            return f"{self.name}: reproduced exactly: {values}"
        if self.interval is None:
            return f"{self.name}: not exactly the same, and too few seeds for an interval: {values}"
        low, high = self.interval
        verdict = "reproduced within" if self.reproduced else "NOT reproduced: outside"
        return f"{self.name}: {verdict} the interval {low:.6g} to {high:.6g}: {values}"


def check_cell(board: Board, name: str) -> Check:
    """Run a finished cell again, its profile too, and compare.

    On a CPU with as many threads as the record's, which the last bits depend on.

    Args:
        board: The experiment.
        name: Of the cell, with or without its hash.

    Raises:
        ConfigError: There is no such cell, it has no record, or its data or model changed.
    """
    cell = board.find(name)
    if cell is None:
        raise ConfigError(
            f"--check {name!r}: no such cell; {nearest(name, (c.name for c in board.cells()))}"
        )
    recorded = board.record(cell)
    if recorded is None:
        raise ConfigError(f"--check {name!r}: it has no record yet; run the experiment first.")
    with tempfile.TemporaryDirectory(prefix="rankwise-") as scratch, _threads_of(recorded):
        bench = Bench(Path(scratch), choose_device(board.config.device))
        for changed in bench.changed_since([recorded], cell.task):
            raise ConfigError(
                f"--check {name!r}: the task's {changed} changed since its record was made."
            )
        found = run_cell(cell, bench)
    group = next(g for g in board.groups if cell in (*board.search(g), *board.finals(g)))
    values = [
        record.value
        for other in board.finals(group)
        if (record := board.record(other)) is not None and record.value is not None
    ]
    interval = prediction_interval(values) if cell.phase == "final" else None
    same = have_same_outcome(found, recorded)
    return Check(cell.name, found.metric, recorded.value, found.value, same, interval)


@contextmanager
def _threads_of(record: CellRecord) -> Iterator[None]:
    """As many threads as the record's run had."""
    now = torch.get_num_threads()
    torch.set_num_threads(int(record.hardware.get("torch_threads", now)))
    try:
        yield
    finally:
        torch.set_num_threads(now)


def have_same_outcome(a: CellRecord, b: CellRecord) -> bool:
    """Whether two runs' losses, ranks and metrics are the same to the last bit.

    Metrics that only one of them measured, as the version before or after did, are left out.
    """
    plain = (a.train_loss, a.diverged_at, a.ranks) == (b.train_loss, b.diverged_at, b.ranks)
    steps = [e.step for e in a.validation] == [e.step for e in b.validation]
    if not plain or not steps or (a.test is None) != (b.test is None):
        return False
    metrics = [(x.metrics, y.metrics) for x, y in zip(a.validation, b.validation, strict=True)]
    metrics.append((a.test or {}, b.test or {}))
    return all(x[name] == y[name] for x, y in metrics for name in x.keys() & y.keys())


def prediction_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Where one further value of a normal sample lies in 95 of 100 cases.

    `mean +- t_{n-1} s sqrt(1 + 1/n)`; None for fewer than two values.
    """
    if len(values) < 2:
        return None
    n = len(values)
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)) * float(np.std(values, ddof=1))
    half *= math.sqrt(1 + 1 / n)
    return fmean(values) - half, fmean(values) + half


@dataclass(frozen=True)
class Counterpart:
    """A method at a task and budget, here and in another experiment's records.

    Attributes:
        task: Name of the task.
        label: Of the method.
        rank: Budget; None where none applies.
        pairs: Cells with the same name and settings in both.
        exact: Those whose metrics and losses are the same to the last bit, as `Check.exact`.
        difference: Of the metric, here minus there; None where a value is missing.
        time: Training seconds here over those there.
    """

    task: str
    label: str
    rank: int | None
    pairs: int
    exact: int
    difference: Summary | None
    time: float


def compare_records(board: Board, other: Path) -> tuple[list[Counterpart], list[str]]:
    """This experiment's compared runs against those of another output folder.

    Args:
        board: This experiment.
        other: The other's output folder, or its folder of records.

    Returns:
        The methods with cells in common, and the names of cells that have other settings there.

    Raises:
        FileError: There are no records, or one is damaged.
    """
    theirs = read_records(other)
    pairs: dict[tuple[str, str, int | None], list[tuple[CellRecord, CellRecord]]] = {}
    other_settings: list[str] = []
    names = {record.name for record in theirs.values()}
    for record in board.records():
        if record.phase != "final":
            continue
        match = theirs.get((record.name, record.config_hash))
        if match is not None:
            key = record.task, record.label, record.budget_rank
            pairs.setdefault(key, []).append((record, match))
        elif record.name in names:
            other_settings.append(record.name)
    return [_counterpart(*key, found) for key, found in pairs.items()], other_settings


def read_records(folder: Path) -> dict[tuple[str, str], CellRecord]:
    """All records of an experiment by name and hash of their settings.

    Raises:
        FileError: There is none, or one is damaged.
    """
    place = folder / RECORDS if (folder / RECORDS).is_dir() else folder
    files = [path for path in sorted(place.glob("*.json")) if not path.name.endswith(FAILED)]
    if not files:
        raise FileError(f"{folder}: holds no records; name an experiment's output or workspace.")
    records = [CellRecord.load(path) for path in files]
    return {(record.name, record.config_hash): record for record in records}


def against_table(found: Sequence[Counterpart], other_settings: Sequence[str]) -> str:
    """The counterparts as a table."""
    columns = ("task", "method", "r", "cells", "same to the bit", "difference", "95 %", "time")
    rows = [
        (
            c.task,
            c.label,
            "" if c.rank is None else str(c.rank),
            str(c.pairs),
            str(c.exact),
            "" if c.difference is None else f"{c.difference.mean:+.6f}",
            _interval(c.difference),
            f"{c.time:.2f} x",
        )
        for c in found
    ]
    lines = [render(make_table(columns, rows, title="here against there"))] if rows else []
    if not rows:
        lines.append("no cell is in both with the same settings")
    if other_settings:
        lines.append(f"other settings there: {', '.join(sorted(other_settings))}")
    return "\n".join(lines)


def _counterpart(
    task: str, label: str, rank: int | None, pairs: Sequence[tuple[CellRecord, CellRecord]]
) -> Counterpart:
    values = [(a.value, b.value) for a, b in pairs]
    differences = [x - y for x, y in values if x is not None and y is not None]
    there = fmean(b.seconds["train"] for _, b in pairs)
    return Counterpart(
        task,
        label,
        rank,
        len(pairs),
        sum(have_same_outcome(a, b) for a, b in pairs),
        summarise(differences) if differences else None,
        fmean(a.seconds["train"] for a, _ in pairs) / there if there else math.nan,
    )


def _interval(difference: Summary | None) -> str:
    if difference is None or math.isnan(difference.low):
        return ""
    return f"{difference.low:+.6f} to {difference.high:+.6f}"


def _value(value: float | None) -> str:
    return "diverged" if value is None else f"{value:.6g}"
