"""The results of a comparison as text: for the terminal, and as Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from rankwise.artifacts import RESULTS_FILE
from rankwise.experiments.results import TABLE_FILE, Pooled, Results
from rankwise.experiments.rows import Row
from rankwise.experiments.statistics import Comparison, Summary
from rankwise.experiments.trade import describe
from rankwise.files import write_text
from rankwise.report.views import Spread
from rankwise.tables import make_table, markdown_table, render

COLUMNS = (
    "method",
    "lr",
    "parameters",
    "mean",
    "sd",
    "95 % interval",
    "against {reference}",
    "95 % interval of it",
    "p (t)",
    "p (Wilcoxon)",
    "p (Holm)",
    "train s",
    "profile s",
    "peak MiB",
    "seeds",
)
READING = (
    "`lr` was chosen on the validation part, of the same grid for every method; `!` marks one at "
    "the edge of the grid. `parameters` are those of the adapters; `†` marks a method that cannot "
    "be brought within 2 % of the budget. The difference is paired over seeds, method minus "
    "reference. `p (Holm)` corrects the t-test for all comparisons of one table. With few seeds "
    "Wilcoxon's p cannot be small: with five, 0.0625 at least."
)


def terminal_table(results: Results) -> str:
    """All tables as plain text."""
    parts = []
    for task, rank in _tables(results):
        rows = _rows_of(results, task, rank)
        columns = [column.format(reference=results.reference) for column in COLUMNS]
        table = make_table(columns, [_cells(row) for row in rows], title=_title(rows))
        parts += [render(table) if _has_results(rows) else _title(rows)]
        parts += [*(f"  {line}" for line in _remarks(rows)), ""]
    parts += [line.lstrip("#- ") for line in _trade_section(results) if line]
    return "\n".join([*parts, _foot(results)])


def markdown(results: Results) -> str:
    """The page `results.md`."""
    lines = [f"# {results.title}", "", _foot(results), "", READING]
    for task, rank in _tables(results):
        rows = _rows_of(results, task, rank)
        columns = [column.format(reference=results.reference) for column in COLUMNS]
        lines += ["", f"## {_title(rows)}"]
        if _has_results(rows):
            lines += ["", markdown_table(columns, map(_cells, rows))]
        lines += ["", *(f"- {line}" for line in _remarks(rows))]
    lines += (
        _pooled_section(results)
        + _rank_section(results)
        + _trade_section(results)
        + _seed_section(results)
        + _plan_section(results)
        + _rate_section(results)
    )
    return "\n".join(lines).rstrip() + "\n"


def save_results(results: Results, folder: Path) -> tuple[Path, Path]:
    """Write `results.md` and `results.json`; returns both paths.

    Raises:
        FileError: They cannot be written.
    """
    write_text(folder / TABLE_FILE, markdown(results))
    results.save(folder)
    return folder / TABLE_FILE, folder / RESULTS_FILE


def _tables(results: Results) -> list[tuple[str, int]]:
    return list(dict.fromkeys((row.task, row.rank) for row in results.rows))


def _has_results(rows: Sequence[Row]) -> bool:
    return any(row.values or row.diverged for row in rows)


def _rows_of(results: Results, task: str, rank: int) -> list[Row]:
    return [row for row in results.rows if (row.task, row.rank) == (task, rank)]


def _title(rows: Sequence[Row]) -> str:
    first = rows[0]
    budget = next((row.budget for row in rows if row.budget is not None), None)
    cost = "" if budget is None else f", {budget:,} parameters"
    better = "lower" if first.lower_is_better else "higher"
    return (
        f"{first.task}: {first.metric} ({better} is better), budget of LoRA r = {first.rank}{cost}"
    )


def _cells(row: Row) -> list[str]:
    rate = "" if row.learning_rate is None else f"{row.learning_rate:g}"
    size = "" if row.parameters is None else f"{row.parameters:,}"
    if row.parameters is None and row.trainable:
        size = f"{row.trainable:,}"
    return [
        row.label,
        rate + ("!" if row.at_edge else ""),
        size + ("†" if row.matched is False else ""),
        *_summary_cells(row.summary),
        *_comparison_cells(row.against),
        _seconds(row.seconds.get("train")),
        _seconds(row.seconds.get("profile")),
        "" if row.peak_memory_mib is None else f"{row.peak_memory_mib:,.0f}",
        f"{len(row.values)}/{row.wanted}" if row.wanted else "",
    ]


def _summary_cells(summary: Summary | None) -> list[str]:
    if summary is None:
        return ["", "", ""]
    return [f"{summary.mean:.4f}", _number(summary.deviation), _interval(summary)]


def _comparison_cells(comparison: Comparison | None) -> list[str]:
    if comparison is None:
        return [""] * 5
    difference = comparison.difference
    return [
        f"{difference.mean:+.4f}",
        _interval(difference, sign="+"),
        _p(comparison.t_p),
        _p(comparison.wilcoxon_p),
        _p(comparison.holm_p),
    ]


def _remarks(rows: Sequence[Row]) -> list[str]:
    """What the columns have no room for."""
    states: dict[str, list[str]] = {}
    for row in rows:
        if row.status != "finished":
            states.setdefault(row.status, []).append(row.label)
    remarks = [f"{', '.join(labels)}: {status}" for status, labels in states.items()]
    for row in rows:
        if row.diverged:
            seeds = ", ".join(map(str, row.diverged))
            remarks.append(f"{row.label}: diverged at seed {seeds}, which the mean leaves out")
        if row.matched is False and row.off:
            low, high = (f"{part:+.1%}" for part in row.off)
            off = low if low == high else f"{low} to {high}"
            remarks.append(f"{row.label}: not matched, {off} of the budget")
        remarks += [f"{row.label}: {where} failed: {why}" for where, why in row.failed.items()]
    return remarks


def _foot(results: Results) -> str:
    return (
        f"{results.finished} of {results.cells} cells finished, {results.hours:.1f} hours of "
        f"computing; commit {', '.join(results.commits) or 'none'}; "
        f"{', '.join(results.hardware) or 'no machine yet'}."
    )


def _pooled_section(results: Results) -> list[str]:
    lines: list[str] = []
    for rank, metric in dict.fromkeys((p.rank, p.metric) for p in results.pooled):
        found = [p for p in results.pooled if (p.rank, p.metric) == (rank, metric)]
        tasks = ", ".join(found[0].tasks)
        columns = ["method", f"against {results.reference}", "95 % interval", *COLUMNS[8:11]]
        table = [[p.against.method, *_comparison_cells(p.against)] for p in found]
        lines += ["", f"## {metric} over {tasks}, paired by task and seed, r = {rank}", ""]
        lines.append(markdown_table([*columns, "won"], _with_wins(table, found)))
    return lines


def _with_wins(table: list[list[str]], found: Sequence[Pooled]) -> list[list[str]]:
    wins = [f"{p.against.wins} of {p.against.difference.count}" for p in found]
    return [[*row, won] for row, won in zip(table, wins, strict=True)]


def _rank_section(results: Results) -> list[str]:
    lines: list[str] = []
    for rank, methods in results.mean_ranks.items():
        ordered = sorted(methods.items(), key=lambda item: item[1])
        lines += ["", f"## Mean rank over tasks and seeds, budget of LoRA r = {rank}", ""]
        lines.append(markdown_table(["method", "rank"], [(m, f"{v:.2f}") for m, v in ordered]))
    return lines


def _trade_section(results: Results) -> list[str]:
    """The one number: parameters for the reference's result."""
    lines: list[str] = []
    for task in dict.fromkeys(found.task for found in results.trades):
        trades = [found for found in results.trades if found.task == task]
        first = trades[0]
        lines += [
            "",
            f"## {task}: parameters for the result of {first.reference} at "
            f"r = {first.reference_rank} ({first.target:.4f} with {first.reference_parameters:,})",
            "",
            *(f"- {describe(found)}" for found in trades),
        ]
    return lines


