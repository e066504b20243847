"""Plain-text tables: layers down, module kinds across."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rankwise.targets import layer_position


def render(table: Table) -> str:
    """A rich table as plain text, as wide as its content."""
    buffer = io.StringIO()
    Console(file=buffer, width=400, color_system=None).print(table)
    return "\n".join(line.rstrip() for line in buffer.getvalue().rstrip().splitlines())


def make_table(
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    title: str | None = None,
    caption: str | None = None,
) -> Table:
    """A table whose first column is left-aligned and whose others are numbers.

    Nothing in it is markup: names come from files.
    """
    table = Table(
        title=None if title is None else Text(title),
        caption=None if caption is None else Text(caption),
        box=box.SIMPLE_HEAD,
        title_justify="left",
        caption_justify="left",
        title_style="bold",
    )
    for i, column in enumerate(columns):
        table.add_column(Text(column), justify="left" if i == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    return table


def layer_table(cells: Mapping[str, str], *, title: str, caption: str) -> str:
    """One cell per module, laid out as layer x kind; modules outside a stack get a row each."""
    parts = [render(make_table(columns, rows)) for columns, rows in _layer_grids(cells)]
    return "\n".join([title, *parts, caption])


def markdown_layers(cells: Mapping[str, str]) -> str:
    """The same layout as Markdown tables."""
    return "\n\n".join(markdown_table(columns, rows) for columns, rows in _layer_grids(cells))


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table whose columns after the first are right-aligned."""
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join(
        "| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines
    )


def _layer_grids(cells: Mapping[str, str]) -> list[tuple[list[str], list[list[str]]]]:
    """Columns and rows of the modules in stacks of layers, and of those outside."""
    kinds: dict[str, None] = {}
    grid: dict[tuple[str, int], dict[str, str]] = {}
    alone: list[list[str]] = []
    for name, text in cells.items():
        place = layer_position(name)
        if place.index is None:
            alone.append([name, text])
        else:
            kinds.setdefault(place.kind)
            grid.setdefault((place.stack, place.index), {})[place.kind] = text
    parts: list[tuple[list[str], list[list[str]]]] = []
    if grid:
        stacks = list(dict.fromkeys(stack for stack, _ in grid))

        def order(place: tuple[str, int]) -> tuple[int, int]:
            return stacks.index(place[0]), place[1]

        rows = [
            [
                str(i) if len(stacks) == 1 else f"{stack}.{i}",
                *(row.get(kind, "-") for kind in kinds),
            ]
            for (stack, i), row in sorted(grid.items(), key=lambda item: order(item[0]))
        ]
        parts.append((["layer", *kinds], rows))
    if alone:
        parts.append((["module", "value"], alone))
    return parts
