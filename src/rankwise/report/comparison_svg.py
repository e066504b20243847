"""One table of a comparison as a small static SVG: a dot and an interval for each method."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from rankwise.report.comparison_view import SIGNIFICANT, ComparisonRow, best_first
from rankwise.report.comparison_words import COLUMNS, differs, short_cells, table_title
from rankwise.report.svg import INK, cut, drawing

_LEFT, _PLOT, _RIGHT, _TOP, _ROW = 190, 350, 24, 58, 24
_BOTTOM = 68
_GRID, _OURS, _OTHERS = "#d8dde3", "#0b5fad", "#5b6570"
_CHARACTERS = 30  # of a label, which fit into the left margin


@dataclass(frozen=True)
class _Scale:
    """Values to places between the left and the right edge of the plot."""

    low: float
    high: float

    @classmethod
    def of(cls, rows: Sequence[ComparisonRow]) -> _Scale:
        """Holds every mean and every end of an interval, with a little air."""
        ends = [
            end
            for summary in (row.summary for row in rows)
            if summary is not None
            for end in (summary.mean, summary.low, summary.high)
            if end is not None
        ]
        low, high = min(ends), max(ends)
        air = 0.04 * (high - low) or 0.04 * abs(high) or 1.0
        return cls(low - air, high + air)

    def __call__(self, value: float) -> float:
        return _LEFT + _PLOT * (value - self.low) / (self.high - self.low)

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """Two to six round values, each with the digits that tell it from the next."""
        rough = (self.high - self.low) / 5
        power = math.floor(math.log10(rough))
        step = next(s for s in (1, 2, 5, 10) if s * 10.0**power >= rough * (1 - 1e-9)) * 10.0**power
        first, last = math.ceil(self.low / step), math.floor(self.high / step)
        digits = max(0, -math.floor(math.log10(step) + 1e-9))
        return [(i * step, f"{i * step:,.{digits}f}") for i in range(first, last + 1)]


def comparison_svg(rows: list[ComparisonRow], reference: str) -> str | None:
    """Methods down, the best first, the metric across; None where nothing has a result.

    Dots are means and lines their 95 % intervals. A filled dot differs from the reference after
    Holm's correction; the dashed line is the reference's mean. Every dot has its row of the table
    as a tooltip.
    """
    ranked = best_first(rows)
    if not ranked:
        return None
    scale = _Scale.of(ranked)
    bottom = _TOP + _ROW * len(ranked)
    title = table_title(rows[0], rows)
    width = _LEFT + _PLOT + _RIGHT
    marks = "".join(
        _mark(row, scale, _TOP + _ROW * (i + 0.5), reference) for i, row in enumerate(ranked)
    )
    words = [
        f'<text x="{width / 2:g}" y="20" text-anchor="middle" font-size="12">{escape(title)}'
        "</text>",
        *_key(ranked, reference, bottom + 44),
    ]
    body = (
        _axis(scale, bottom, rows[0].metric)
        + _reference_line(ranked, scale, bottom, reference)
        + f'<g fill="{INK}">{"".join(words)}</g>{marks}'
    )
    return drawing(title, width, bottom + _BOTTOM, body)


def _mark(row: ComparisonRow, scale: _Scale, y: float, reference: str) -> str:
    summary = row.summary
    assert summary is not None
    colour = _OURS if row.ours else _OTHERS
    fill = colour if differs(row) else "#ffffff"
    bar = ""
    if summary.low is not None and summary.high is not None:
        bar = (
            f'<line x1="{scale(summary.low):.1f}" x2="{scale(summary.high):.1f}" y1="{y:g}" '
            f'y2="{y:g}" stroke="{colour}" stroke-width="2"/>'
        )
    facts = zip(COLUMNS[1:], short_cells(row, reference)[1:], strict=True)
    hint = f"{row.label}: " + ", ".join(f"{name} {value}" for name, value in facts)
    weight = ' font-weight="bold"' if row.ours else ""
    return (
        f'<text x="{_LEFT - 10}" y="{y + 4:g}" text-anchor="end" fill="{INK}"{weight}>'
        f"{escape(cut(row.label, _CHARACTERS))}</text>{bar}"
        f'<circle cx="{scale(summary.mean):.1f}" cy="{y:g}" r="4.5" fill="{fill}" '
        f'stroke="{colour}" stroke-width="2"><title>{escape(hint)}</title></circle>'
    )


def _axis(scale: _Scale, bottom: int, metric: str) -> str:
    lines = "".join(
        f'<line x1="{scale(tick):.1f}" x2="{scale(tick):.1f}" y1="{_TOP}" y2="{bottom}" '
        f'stroke="{_GRID}"/>'
        for tick, _ in scale.ticks
    )
    texts = "".join(
        f'<text x="{scale(tick):.1f}" y="{bottom + 14}" text-anchor="middle">{text}</text>'
        for tick, text in scale.ticks
    )
    middle = _LEFT + _PLOT / 2
    name = f"{metric}, mean over seeds"
    texts += f'<text x="{middle:g}" y="{bottom + 28}" text-anchor="middle">{escape(name)}</text>'
    return f'{lines}<g fill="{INK}">{texts}</g>'


def _reference_line(
    rows: Sequence[ComparisonRow], scale: _Scale, bottom: int, reference: str
) -> str:
    found = next((row.summary for row in rows if row.label == reference), None)
    if found is None:
        return ""
    x = f"{scale(found.mean):.1f}"
    return (
        f'<line x1="{x}" x2="{x}" y1="{_TOP - 6}" y2="{bottom}" stroke="{INK}" '
        'stroke-dasharray="4 3"/>'
        f'<text x="{x}" y="{_TOP - 10}" text-anchor="middle" fill="{INK}">'
        f"{escape(cut(reference, _CHARACTERS))}</text>"
    )


def _key(rows: Sequence[ComparisonRow], reference: str, y: int) -> list[str]:
    """How to read the marks, in two lines."""
    ours = " Bold: this project's methods." if any(row.ours for row in rows) else ""
    lines = (
        f"Lines: 95 % intervals over seeds.{ours}",
        f"Filled dot: differs from {cut(reference, _CHARACTERS)} after Holm's correction, "
        f"p < {SIGNIFICANT:g}.",
    )
    return [
        f'<text x="{_LEFT - 10}" y="{y + 14 * i}">{escape(line)}</text>'
        for i, line in enumerate(lines)
    ]
