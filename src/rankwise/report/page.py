"""The page: one HTML document that holds its styles, its script, its numbers and plotly.js."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from plotly.offline import get_plotlyjs

from rankwise import __version__
from rankwise.errors import FileError
from rankwise.files import read_text, write_text
from rankwise.report.card import write_card
from rankwise.report.comparison_words import next_of, takeaways
from rankwise.report.health import health
from rankwise.report.heatmaps import heatmap_groups, share_cells
from rankwise.report.load import load_report
from rankwise.report.sections import PLOTS, header, sections
from rankwise.report.summary import summary
from rankwise.report.tables import module_columns
from rankwise.report.views import Report
from rankwise.report.words import caveats, next_step, takeaway

_SCRIPTS = ("theme.js", "detail.js", "modules.js", "page.js")  # one scope, in this order

# Nothing may be asked of the network, by any script: the browser enforces it.
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data: blob:; base-uri 'none'; form-action 'none'"
)


def write_page(paths: Sequence[Path], out: Path, *, card: Path | None = None) -> str:
    """Write the page, its JSON and a model card, and return a summary.

    See `rankwise.report.write_report`.

    Raises:
        FileError: A path is unusable, or `out` cannot be written or is no HTML name.
    """
    beside = _json_beside(out)
    report = load_report(paths)
    document = report_document(report)
    page = render_page(report, document)
    if card is not None:
        write_card(report, document, card)
    write_text(beside, json.dumps(document, indent=1, allow_nan=False) + "\n")
    write_text(out, page)
    return summary(report, document)


def report_document(report: Report) -> dict[str, Any]:
    """The content of `report.json`: the numbers, and the words made from them."""
    return {
        **report.to_json(),
        "health": [asdict(check) for check in health(report)],
        "rankwise": __version__,
        "takeaway": [*takeaways(report), *takeaway(report)],
        "caveats": caveats(report),
        "next": list(_next(report)),
    }


def _next(report: Report) -> tuple[str, str]:
    if report.comparisons:
        return next_of(report.comparisons[0])
    return next_step(report)


def render_page(report: Report, document: Mapping[str, Any]) -> str:
    """The whole HTML document."""
    title = report.title
    plots = {name: make(report) for name, (_, make) in PLOTS.items()}
    plots = {name: variants for name, variants in plots.items() if variants}
    heatmaps = heatmap_groups(report)
    figures: dict[str, Any] = {
        "plots": plots,
        "columns": [column.to_json() for column in module_columns(report)],
    }
    figures["heatmaps"], figures["cells"] = share_cells(heatmaps)
    body = sections(report, document, plots, heatmaps, health(report))
    plotly = get_plotlyjs().replace("</script", "<\\/script") if plots or heatmaps else ""
    scripts = "\n".join(_asset(name) for name in _SCRIPTS)
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            *_head(title),
            "<body>",
            "<main>",
            header(report, document, title),
            *body,
            "</main>",
            f'<script type="application/json" id="report">{_inert(document)}</script>',
            f'<script type="application/json" id="figures">{_inert(figures)}</script>',
            '<script>window.PlotlyConfig = {MathJaxConfig: "local"};</script>',
            f"<script>{plotly}</script>",
            f'<script>\n"use strict";\n(() => {{\n{scripts}}})();\n</script>',
            "</body>",
            "</html>",
            "",
        ]
    )


def _head(title: str) -> list[str]:
    return [
        "<head>",
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{escape(_POLICY)}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark">',
        f"<title>rankwise: {escape(title)}</title>",
        f"<style>\n{_asset('page.css')}</style>",
        "</head>",
    ]


def _asset(name: str) -> str:
    return (resources.files("rankwise.report") / "assets" / name).read_text(encoding="utf-8")


def _json_beside(out: Path) -> Path:
    """`report.json` for `report.html`, refusing to replace a JSON file of another kind."""
    if out.suffix.lower() not in (".html", ".htm"):
        raise FileError(f"out={out}: must end in .html.")
    if out.is_dir():
        raise FileError(f"out={out}: is a folder; name an HTML file in it.")
    beside = out.with_suffix(".json")
    if beside.exists():
        try:
            found = json.loads(read_text(beside, "report"))
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict) or found.get("kind") != "rankwise report":
            raise FileError(
                f"{beside}: exists and is no report, and a page named {out.name} writes its "
                "numbers there; choose another name for the page."
            )
    return beside


def _inert(value: Any) -> str:
    """JSON that no HTML parser can take for anything but text."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