def _rate_section(results: Results) -> list[str]:
    """Appendix: the validation metric at every learning rate of the grid, each search once."""
    lines: list[str] = []
    searched = [row for row in results.rows if _is_searched(row)]
    for search in dict.fromkeys(row.searched_at for row in searched):
        sharing = [row for row in searched if row.searched_at == search]
        rows = {row.label: row for row in sharing}.values()
        rates = sorted({rate for row in rows for rate in row.rates}, key=float)
        table = [[row.label, *(_score(row, rate) for rate in rates)] for row in rows]
        by = {row.search_metric for row in sharing if row.search_metric != row.metric}
        chosen_by = f", by {', '.join(sorted(by))}" if by else ""
        lines += ["", f"## Learning rates on the validation part: {search}{chosen_by}", ""]
        lines.append(markdown_table(["method", *rates], table))
        served: dict[str, list[str]] = {}
        for row in sharing:
            served.setdefault(f"{row.task}, r = {row.rank}", []).append(row.label)
        others = [
            name if len(labels) == len(rows) else f"{name} ({', '.join(labels)})"
            for name, labels in served.items()
            if name != search
        ]
        if others:
            lines += ["", f"The same rates serve {'; '.join(others)}."]
    return lines


def _seed_section(results: Results) -> list[str]:
    """Appendix: the metric seed by seed, since one failed run can make a mean and its interval."""
    lines: list[str] = []
    for task, rank in _tables(results):
        rows = [row for row in _rows_of(results, task, rank) if row.values]
        seeds = sorted({seed for row in rows for seed in row.values}, key=int)
        if len(seeds) < 2:
            continue
        worst = max if rows[0].lower_is_better else min
        table = [
            [
                row.label,
                *(f"{of(row.values.values()):.4f}" for of in (median, worst)),
                *(f"{row.values[seed]:.4f}" if seed in row.values else "–" for seed in seeds),
            ]
            for row in rows
        ]
        lines += ["", f"## Seed by seed: {task}, r = {rank}", ""]
        lines.append(markdown_table(["method", "median", "worst", *seeds], table))
    return lines


