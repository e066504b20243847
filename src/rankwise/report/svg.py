"""Small static SVGs for model cards and notebooks, and the heatmap: no script, no network."""

from __future__ import annotations

from html import escape

from rankwise.report.grid import Grid, HeatSource, paint
from rankwise.report.measures import Measure

INK = "#1b1f24"
"""Of texts."""
# nine even steps of cividis, which reads the same with and without colour vision
_CIVIDIS = (
    (0, 32, 76),
    (0, 51, 111),
    (57, 72, 107),
    (87, 93, 109),
    (112, 113, 115),
    (138, 134, 120),
    (166, 156, 117),
    (197, 181, 103),
    (255, 233, 69),
)
_CELL_WIDTH, _LEFT, _TOP, _RIGHT, _BOTTOM = 62, 66, 40, 12, 58
_MOST_ROWS = 40  # more layers than this get thinner rows


def heatmap_svg(source: HeatSource, measure: Measure) -> str | None:
    """Layers down, kinds across, the measure as colour; None if no module is in a numbered layer.

    Every cell has its module and value as a tooltip. The drawing carries its own light ground, so
    that it can be read on a dark page.
    """
    grid = source.grid
    if grid is None:
        return None
    values = {
        name: value
        for name, value in source.values(measure).items()
        if value is not None and name in grid.at
    }
    base, painted = paint(measure, values)
    height = max(18 if len(grid.rows) <= _MOST_ROWS else 720 // len(grid.rows), 2)
    low, high = min(painted.values(), default=0.0), max(painted.values(), default=0.0)
    cells = []
    for name, place in painted.items():
        i, j = grid.at[name]
        share = (place - low) / (high - low) if high > low else 0.5
        x, y = _LEFT + j * _CELL_WIDTH, _TOP + i * height
        text = f"{name}: {measure.label} {measure.show(values[name])}"
        cells.append(
            f'<rect x="{x}" y="{y}" width="{_CELL_WIDTH}" height="{height}" '
            f'fill="{cividis(share)}"><title>{escape(text)}</title></rect>'
        )
    width = max(_LEFT + len(grid.columns) * _CELL_WIDTH + _RIGHT, 320)
    bottom = _TOP + len(grid.rows) * height
    known = [values[name] for name in painted]
    ends = measure.show(min(known, default=0)), measure.show(max(known, default=0))
    unit = measure.unit if base is None else f"{measure.unit}, logarithmic"
    legend = _legend(bottom + 20, unit, ends)
    body = f'<g fill="{INK}">{_texts(grid, height, bottom)}</g>{"".join(cells)}{legend}'
    return drawing(f"{measure.label} of {source.label}", width, bottom + _BOTTOM, body)


def drawing(title: str, width: int, height: int, body: str) -> str:
    """A whole SVG with its title, on its own light ground."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" role="img" '
        'font-family="sans-serif" font-size="11">'
        f"<title>{escape(title)}</title>"
        f'<rect width="100%" height="100%" fill="#ffffff"/>{body}</svg>'
    )


def cividis(share: float) -> str:
    """The colour at a place from 0 to 1, as `#rrggbb`.

    Example:
        >>> cividis(0.0), cividis(1.0)
        ('#00204c', '#ffe945')
    """
    at = min(max(share, 0.0), 1.0) * (len(_CIVIDIS) - 1)
    i = min(int(at), len(_CIVIDIS) - 2)
    mixed = (a + (b - a) * (at - i) for a, b in zip(_CIVIDIS[i], _CIVIDIS[i + 1], strict=True))
    return "#" + "".join(f"{round(part):02x}" for part in mixed)


def _texts(grid: Grid, height: int, bottom: int) -> str:
    every = -(-14 // height)  # rows between two labels, so that they do not overlap
    rows = "".join(
        f'<text x="{_LEFT - 6}" y="{_TOP + (i + 0.5) * height + 4:g}" text-anchor="end">'
        f"{escape(cut(label, 9))}</text>"
        for i, label in enumerate(grid.rows)
        if i % every == 0
    )
    columns = "".join(
        f'<text x="{_LEFT + (j + 0.5) * _CELL_WIDTH:g}" y="{_TOP - 6}" text-anchor="middle">'
        f"{escape(cut(label, 10))}</text>"
        for j, label in enumerate(grid.columns)
    )
    return f'{rows}{columns}<text x="{_LEFT - 6}" y="{_TOP - 6}" text-anchor="end">layer</text>'


def _legend(y: int, unit: str, ends: tuple[str, str]) -> str:
    steps = "".join(
        f'<rect x="{_LEFT + 10 * i}" y="{y}" width="10" height="10" fill="{cividis(i / 15)}"/>'
        for i in range(16)
    )
    return (
        f'{steps}<g fill="{INK}"><text x="{_LEFT - 6}" y="{y + 9}" text-anchor="end">'
        f'{escape(ends[0])}</text><text x="{_LEFT + 166}" y="{y + 9}">{escape(ends[1])} '
        f"{escape(unit)}</text></g>"
    )


def cut(text: str, length: int) -> str:
    """At most so many characters, the last an ellipsis where some are left out."""
    return text if len(text) <= length else text[: length - 1] + "…"
