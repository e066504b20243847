"""Timing two things against each other in one process, and writing down what came out."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from rankwise.provenance import git_commit, hardware, versions
from rankwise.tables import make_table, render

RESULTS = Path(__file__).parent / "results.json"


@dataclass(frozen=True)
class Row:
    """One measured figure; `holds` is None where no target is set."""

    name: str
    value: float
    unit: str
    target: str | None = None
    holds: bool | None = None


def at_most(name: str, value: float, limit: float, unit: str) -> Row:
    """A figure with a target that it may not exceed."""
    return Row(name, value, unit, f"<= {limit:g}", value <= limit)


def interleaved(runs: int, **candidates: Callable[[], object]) -> dict[str, float]:
    """Median seconds of each candidate, taken in turn so that a drift of the machine hits all."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for candidate in candidates.values():
        candidate()
    for _ in range(runs):
        for name, candidate in candidates.items():
            started = time.perf_counter()
            candidate()
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def write(rows: list[Row], command: str) -> None:
    """Put the rows into `benchmarks/results.json`.

    Rows of other names stay as they were measured last, with their own commit and date.
    """
    facts = {
        "command": command,
        "machine": hardware(),
        "versions": versions(),
        "commit": git_commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    new = {row.name: asdict(row) | facts for row in rows}
    if len(new) < len(rows):
        raise ValueError("two rows have one name, of which only the last would be kept")
    old = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    kept = [entry for entry in old if entry["name"] not in new]
    RESULTS.write_text(json.dumps([*kept, *new.values()], indent=2) + "\n")


def table(rows: list[Row]) -> str:
    """The rows as text."""
    answers = {None: "", True: "yes", False: "NO"}
    cells = [
        (row.name, f"{row.value:.3g}", row.unit, row.target or "", answers[row.holds])
        for row in rows
    ]
    return render(make_table(["figure", "value", "unit", "target", "holds"], cells))
