"""What a report says, as text for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rankwise.report.views import Report
from rankwise.report.words import loss, percent, whole
from rankwise.tables import make_table, render


def summary(report: Report, document: Mapping[str, Any]) -> str:
    """What happened, the runs and plans in a table each, what to look at, and what to do next."""
    parts = [*document["takeaway"]]
    if report.runs:
        rows = [
            (
                run.label,
                whole(run.trainable_parameters),
                loss(run.held_out[0].loss) if run.held_out else "-",
                loss(run.held_out[-1].loss) if run.held_out else "-",
            )
            for run in report.runs
        ]
        columns = ["run", "trainable parameters", "held-out loss before", "after"]
        parts.append(render(make_table(columns, rows)))
    if report.plans:
        plans = [
            (
                plan.label,
                whole(plan.parameters),
                "-" if plan.used is None else percent(plan.used),
                f"{plan.ranks.min:g} - {plan.ranks.max:g}",
                f"{plan.blocks.min:g} - {plan.blocks.max:g}",
                "-" if plan.captured is None else percent(plan.captured),
            )
            for plan in report.plans
        ]
        columns = ["plan", "parameters", "of budget", "ranks", "blocks", "captured energy"]
        parts.append(render(make_table(columns, plans)))
    parts += [
        f"look: {check['subject']}: {check['what']}: {check['value']}. {check['meaning']}"
        for check in document["health"]
        if check["good"] is False
    ]
    parts += document["caveats"]
    sentence, command = document["next"]
    parts.append(f"{sentence}\n  {command}" if command else sentence)
    return "\n\n".join(parts)
