"""How profiles and plans look in a notebook; importing this module registers it."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from rankwise.display import show_as_html
from rankwise.plan import RankPlan
from rankwise.profiling.profile import GradientProfile
from rankwise.report.grid import heat_sources
from rankwise.report.measures import telling_measure
from rankwise.report.plan_view import view_of_plan
from rankwise.report.profile_view import view_of_profile
from rankwise.report.svg import heatmap_svg
from rankwise.report.views import Report
from rankwise.report.words import next_step, takeaway


def profile_html(profile: GradientProfile) -> str:
    """A profile's GID, layer by layer, with its sentence and the table folded away."""
    return _html(Report(profiles=[view_of_profile(profile)]), str(profile))


def plan_html(plan: RankPlan) -> str:
    """A plan's ranks or blocks, layer by layer, with its sentence and the table folded away."""
    return _html(Report(plans=[view_of_plan(plan)]), str(plan))


def _html(report: Report, text: str) -> str:
    sentences: Sequence[str] = [*takeaway(report), " ".join(next_step(report))]
    drawings = [
        heatmap_svg(source, telling_measure(source.view)) for source in heat_sources(report)
    ]
    return "\n".join(
        [
            *(f"<p>{escape(sentence)}</p>" for sentence in sentences),
            *(drawing for drawing in drawings if drawing is not None),
            f"<details><summary>as text</summary><pre>{escape(text)}</pre></details>",
        ]
    )


show_as_html(GradientProfile, profile_html)
show_as_html(RankPlan, plan_html)
