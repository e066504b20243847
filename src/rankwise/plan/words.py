"""What a plan says of itself: a table, a verdict, its remainder, a block for a model card."""

from __future__ import annotations

import math
from collections.abc import Mapping

from rankwise.plan.rank_plan import RankPlan
from rankwise.tables import layer_table, make_table, markdown_layers, render
from rankwise.targets import layer_position


def table(plan: RankPlan) -> str:
    """Layers down, kinds of module across, then totals and the verdict."""
    title = f"{plan.method} for {plan.model or 'a model'}, alpha={plan.alpha:g}"
    lines = [totals(plan), verdict(plan)]
    if plan.adapter == "ralora":
        lines.insert(1, scales(plan))
    return layer_table(_cells(plan), title=title, caption="\n".join(lines))


def markdown(plan: RankPlan) -> str:
    """The same for a model card, with what the gradients were measured on."""
    lines = [
        f"### Adapter ranks: {plan.method}",
        "",
        f"{verdict(plan)} {_sentence(totals(plan))}",
        _sentence(scales(plan)),
    ]
    match plan.provenance.get("profile"):  # a plan that was written by hand may say less
        case {"model": model, "batches": batches, "tokens": int(tokens), "dtype": dtype}:
            lines.append(f"Measured on {model} over {batches} batches, {tokens:,} tokens, {dtype}.")
    return "\n".join([*lines, "", markdown_layers(_cells(plan))])


def totals(plan: RankPlan) -> str:
    """Modules, parameters, the budget, and why something is left of it."""
    text = f"{_modules(len(plan.modules))}, {plan.parameters:,} trainable parameters"
    if plan.budget is not None:
        text += f" of {plan.budget:,} ({remainder(plan)})"
    if plan.adapter == "lr-lora":
        text += ", and those of the functions f, 2 K a module, beside it"
    if plan.left_out:
        text += f"; {_modules(len(plan.left_out))} without an adapter"
    if plan.adapter == "ralora":
        counts = [module.blocks for module in plan.modules.values()]
        mean = sum(counts) / len(counts)
        text += f"; blocks: mean {mean:.1f}, min {min(counts)}, max {max(counts)}"
    return text


def scales(plan: RankPlan) -> str:
    """The factor in front of the updates; for blocks also how they are drawn."""
    numbers = f"with alpha = {plan.alpha:g} and r_ref = {plan.r_ref}"
    if plan.adapter == "ralora":
        return f"{plan.block_options}, {numbers}"
    return f"updates scaled by alpha / r_ref, {numbers}"


def remainder(plan: RankPlan) -> str:
    """What is left of the budget, and why."""
    left = (plan.budget or plan.parameters) - plan.parameters
    text = f"{left:,} left"
    if plan.next_rank is not None and left:
        text += f", less than the cheapest next rank, {plan.next_rank:,}"
    elif plan.full and left:
        text += ": every module has the largest rank allowed"
    if left and plan.next_rank is not None and plan.largest_total is not None:
        if plan.largest_total <= plan.parameters:
            text += "; no whole ranks within the bounds come closer"
        else:
            text += f"; ranks that take {plan.largest_total:,} exist, but serve the method less"
    return text


def verdict(plan: RankPlan) -> str:
    """One line: what the plan does, compared with uniform ranks of the same total."""
    ranks = {name: module.rank for name, module in plan.modules.items()}
    ranks |= dict.fromkeys(plan.left_out, 0)
    costs = {name: module.shape.rank_cost for name, module in plan.modules.items()}
    costs |= {name: shape.rank_cost for name, shape in plan.left_out.items()}
    even = plan.even_rank
    blocks = ", split into blocks" if any(m.blocks > 1 for m in plan.modules.values()) else ""
    if len(set(ranks.values())) == 1:
        return f"Verdict: the same rank in every module, as in plain LoRA{blocks}."
    uniform = f"r = {even:.3g} everywhere" if even >= 1 else "less than r = 1 everywhere"
    moved = math.fsum(max(rank - even, 0) * costs[name] for name, rank in ranks.items())
    text = (
        f"Verdict: {moved / plan.parameters:.0%} of the parameters are elsewhere than with uniform "
        f"ranks ({uniform}){_whereto(ranks)}{blocks}"
    )
    if plan.captured is not None and plan.captured_by_uniform is not None:
        text += (
            f"; updates of this size can hold {plan.captured:.1%} of the measured gradient energy, "
            f"uniform ones {plan.captured_by_uniform:.1%}"
        )
    return text + "."


def diff(before: RankPlan, after: RankPlan) -> str:
    """A table of the modules that two plans treat differently."""
    names = list(dict.fromkeys([*before.modules, *after.modules]))
    sides = [(name, _cell(before, name), _cell(after, name)) for name in names]
    rows = [side for side in sides if side[1] != side[2]]
    total = f"{before.parameters:,} -> {after.parameters:,} trainable parameters"
    if not rows:
        return f"the same adapters in all {len(names)} modules; {total}"
    changes = [_rank(after, name) - _rank(before, name) for name, _, _ in rows]
    up, down = sum(c > 0 for c in changes), sum(c < 0 for c in changes)
    caption = (
        f"{len(rows)} of {len(names)} modules differ: {up} get more rank, {down} less; {total}"
    )
    return render(make_table(["module", before.method, after.method], rows, caption=caption))


def _whereto(ranks: Mapping[str, int]) -> str:
    """The kind of module with the highest and the one with the lowest mean rank."""
    kinds: dict[str, list[int]] = {}
    for name, rank in ranks.items():
        kinds.setdefault(layer_position(name).kind, []).append(rank)
    means = {kind: sum(values) / len(values) for kind, values in kinds.items()}
    if len(set(means.values())) < 2:
        return f", from {min(ranks.values())} to {max(ranks.values())}"
    most, least = max(means, key=lambda k: means[k]), min(means, key=lambda k: means[k])
    high, low = f"{most} (mean {means[most]:.1f})", f"{least} ({means[least]:.1f})"
    return f": most rank for {high}, least for {low}"


def _cells(plan: RankPlan) -> dict[str, str]:
    return {name: _cell(plan, name) for name in plan.modules}


def _cell(plan: RankPlan, name: str) -> str:
    module = plan.modules.get(name)
    if module is None:
        return "none"
    return f"r={module.rank}" + (f" n={module.blocks}" if plan.adapter == "ralora" else "")


def _modules(count: int) -> str:
    return "1 module" if count == 1 else f"{count} modules"


def _rank(plan: RankPlan, name: str) -> int:
    return plan.modules[name].rank if name in plan.modules else 0


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."
