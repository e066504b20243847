"""Which cells of an experiment are done, which are to do, and which learning rates were chosen."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from rankwise.errors import ConfigError
from rankwise.experiments.cell_records import FAILED, RECORDS, CellRecord, FailureRecord
from rankwise.experiments.cells import Cell, Group, make_groups
from rankwise.experiments.config import ExperimentConfig


@dataclass(frozen=True)
class Choice:
    """The learning rate of a group.

    Attributes:
        rate: Chosen, or fixed; None where nothing is trained, or nothing could be chosen.
        final: Whether it is known; False while the search is not over.
        at_edge: Whether the best one is the smallest or the largest of the grid, so that a better
            one may lie beyond.
        scores: Learning rate -> mean validation metric over the search's seeds; NaN where a run
            diverged or failed.
    """

    rate: float | None
    final: bool
    at_edge: bool
    scores: dict[float, float]


class Board:
    """The state of an experiment, as far as its records tell.

    Args:
        config: The experiment.
        since: Time stamp of files, in nanoseconds; failures before it are of an earlier call, and
            are tried again.
    """

    def __init__(self, config: ExperimentConfig, since: int = 0) -> None:
        self.config = config
        self.since = since
        self.folder = config.runs_folder / RECORDS
        self.groups = make_groups(config)
        self._records: dict[str, CellRecord] = {}
        self._finals: dict[tuple[int, float | None], list[Cell]] = {}

    def path(self, cell: Cell) -> Path:
        """Where the cell's record is or will be."""
        return self.folder / cell.file_name

    def failure_path(self, cell: Cell) -> Path:
        """Where it says why the cell failed, if it did."""
        return self.folder / (cell.file_name.removesuffix(".json") + FAILED)

    def record(self, cell: Cell) -> CellRecord | None:
        """The cell's record, if it is finished.

        Raises:
            FileError: The record is damaged.
        """
        name = cell.file_name
        if name not in self._records and self.path(cell).is_file():
            self._records[name] = CellRecord.load(self.path(cell))
        return self._records.get(name)

    def failure(self, cell: Cell) -> FailureRecord | None:
        """Why the cell failed, if it did and is not finished."""
        return FailureRecord.load(self.failure_path(cell)) if self.has_failed(cell) else None

    def has_failed(self, cell: Cell) -> bool:
        """Whether the cell failed in this call."""
        try:
            return self.failure_path(cell).stat().st_mtime_ns >= self.since
        except FileNotFoundError:  # also where another command removes it just now
            return False

    def rates(self, group: Group) -> list[float]:
        """The learning rates of the search, ascending: the grid, and what was needed around it.

        While the best is at an edge, the next one on that side follows, in the ratio of the two
        outermost; `selection.extend` of them at most. Then, `selection.refine` times, come the
        geometric means of the best and its neighbours.
        """
        rates = group.grid
        if len(rates) < 2:
            return rates
        for _ in range(group.search_extend):
            best = self._best(group, rates)
            if best == rates[0]:
                rates = [_beyond(rates[1], best), *rates]
            elif best == rates[-1]:
                rates = [*rates, _beyond(rates[-2], best)]
            else:
                break
        for _ in range(group.search_refine):
            best = self._best(group, rates)
            if best is None:
                break
            around = rates[max(rates.index(best) - 1, 0) : rates.index(best) + 2]
            rates = sorted({*rates, *map(_between, around, around[1:])})
        return rates

    def _best(self, group: Group, rates: list[float]) -> float | None:
        """The best of these rates; none before all of them were tried, or where none works."""
        scores, complete = self._scores(group, rates)
        return _best(group, scores) if complete else None

    def search(self, group: Group) -> list[Cell]:
        """The cells that choose the group's learning rate, as far as they are known."""
        return group.search_at(self.rates(group))

    def choice(self, group: Group) -> Choice:
        """The group's learning rate, on the mean validation metric of the search.

        A rate at which any run diverged or failed is not chosen. Of equals, the smaller one.
        """
        rates = self.rates(group)
        if len(rates) < 2:
            return Choice(rates[0] if rates else None, True, False, {})
        scores, complete = self._scores(group, rates)
        best = _best(group, scores) if complete else None
        return Choice(best, complete, best in (rates[0], rates[-1]), scores)

    def _scores(self, group: Group, rates: list[float]) -> tuple[dict[float, float], bool]:
        """`Choice.scores` of these rates, as far as they are known, and whether all are."""
        found: dict[float, list[float]] = {rate: [] for rate in rates}
        complete = True
        for cell in group.search_at(rates):
            assert cell.learning_rate is not None
            record = self.record(cell)
            if record is not None:
                found[cell.learning_rate].append(_searched(record, cell.task.search_metric))
            elif self.failure(cell) is not None:
                found[cell.learning_rate].append(math.nan)
            else:
                complete = False
        means = {rate: fmean(values) if values else math.nan for rate, values in found.items()}
        return means, complete

    def is_hopeless(self, group: Group) -> bool:
        """Whether the search is over and no learning rate of the grid works."""
        choice = self.choice(group)
        return choice.final and choice.rate is None and bool(group.grid)

    def finals(self, group: Group) -> list[Cell]:
        """The cells that are compared, if the learning rate is known."""
        choice = self.choice(group)
        if not choice.final or self.is_hopeless(group):
            return []
        key = id(group), choice.rate
        if key not in self._finals:
            self._finals[key] = group.final(choice.rate)
        return self._finals[key]

    def cells(self) -> Iterator[Cell]:
        """Every cell that can be named by now, in the order in which they are run.

        Task by task: the searches seed by seed, which have a base model in common, and then the
        compared runs seed by seed, so that what is there at any time is a fair comparison. Searches
        that groups have in common stand where the first of them needs them.
        """
        seen: set[str] = set()
        for cell in self._in_order():
            if cell.file_name not in seen:
                seen.add(cell.file_name)
                yield cell

    def _in_order(self) -> Iterator[Cell]:
        tasks = list(dict.fromkeys(group.task.name for group in self.groups))
        for task in tasks:
            groups = [group for group in self.groups if group.task.name == task]
            searches = [cell for group in groups for cell in self.search(group)]
            yield from sorted(searches, key=lambda cell: cell.seed)
            finals = [self.finals(group) for group in groups]
            for place in range(len(self.config.seeds)):
                yield from (cells[place] for cells in finals if cells)

    def total(self) -> int:
        """How many cells there are, those whose learning rate is not known yet included."""
        compared = sum(len(g.seeds) for g in self.groups if not self.is_hopeless(g))
        searches = {cell.file_name for group in self.groups for cell in self.search(group)}
        return len(searches) + compared

    def records(self) -> list[CellRecord]:
        """The finished cells."""
        return [record for cell in self.cells() if (record := self.record(cell)) is not None]

    def find(self, name: str) -> Cell | None:
        """The cell of a name, with or without its hash."""
        for cell in self.cells():
            if name in (cell.name, cell.file_name, cell.file_name.removesuffix(".json")):
                return cell
        return None


def _searched(record: CellRecord, metric: str) -> float:
    """The metric at the end of a search's run, whatever metric it was run for; NaN if it diverged.

    Raises:
        ConfigError: The run did not measure it.
    """
    if record.diverged_at is not None:
        return math.nan
    found = record.validation[-1].metrics
    if metric not in found:
        raise ConfigError(
            f"selection.metric={metric!r}: {record.name} measured {', '.join(found)} on the "
            "validation part."
        )
    return found[metric]


def _best(group: Group, scores: dict[float, float]) -> float | None:
    """The rate with the best finite score; of equals, the smaller one."""
    sign = 1.0 if group.search_task.search_lower_is_better else -1.0
    usable = [rate for rate, score in scores.items() if math.isfinite(score)]
    return min(usable, key=lambda rate: (sign * scores[rate], rate), default=None)


def _beyond(inner: float, edge: float) -> float:
    """The next of a geometric sequence, to three digits."""
    return float(f"{edge * edge / inner:.3g}")


def _between(low: float, high: float) -> float:
    """The geometric mean, to three digits."""
    return float(f"{math.sqrt(low * high):.3g}")
