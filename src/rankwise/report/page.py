"""The page: one HTML document that holds its styles, its script, its numbers and plotly.js."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from plotly.offline import get_plotlyjs

from rankwise import __version__
from rankwise.errors import FileError
from rankwise.files import read_text, write_text
from rankwise.report.figures import heatmap_groups, loss_figure
from rankwise.report.load import Report, RunView, load_report
from rankwise.report.tables import comparison_table, module_table, outside_table
from rankwise.report.words import caveats, joined, next_step, takeaway, whole

# Nothing may be asked of the network, by any script: the browser enforces it.
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data: blob:; base-uri 'none'; form-action 'none'"
)


def write_page(paths: Sequence[Path], out: Path) -> None:
    """Write the page and its JSON; see `rankwise.report.write_report`.

    Raises:
        FileError: A path is unusable, or `out` cannot be written or is no HTML name.
    """
    beside = _json_beside(out)
    report = load_report(paths)
    document = report_document(report)
    page = render_page(report, document)
    write_text(beside, json.dumps(document, indent=1, allow_nan=False) + "\n")
    write_text(out, page)


def report_document(report: Report) -> dict[str, Any]:
    """The content of `report.json`: the numbers, and the words made from them."""
    return {
        **report.to_json(),
        "rankwise": __version__,
        "takeaway": takeaway(report),
        "caveats": caveats(report),
        "next": list(next_step(report)),
    }


def render_page(report: Report, document: Mapping[str, Any]) -> str:
    """The whole HTML document."""
    title = joined(report.models) if report.models else "a model"
    losses = loss_figure(report)
    groups = heatmap_groups(report)
    sections = [
        _header(report, document, title),
        _section("Runs", "runs", comparison_table(report.runs)) if report.runs else "",
        _section("Loss", "loss", _LOSS) if losses else "",
        _section("Layer by layer", "layers", _heatmap(groups)) if groups else "",
        _outside(report),
        _every_module(report),
        _section("Where this comes from", "provenance", _provenance(report, document)),
    ]
    assets = resources.files("rankwise.report") / "assets"
    style = (assets / "page.css").read_text(encoding="utf-8")
    script = (assets / "page.js").read_text(encoding="utf-8")
    plotly = get_plotlyjs().replace("</script", "<\\/script") if losses or groups else ""
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{escape(_POLICY)}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            f"<title>rankwise: {escape(title)}</title>",
            f"<style>\n{style}</style>",
            "</head>",
            "<body>",
            "<main>",
            *(section for section in sections if section),
            "</main>",
            f'<script type="application/json" id="report">{_inert(document)}</script>',
            f'<script type="application/json" id="figures">'
            f"{_inert({'losses': losses, 'heatmaps': groups})}</script>",
            '<script>window.PlotlyConfig = {MathJaxConfig: "local"};</script>',
            f"<script>{plotly}</script>",
            f"<script>\n{script}</script>",
            "</body>",
            "</html>",
            "",
        ]
    )


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


def _section(title: str, name: str, body: str) -> str:
    return f'<section id="{name}">\n<h2>{title}</h2>\n{body}\n</section>'


def _header(report: Report, document: Mapping[str, Any], title: str) -> str:
    sentence, command = document["next"]
    lead = "\n".join(f'<p class="lead">{escape(text)}</p>' for text in document["takeaway"])
    notes = " ".join(escape(text) for text in document["caveats"])
    return (
        f'<header>\n<p class="over">rankwise report</p>\n<h1>{escape(title)}</h1>\n{lead}\n'
        + (f'<p class="note">{notes}</p>\n' if notes else "")
        + f'<p class="next">{escape(sentence)} <code>{escape(command)}</code></p>\n'
        + _facts(_header_facts(report))
        + "\n</header>"
    )


def _facts(facts: Iterable[tuple[str, str]]) -> str:
    rows = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>"
        for name, value in facts
        if value
    )
    return f'<dl class="facts">{rows}</dl>'


def _distinct(values: Iterable[object]) -> str:
    return ", ".join(dict.fromkeys(str(value) for value in values if value not in (None, "")))


def _header_facts(report: Report) -> list[tuple[str, str]]:
    runs, profiles = report.runs, [profile.provenance for profile in report.profiles]
    methods = [run.method for run in runs] or [plan.method for plan in report.plans]
    return [
        ("methods", _distinct(methods)),
        ("steps", _distinct(f"{run.steps:,}" for run in runs)),
        ("training tokens", _distinct(whole(run.train_tokens) for run in runs)),
        ("learning rate", _distinct(_setting(run, "learning_rate") for run in runs)),
        (
            "gradients from",
            _distinct(f"N = {p['batches']} batches, {whole(p['tokens'])} tokens" for p in profiles),
        ),
        ("precision", _distinct([*(p["dtype"] for p in profiles), *(run.dtype for run in runs)])),
        ("seed", _distinct(run.seed for run in runs)),
        ("machine", _distinct(_machine(run) for run in runs)),
    ]


def _setting(run: RunView, key: str) -> str:
    value = run.settings.get(key)
    return f"{value:g}" if isinstance(value, float) else str(value or "")


def _machine(run: RunView) -> str:
    facts = run.hardware
    parts = [
        str(facts.get("accelerator") or facts.get("processor") or facts.get("machine") or ""),
        f"{facts['cores']} cores" if "cores" in facts else "",
        f"{facts['memory_gib']} GiB" if "memory_gib" in facts else "",
    ]
    return ", ".join(part for part in parts if part)


_LOSS = """<p class="reading">Lower is better. Thick lines with markers are the held-out loss, which
is what counts; thin lines are the loss on the training batches, which jumps from batch to batch.
Step 0 is the model before training.</p>
<p class="controls"><label><input type="checkbox" id="show-training" checked> show training
loss</label></p>
<div class="plot" id="loss-plot" role="img" aria-label="Loss over optimizer steps; the table of runs
holds the first and last values"></div>"""


