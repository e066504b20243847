"""The sections of the page, as HTML."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Any

from rankwise.report.comparison import comparison_tables, parameter_variants
from rankwise.report.comparison_dots import method_variants
from rankwise.report.comparison_view import ComparisonView
from rankwise.report.landscape_plot import landscape_variants
from rankwise.report.lr_plots import function_variants, learned_variants
from rankwise.report.panels import budget_table, health_table, serving_table
from rankwise.report.plots import (
    Variant,
    convergence_variants,
    curve_variants,
    fisher_variants,
    loss_variants,
)
from rankwise.report.rank_plots import (
    histogram_variants,
    rank_variants,
    stable_rank_variants,
    update_variants,
)
from rankwise.report.tables import comparison_table, data_cell, module_table, outside_table
from rankwise.report.training_plots import history_variants, tracking_variants
from rankwise.report.views import Check, PlanView, ProfileView, Report, RunView
from rankwise.report.words import loss, short, whole

Plots = Mapping[str, Sequence[Variant]]

PLOTS: dict[str, tuple[str, Callable[[Report], list[Variant]]]] = {
    "methods": ("Methods side by side", method_variants),
    "parameters": ("The metric against parameters", parameter_variants),
    "loss": ("Loss", loss_variants),
    "ranks": ("Ranks against uniform", rank_variants),
    "histogram": ("How many modules got which rank", histogram_variants),
    "history": ("Ranks over training", history_variants),
    "tracking": ("Gradients over training", tracking_variants),
    "functions": ("What LR-LoRA learned: f over U", function_variants),
    "learned": ("The learned updates over training", learned_variants),
    "curve": ("How much rank to buy", curve_variants),
    "convergence": ("Were the batches enough", convergence_variants),
    "fisher": ("GID against Fisher information", fisher_variants),
    "updates": ("Spectra of the learned updates", update_variants),
    "stable-ranks": ("Stable rank of the learned updates", stable_rank_variants),
    "landscape": ("The loss around the solution", landscape_variants),
}
"""Every plot by the name of its section: its title, and what makes its variants."""


def sections(
    report: Report,
    document: Mapping[str, Any],
    plots: Plots,
    heatmaps: Sequence[Mapping[str, Any]],
    checks: Sequence[Check],
) -> list[str]:
    """Everything below the header, in reading order, only where there is data."""

    def plot(name: str) -> str:
        return _plot(name, plots[name]) if plots.get(name) else ""

    parts = [
        *(
            section(f"Comparison: {each.title}", f"comparison-{i}", comparison_tables(each))
            for i, each in enumerate(report.comparisons)
        ),
        plot("methods"),
        plot("parameters"),
        section("Runs", "runs", comparison_table(report.runs)) if report.runs else "",
        plot("loss"),
        section("Layer by layer", "layers", _heatmap(heatmaps)) if heatmaps else "",
        section("Plans", "plans", budget_table(report.plans)) if report.plans else "",
        *(plot(name) for name in PLOTS if name not in ("methods", "parameters", "loss")),
        section("Health", "health", health_table(checks)) if checks else "",
        section("Serving", "serving", serving_table(report.plans)) if report.plans else "",
        _outside(report),
        _every_module(report),
        section("Where this comes from", "provenance", _provenance(report, document)),
    ]
    return [part for part in parts if part]


def section(title: str, name: str, body: str) -> str:
    """A section with its heading."""
    return f'<section id="{name}">\n<h2>{escape(title)}</h2>\n{body}\n</section>'


def header(report: Report, document: Mapping[str, Any], title: str) -> str:
    """The first screen: what happened, what it cannot say, and what to do next."""
    sentence, command = document["next"]
    lead = "\n".join(f'<p class="lead">{escape(text)}</p>' for text in document["takeaway"])
    notes = " ".join(escape(text) for text in document["caveats"])
    code = f" <code>{escape(command)}</code>" if command else ""
    return (
        f'<header>\n<p class="over">rankwise report</p>\n<h1>{escape(title)}</h1>\n{lead}\n'
        + f'<p class="next">{escape(sentence)}{code}</p>\n'
        + (f'<p class="note">{notes}</p>\n' if notes else "")
        + _facts(_header_facts(report))
        + "\n</header>"
    )


def _choices(name: str, labels: Sequence[str]) -> str:
    return "".join(
        f'<label><input type="radio" name="{name}" value="{i}"'
        f"{' checked' if i == 0 else ''}><span>{escape(label)}</span></label>"
        for i, label in enumerate(labels)
    )


def _plot(name: str, variants: Sequence[Variant]) -> str:
    title = PLOTS[name][0]
    parts = [f'<p class="reading" data-reading="{name}" aria-live="polite"></p>']
    if len(variants) > 1:
        labels = _choices(f"plot-{name}", [variant["label"] for variant in variants])
        parts.append(
            f'<fieldset class="controls"><legend>Show</legend><div class="views">{labels}</div>'
            "</fieldset>"
        )
    if name == "loss":
        parts.append(
            '<p class="controls"><label><input type="checkbox" id="show-training" checked> show '
            "training loss</label></p>"
        )
    parts.append(
        f'<div class="plot" data-plot="{name}" role="img" aria-label="{escape(title)}; '
        'report.json holds the numbers"></div>'
    )
    parts += [_numbers(variant) for variant in variants if "numbers" in variant]
    return section(title, name, "\n".join(parts))


def _numbers(variant: Variant) -> str:
    rows = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{data_cell(value, _SHOWS[show])}</dd></div>"
        for name, value, show in variant["numbers"]
    )
    return f'<h3>{escape(variant["label"])}</h3><dl class="facts">{rows}</dl>'


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")


_SHOWS: dict[str, Callable[[float], str]] = {
    "signed": _signed,
    "whole": whole,
    "loss": loss,
    "short": short,
}


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
        "kinds of module side by side. Choose what the colour shows; click a cell, or move over "
        "the cells with the arrow keys, to see the module below. <b>Colours compare within one "
        "choice.</b></p>\n"
        f'<fieldset class="controls"><legend>Colour shows</legend>{"".join(rows)}</fieldset>\n'
        '<p class="reading" id="view-reading" aria-live="polite"></p>\n'
        '<div class="plot" id="heatmap-plot" tabindex="0" role="application" '
        'aria-label="Heatmap of layers by module kinds; arrow keys choose a module, which the '
        'section below describes; the table of every module holds the same numbers"></div>\n'
        + _DETAIL
    )


_DETAIL = """<div id="detail" hidden>
<p class="controls">
<button type="button" id="previous-module" aria-label="Previous module">←</button>
<select id="choose-module" aria-label="Module"></select>
<button type="button" id="next-module" aria-label="Next module">→</button></p>
<h3 id="detail-name" aria-live="polite"></h3>
<div id="detail-facts"></div>
<p class="reading" id="detail-reading"></p>
<div class="pair"><div class="plot" id="spectrum-plot" role="img"
aria-label="Singular values"></div><div class="plot" id="energy-plot" role="img"
aria-label="Cumulative energy"></div><div class="plot" id="update-plot" role="img"
aria-label="Singular values of the learned updates"></div></div>
<div id="detail-blocks"></div>
<template id="drawing"><svg><rect></rect></svg></template>
</div>"""


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


def _outside(report: Report) -> str:
    table = outside_table(report)
    if not table:
        return ""
    reading = (
        '<p class="reading">These modules belong to no numbered layer, so they have no cell above.'
        "</p>\n"
    )
    return section("Modules outside the layers", "outside", reading + table)


def _every_module(report: Report) -> str:
    if not any((report.profiles, report.plans, report.updates)):
        return ""
    return (
        '<section id="modules">\n<details>\n<summary>Every module, in numbers</summary>\n'
        '<p class="reading">The numbers behind the colours, one row per module, in model order.'
        f"</p>\n{module_table(report, [])}\n</details>\n</section>"
    )


def _provenance(report: Report, document: Mapping[str, Any]) -> str:
    sources: list[tuple[str, list[tuple[str, str]]]] = [
        *((f"Comparison: {each.title}", _comparison_facts(each)) for each in report.comparisons),
        *((f"Run: {run.label}", _run_facts(run)) for run in report.runs),
        *((f"Profile: {each.label}", _profile_facts(each)) for each in report.profiles),
        *((f"Plan: {plan.label}", _plan_facts(plan)) for plan in report.plans),
    ]
    return (
        '<p class="reading">Equal fingerprints mean the same model or the same data. This page '
        "works offline and asks the network for nothing.</p>\n"
        + "".join(
            f'<div class="source"><h3>{escape(title)}</h3>{_facts(facts)}</div>'
            for title, facts in sources
        )
        + '<p class="controls"><button type="button" id="save-json">Save the numbers (JSON)'
        '</button></p>\n<p class="reading">Made by rankwise '
        f"{escape(str(document['rankwise']))}; report.json schema {document['schema_version']}.</p>"
    )


def _comparison_facts(comparison: ComparisonView) -> list[tuple[str, str]]:
    return [
        ("commits", ", ".join(comparison.commits)),
        ("hardware", ", ".join(comparison.hardware)),
        ("hours of computing", f"{comparison.hours:g}"),
    ]


def _run_facts(run: RunView) -> list[tuple[str, str]]:
    return [
        ("finished", run.finished),
        ("folder", run.folder),
        ("seed", str(run.seed)),
        ("commit", run.commit or ""),
        ("model", f"{run.model}, fingerprint {run.model_fingerprint}"),
        ("data fingerprints", _pairs(run.data)),
        ("settings", _pairs(run.settings)),
        ("hardware", _pairs(run.hardware)),
        ("versions", _pairs(run.versions)),
    ]


def _profile_facts(profile: ProfileView) -> list[tuple[str, str]]:
    p = profile.provenance
    return [
        ("model", f"{p['model']}, fingerprint {p['model_fingerprint']}"),
        ("data fingerprint", p["data_fingerprint"]),
        ("batches", f"{p['batches']}, of {_distinct(p['batch_sizes'])} rows"),
        ("labelled tokens", whole(p["tokens"])),
        ("dtype", p["dtype"]),
        ("dropout", "on" if p["train_mode"] else "off"),
        ("seconds", f"{p['seconds']:.1f}"),
        ("versions", _pairs(p["versions"])),
    ]


def _plan_facts(plan: PlanView) -> list[tuple[str, str]]:
    return [
        ("model", plan.model),
        ("model fingerprint", plan.model_fingerprint or "not profiled"),
        ("trainable parameters", whole(plan.parameters)),
        ("budget", whole(plan.budget) if plan.budget is not None else ""),
        ("options", _pairs(plan.options)),
    ]


def _pairs(facts: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in facts.items())
