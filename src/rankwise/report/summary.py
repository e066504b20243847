"""What a report says, as text for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rankwise.report.comparison_view import ComparisonView, best_first
from rankwise.report.comparison_words import COLUMNS, remarks, short_cells, table_title
from rankwise.report.views import PlanView, Report, RunView
from rankwise.report.words import loss, percent, whole
from rankwise.tables import make_table, render


def summary(report: Report, document: Mapping[str, Any]) -> str:
    """What happened, comparisons, runs and plans as tables, what to look at and to do next."""
    parts = [*document["takeaway"]]
    for comparison in report.comparisons:
        parts += comparison_texts(comparison)
    if report.runs:
        parts.append(_runs(report.runs))
    if report.plans:
        parts.append(_plans(report.plans))
    parts += [
        f"look: {check['subject']}: {check['what']}: {check['value']}. {check['meaning']}"
        for check in document["health"]
        if check["good"] is False
    ]
    parts += document["caveats"]
    sentence, command = document["next"]
    parts.append(f"{sentence}\n  {command}" if command else sentence)
    return "\n\n".join(parts)


def comparison_texts(comparison: ComparisonView) -> list[str]:
    """A table for each task and budget, best mean first, with what it leaves out below it."""
    parts = []
    for rows in comparison.tables.values():
        cells = [short_cells(row, comparison.reference) for row in best_first(rows)]
        lines = [table_title(rows[0], rows)]
        if cells:
            lines.append(render(make_table(COLUMNS, cells)))
        parts.append("\n".join([*lines, *(f"  {remark}" for remark in remarks(rows))]))
    return parts


def _runs(runs: Sequence[RunView]) -> str:
    rows = [
        (
            run.label,
            whole(run.trainable_parameters),
            loss(run.held_out[0].loss) if run.held_out else "-",
            loss(run.held_out[-1].loss) if run.held_out else "-",
        )
        for run in runs
    ]
    columns = ["run", "trainable parameters", "held-out loss before", "after"]
    return render(make_table(columns, rows))


def _plans(plans: Sequence[PlanView]) -> str:
    rows = [
        (
            plan.label,
            whole(plan.parameters),
            "-" if plan.used is None else percent(plan.used),
            f"{plan.ranks.min:g} - {plan.ranks.max:g}",
            f"{plan.blocks.min:g} - {plan.blocks.max:g}",
            "-" if plan.captured is None else percent(plan.captured),
        )
        for plan in plans
    ]
    columns = ["plan", "parameters", "of budget", "ranks", "blocks", "captured energy"]
    return render(make_table(columns, rows))