def _heatmap(groups: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for g, group in enumerate(groups):
        buttons = "".join(
            f'<label><input type="radio" name="view" value="{g}.{v}"'
            f"{' checked' if g == v == 0 else ''}><span>{escape(view['label'])}</span></label>"
            for v, view in enumerate(group["views"])
        )
        rows.append(f'<div class="views"><b>{escape(group["label"])}</b>{buttons}</div>')
    return (
        '<p class="reading">One cell per module: layers from the first (top) to the last (bottom), '
        "kinds of module side by side. Choose what the colour shows; hover or tap a cell for its "
        "full name, shape and value. <b>Colours compare within one choice.</b></p>\n"
        f'<fieldset class="controls"><legend>Colour shows</legend>{"".join(rows)}</fieldset>\n'
        '<p class="reading" id="view-reading" aria-live="polite"></p>\n'
        '<div class="plot" id="heatmap-plot" role="img" aria-label="Heatmap of layers by module '
        'kinds; the table of every module holds the same numbers"></div>'
    )


def _outside(report: Report) -> str:
    table = outside_table(report)
    if not table:
        return ""
    reading = (
        '<p class="reading">These modules belong to no numbered layer, so they have no cell above.'
        "</p>\n"
    )
    return _section("Modules outside the layers", "outside", reading + table)


def _every_module(report: Report) -> str:
    return (
        '<section id="modules">\n<details>\n<summary>Every module, in numbers</summary>\n'
        '<p class="reading">The numbers behind the colours, one row per module, in model order.'
        f"</p>\n{module_table(report)}\n</details>\n</section>"
    )


def _provenance(report: Report, document: Mapping[str, Any]) -> str:
    parts = []
    for run in report.runs:
        settings = ", ".join(f"{key} {value}" for key, value in run.settings.items())
        facts = [
            ("finished", run.finished),
            ("folder", run.folder),
            ("seed", str(run.seed)),
            ("commit", run.commit or ""),
            ("model", f"{run.model}, fingerprint {run.model_fingerprint}"),
            ("data fingerprints", ", ".join(f"{k} {v}" for k, v in run.data.items())),
            ("settings", settings),
            ("hardware", ", ".join(f"{k} {v}" for k, v in run.hardware.items())),
            ("versions", ", ".join(f"{k} {v}" for k, v in run.versions.items())),
        ]
        parts.append(f"<h3>Run: {escape(run.label)}</h3>{_facts(facts)}")
    for profile in report.profiles:
        p = profile.provenance
        facts = [
            ("model", f"{p['model']}, fingerprint {p['model_fingerprint']}"),
            ("data fingerprint", p["data_fingerprint"]),
            ("batches", f"{p['batches']}, of {_distinct(p['batch_sizes'])} rows"),
            ("labelled tokens", whole(p["tokens"])),
            ("dtype", p["dtype"]),
            ("dropout", "on" if p["train_mode"] else "off"),
            ("seconds", f"{p['seconds']:.1f}"),
            ("versions", ", ".join(f"{k} {v}" for k, v in p["versions"].items())),
        ]
        parts.append(f"<h3>Profile: {escape(profile.label)}</h3>{_facts(facts)}")
    for plan in report.plans:
        options = ", ".join(f"{key} {value}" for key, value in plan.options.items())
        facts = [
            ("model", plan.model),
            ("model fingerprint", plan.model_fingerprint or "not profiled"),
            ("trainable parameters", whole(plan.parameters)),
            ("budget", whole(plan.budget) if plan.budget is not None else ""),
            ("options", options),
        ]
        parts.append(f"<h3>Plan: {escape(plan.label)}</h3>{_facts(facts)}")
    return (
        '<p class="reading">Equal fingerprints mean the same model or the same data. This page '
        "works offline and asks the network for nothing.</p>\n"
        + "".join(f'<div class="source">{part}</div>' for part in parts)
        + '<p class="controls"><button type="button" id="save-json">Save the numbers (JSON)'
        '</button></p>\n<p class="reading">Made by rankwise '
        f"{escape(str(document['rankwise']))}; report.json schema {document['schema_version']}.</p>"
    )
