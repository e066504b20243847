"""Comparisons in words and short forms, which the page, the card and the terminal share."""

from __future__ import annotations

from collections.abc import Sequence

from rankwise.report.comparison_view import (
    SIGNIFICANT,
    ComparisonRow,
    ComparisonView,
    SummaryView,
    best_first,
)
from rankwise.report.views import Report
from rankwise.report.words import joined, loss, short, whole

COLUMNS = ("method", "parameters", "mean", "95 % interval", "p (Holm)")
"""Of the short table; `short_cells` fills it."""
SHORT_READING = (
    "Means over seeds on the test part with 95 % intervals. p (Holm): paired t-test over seeds "
    "against {reference}, corrected for all methods of the table; above 0.05 these seeds cannot "
    "tell the two apart. † marks sizes not within 2 % of the budget."
)
DASH = "–"


def table_title(first: ComparisonRow, rows: list[ComparisonRow]) -> str:
    """Task, metric, which way is better, and the budget."""
    budget = next((row.budget for row in rows if row.budget is not None), None)
    size = "" if budget is None else f", {whole(budget)} parameters"
    better = "lower" if first.lower_is_better else "higher"
    return (
        f"{first.task}: {first.metric}, {better} is better; budget of LoRA r = {first.rank}{size}"
    )


def short_cells(row: ComparisonRow, reference: str) -> list[str]:
    """Method, parameters, mean, its interval, and the corrected p against the reference."""
    assert row.summary is not None
    p = None if row.against is None else row.against.holm_p
    against = "reference" if row.label == reference else DASH
    return [
        row.label,
        DASH if row.size is None else whole(row.size) + ("†" if row.matched is False else ""),
        loss(row.summary.mean),
        interval(row.summary),
        against if p is None else probability(p),
    ]


def remarks(rows: Sequence[ComparisonRow]) -> list[str]:
    """What a table has no room for: methods without a result, and runs that its means leave out."""
    states: dict[str, list[str]] = {}
    for row in rows:
        if row.status != "finished" or (row.summary is None and not row.diverged):
            states.setdefault(row.status, []).append(row.label)
    return [f"{joined(labels)}: {status}." for status, labels in states.items()] + [
        f"{row.label}: diverged at seed {joined([str(seed) for seed in row.diverged])}, which the "
        "mean leaves out."
        for row in rows
        if row.diverged
    ]


def takeaways(report: Report) -> list[str]:
    """What each comparison found, in one paragraph that claims no more than its tests."""
    return [_takeaway(comparison) for comparison in report.comparisons]


def _takeaway(comparison: ComparisonView) -> str:
    words = [f"{comparison.title}: {extent(comparison)}"]
    for rows in comparison.tables.values():
        ranked = best_first(rows)
        if not ranked:
            continue
        first = ranked[0]
        assert first.summary is not None
        against = [row for row in ranked if row.against and row.against.holm_p is not None]
        untested = sum(row.against is not None for row in ranked) - len(against)
        holding = [row for row in against if differs(row)]
        words.append(
            f"{first.task} at the budget of r = {first.rank}: the best mean {first.metric} is "
            f"{loss(first.summary.mean)} ({first.label}{_seeds_of(first)})."
        )
        if against:
            names = f": {joined([row.label for row in holding])}" if 0 < len(holding) <= 4 else ""
            words.append(
                f"{len(holding)} of {len(against)} methods differ from {comparison.reference} "
                f"after Holm's correction (p < {SIGNIFICANT:g}){names}."
            )
        if untested:
            words.append(f"{untested} have too few seeds to be tested.")
    return " ".join(words)


def _seeds_of(row: ComparisonRow) -> str:
    """How many seeds a mean is over, where some are missing."""
    assert row.summary is not None
    return f", {row.summary.count} of {row.wanted} seeds" if row.summary.count < row.wanted else ""


def next_of(comparison: ComparisonView) -> tuple[str, str]:
    """What to do next, and a command or an empty string."""
    if comparison.finished < comparison.cells:
        return (
            "Next: finish the comparison; what is done is kept.",
            "rankwise compare experiment.yaml",
        )
    edge = list(dict.fromkeys(row.label for row in comparison.rows if row.at_edge))
    if edge:
        return (
            f"Next: widen the grid of learning rates, at whose edge {joined(edge[:4])} ended.",
            "rankwise compare experiment.yaml 'learning_rates=[...]'",
        )
    return "Next: train with the method you chose.", "rankwise train run.yaml"


def extent(comparison: ComparisonView) -> str:
    """How much of the comparison is done, and what it took."""
    machines = joined(comparison.hardware) if comparison.hardware else "no machine yet"
    return (
        f"{whole(comparison.finished)} of {whole(comparison.cells)} runs finished, "
        f"{short(comparison.hours)} hours of computing on {machines}."
    )


def differs(row: ComparisonRow) -> bool:
    """Whether the difference from the reference holds after Holm's correction."""
    p = None if row.against is None else row.against.holm_p
    return p is not None and p < SIGNIFICANT


def interval(summary: SummaryView) -> str:
    """Both ends, or a dash for a single seed."""
    if summary.low is None or summary.high is None:
        return DASH
    return f"{loss(summary.low)} to {loss(summary.high)}"


def rate(value: float) -> str:
    """A learning rate."""
    return f"{value:g}"


def signed(value: float) -> str:
    """A difference, to four decimals."""
    return f"{value:+.4f}".replace("-", "−")


def probability(value: float) -> str:
    """A p-value to three decimals; what is smaller than they show is said to be."""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"
