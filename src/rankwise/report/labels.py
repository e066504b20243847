"""Names as a plot shows them: short, told apart, and never read as markup."""

from __future__ import annotations

from collections.abc import Sequence


def plain(text: str) -> str:
    """Text that Plotly shows as it is; it reads a subset of HTML in labels and hover texts.

    Hover templates take names from the data (`%{customdata[0]}`), never from the template itself,
    so `%{...}` in a name is not expanded.
    """
    escaped = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return escaped.replace("\n", " ")


def kind_labels(kinds: Sequence[str]) -> list[str]:
    """The shortest endings that tell the kinds apart: `self_attn.q_proj` becomes `q_proj`."""
    labels = []
    for kind in kinds:
        parts = kind.split(".")
        endings = (".".join(parts[-n:]) for n in range(1, len(parts) + 1))
        labels.append(
            next(
                ending
                for ending in endings
                if ending == kind
                or not any(k == ending or k.endswith("." + ending) for k in kinds if k != kind)
            )
        )
    return labels


def stack_labels(stacks: Sequence[str]) -> dict[str, str]:
    """Stack names without what they share at either end; nothing where there is one stack."""
    if len(stacks) == 1:
        return {stacks[0]: ""}
    parts = [stack.split(".") for stack in stacks]
    shortest = min(len(part) for part in parts)
    head = 0
    while head < shortest and len({part[head] for part in parts}) == 1:
        head += 1
    tail = 0
    while tail < shortest - head and len({part[-1 - tail] for part in parts}) == 1:
        tail += 1
    return {
        stack: ".".join(part[head : len(part) - tail]) + " "
        for stack, part in zip(stacks, parts, strict=True)
    }