def _plan_section(results: Results) -> list[str]:
    """Appendix: ranks and blocks over modules and seeds, of the methods whose modules differ."""
    lines: list[str] = []
    for task, rank in _tables(results):
        planned = [
            [row.label, _spread(row.ranks), "" if row.blocks is None else _spread(row.blocks)]
            for row in _rows_of(results, task, rank)
            if row.ranks and (row.blocks or row.ranks.min < row.ranks.max)
        ]
        if planned:
            lines += ["", f"## Ranks and blocks over the modules: {task}, r = {rank}", ""]
            lines.append(markdown_table(["method", "ranks, mean (range)", "blocks"], planned))
    return lines


def _spread(spread: Spread) -> str:
    if spread.min == spread.max:
        return str(spread.min)
    return f"{spread.mean:.1f} ({spread.min} to {spread.max})"


def _is_searched(row: Row) -> bool:
    return any(score is not None and not math.isnan(score) for score in row.rates.values())


def _score(row: Row, rate: str) -> str:
    score = row.rates.get(rate)
    if score is None or math.isnan(score):
        return "–"
    chosen = row.learning_rate is not None and f"{row.learning_rate:g}" == rate
    return f"**{score:.4f}**" if chosen else f"{score:.4f}"


def _interval(summary: Summary, sign: str = "") -> str:
    if math.isnan(summary.low):
        return ""
    return f"{summary.low:{sign}.4f} to {summary.high:{sign}.4f}"


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.4f}"


def _p(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.2g}"


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}"
