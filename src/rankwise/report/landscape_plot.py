"""The plot of the loss around a solution."""

from __future__ import annotations

import plotly.graph_objects as go

from rankwise.report.heatmaps import COLORSCALE
from rankwise.report.plots import Variant, axis, shape_layout, variant
from rankwise.report.training_views import LandscapeView
from rankwise.report.views import Report
from rankwise.report.words import whole


def landscape_variants(report: Report) -> list[Variant]:
    """Held-out loss on a plane through the solution, one variant a run."""
    found = []
    for run in report.runs:
        plane = run.landscape
        if plane is None:
            continue
        found.append(
            variant(
                run.label,
                _landscape_reading(plane),
                _contour(plane),
                numbers=[
                    ["loss at the solution", plane.solution, "loss"],
                    ["lowest loss on the plane", plane.lowest, "loss"],
                    ["parameters", plane.parameters, "whole"],
                    ["their norm", plane.parameter_norm, "short"],
                    ["held-out tokens", plane.tokens, "whole"],
                    ["seed", plane.seed, "whole"],
                ],
            )
        )
    return found


def _contour(plane: LandscapeView) -> go.Figure:
    title = "direction, lengths"
    figure = go.Figure(
        [
            go.Contour(
                x=plane.at,
                y=plane.at,
                z=plane.loss,
                colorscale=COLORSCALE,
                ncontours=16,
                contours={"coloring": "heatmap", "showlabels": True},
                line={"width": 0.7, "color": "#ffffff"},
                colorbar={"title": {"text": "loss, nats per token"}},
                hovertemplate="%{x:.2f}, %{y:.2f}<br>%{z:.4f} nats per token<extra></extra>",
            ),
            go.Scatter(
                x=[0.0],
                y=[0.0],
                mode="markers",
                name="the solution",
                marker={"symbol": "x", "size": 12, "color": "#ff6d00"},
                meta={"keep": True},
                hoverinfo="skip",
            ),
        ]
    )
    shape_layout(
        figure,
        axis(f"first {title}", constrain="domain"),
        axis(f"second {title}", scaleanchor="x", constrain="domain"),
    )
    figure.update_layout(height=520, showlegend=False)
    return figure


def _landscape_reading(plane: LandscapeView) -> str:
    how = (
        "each one length long, which is that of all trained parameters together"
        if plane.normalisation == "norm"
        else "each one length long, whose rows are as long as those of the trained parameters"
    )
    return (
        f"Held-out loss on {whole(plane.tokens)} tokens where the trained parameters are moved "
        f"along two random directions, {how}. The cross is the solution. A wide basin says that "
        "small changes cost little; two random directions of many cannot show more, and planes of "
        "different methods do not compare, because their parameters differ."
    )
