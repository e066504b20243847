"""The health panel and the serving panel as tables."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from rankwise.report.tables import data_cell, table
from rankwise.report.views import Check, PlanView, Serving
from rankwise.report.words import percent, short, whole

_MARKS = {True: ("good", "✓ fine"), False: ("look", "▲ look"), None: ("fact", "• fact")}


def health_table(checks: Sequence[Check]) -> str:
    """One row a check, its verdict in words as well as in colour."""
    rows = []
    for check in checks:
        style, text = _MARKS[check.good]
        rows.append(
            (
                f"{check.subject}: {check.what}",
                [
                    f'<span class="mark {style}">{text}</span>',
                    escape(check.value),
                    escape(check.meaning),
                ],
            )
        )
    reading = (
        "What could make the numbers on this page worth less than they look. “▲ look” means: read "
        "the last column before relying on them."
    )
    return f'<p class="reading">{reading}</p>\n' + table(
        ["check", "verdict", "found", "why it matters"],
        rows,
        kind="cards words",
        caption="Health of the measurements",
    )


def serving_table(plans: Sequence[PlanView]) -> str:
    """What each server of LoRA adapters needs for each plan."""
    rows = [(plan.label, _serving_cells(plan.serving)) for plan in plans]
    reading = (
        "Servers read plain LoRA, in which n blocks of rank r count as rank n × r. A row tells how "
        "each of them has to be started, and whether the adapter must be padded first: "
        "every factor filled with zeros to one rank R, the scale folded into B, alpha = r = R, "
        "which is the same function in all of them."
    )
    return f'<p class="reading">{reading}</p>\n' + table(
        ["adapter", "largest rank", "export", "vLLM", "SGLang", "llama.cpp", "padded parameters"],
        rows,
        kind="cards words",
        caption="What serving the adapters needs",
    )


def _serving_cells(serving: Serving) -> list[str]:
    if serving.adapter == "lr-lora":
        only = "merged weights, or what rankwise export approximates"
        return [data_cell(None, whole), only, *(["after the export"] * 3), data_cell(None, whole)]
    padded, plain = serving.uneven, serving.adapter == "lora"
    export = "padded LoRA, or merged weights" if padded else "as it is"
    if not plain and not padded:
        export = "plain LoRA of rank n × r, or merged weights"
    vllm = (
        f"--enable-lora --max-lora-rank {data_cell(serving.vllm_rank, str)}"
        if serving.vllm_rank is not None
        else "rank above 512: merge it into the weights"
    )
    one = "one alpha / r for all layers: wrong unless padded" if padded else "reads it as it is"
    return [
        data_cell(serving.largest_rank, whole),
        export,
        vllm + ("; up to 0.30 it has one alpha / r for all layers" if padded else ""),
        one if plain else "after the export",
        "scales each tensor by alpha / its own rank: wrong unless padded"
        if padded
        else "convert_lora_to_gguf.py, then --lora",
        data_cell(serving.padded_parameters if padded else None, whole),
    ]


def budget_table(plans: Sequence[PlanView]) -> str:
    """Plans side by side: size, budget, spread of ranks and blocks, captured energy."""
    rows = []
    for plan in plans:
        rows.append(
            (
                plan.label,
                [
                    data_cell(plan.parameters, whole),
                    data_cell(plan.budget, whole),
                    data_cell(plan.used, percent),
                    _span(plan.ranks.min, plan.ranks.max),
                    _span(plan.blocks.min, plan.blocks.max),
                    data_cell(plan.ranks.mean, short),
                    data_cell(plan.captured, percent),
                ],
            )
        )
    reading = (
        "Plans of equal size can be compared directly. Captured energy is the share of the "
        "measured mean gradient that the best update of these ranks can hold; block-diagonal "
        "adapters have no such number. It says nothing of the loss after training."
    )
    columns = [
        "plan",
        "trainable parameters",
        "budget",
        "budget used",
        "rank",
        "blocks",
        "mean rank",
        "captured gradient energy",
    ]
    return f'<p class="reading">{reading}</p>\n' + table(
        columns, rows, kind="cards", caption="Plans side by side"
    )


def _span(low: float, high: float) -> str:
    if low == high:
        return data_cell(low, whole)
    return f"{data_cell(low, whole)} to {data_cell(high, whole)}"
