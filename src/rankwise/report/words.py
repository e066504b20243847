"""Numbers and findings in plain words."""

from __future__ import annotations

from collections.abc import Sequence

from rankwise.report.views import PlanView, ProfileView, Report, RunView, Spread, UpdateView

_EQUAL_SIZE = 0.01  # trainable parameters this close, relatively, count as equal
_NAMED_PLANS = 2  # more plans than this are summed up in one paragraph
_NAMED_RUNS = 4  # more runs than this are summed up by method


def whole(value: float) -> str:
    """A count with thousands separated: `4,884,480`."""
    return f"{value:,.0f}"


def loss(value: float) -> str:
    """A loss in nats per token, or another metric, to four decimals."""
    return f"{value:.4f}".replace("-", "−")


def percent(value: float) -> str:
    """A share as a percentage with three significant digits, `94.1 %`; never 100 % for less."""
    shown = f"{value:.1%}"
    if shown == "100.0%":
        shown = "100%" if value >= 1 else f"{min(value, 0.99999):.3%}"
    return shown.replace("%", " %")


def scientific(value: float) -> str:
    """Two significant digits with an exponent: `1.2e-06`."""
    return f"{value:.1e}"


def short(value: float) -> str:
    """Three significant digits without an exponent from 0.01 to 999,999: `312`, `31.2`."""
    magnitude = abs(value)
    if magnitude >= 999_999.5 or 0 < magnitude < 0.01:
        return f"{value:.2e}"
    for bound, digits in ((99.95, 0), (9.995, 1), (0.9995, 2)):
        if magnitude >= bound:
            return f"{value:,.{digits}f}"
    return f"{value:.3f}" if value else "0"


def joined(parts: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def takeaway(report: Report) -> list[str]:
    """What happened, in paragraphs computed from the numbers, claiming no more than they say."""
    if report.runs:
        words = [_losses(report.runs), *_sizes(report.runs), *_blocks(report.runs)]
        paragraphs = [" ".join(words)]
        return paragraphs + [_profile(profile) for profile in report.profiles]
    paragraphs = [_profile(profile) for profile in report.profiles]
    if len(report.plans) > _NAMED_PLANS:
        paragraphs.append(_plans(report.plans))
    else:
        paragraphs += [_plan(plan) for plan in report.plans]
    return paragraphs + [_update(update) for update in report.updates]


def caveats(report: Report) -> list[str]:
    """What these numbers cannot say, and what makes runs incomparable."""
    notes = []
    measured = [run for run in report.runs if run.held_out]
    if len({run.model_fingerprint for run in measured}) > 1:
        notes.append("The runs start from different base models, so their losses are no contest.")
    held_out = {(run.data.get("held_out"), run.held_out[0].tokens) for run in measured}
    if len(held_out) > 1:
        notes.append("The held-out text differs between runs, so their losses do not compare.")
    if len({run.steps for run in measured}) > 1:
        notes.append("The runs differ in their number of steps.")
    notes += _between_methods(measured)
    if len(measured) == 1:
        notes.append("One run with one seed: another seed gives somewhat other losses.")
    if report.profiles and not report.runs:
        fewest = min(profile.provenance["batches"] for profile in report.profiles)
        notes.append(
            f"GID depends on the number of batches N (here {fewest}), the batch size and "
            "the dtype: compare only profiles that share them."
        )
    return notes


def _between_methods(runs: Sequence[RunView]) -> list[str]:
    """What keeps a difference between methods from being one of the methods."""
    methods = {run.method for run in runs}
    if len(methods) < 2:
        return []
    seeds = [seeds_of(runs, method) for method in methods]
    if min(seeds) == 1:
        whose = "One seed each" if max(seeds) == 1 else "One seed for at least one method"
        notes = [
            f"{whose}: enough to see what each run did and how large it is, not to say which "
            "method is better. A difference between two single runs mixes the method "
            "with the luck of one seed."
        ]
    else:
        notes = [
            f"{min(seeds)} seeds or more per method, shown side by side; this page tests no "
            "difference between them."
        ]
    rates = {run.settings.get("learning_rate") for run in runs}
    if len(rates) == 1 and None not in rates:
        notes.append(
            f"All runs share the learning rate {rates.pop():g}, which need not be each "
            "method's best."
        )
    return notes


def next_step(report: Report) -> tuple[str, str]:
    """What to do next: a sentence, and a command or an empty string."""
    methods = {run.method for run in report.runs}
    if len(methods) > 1:
        return (
            "Next: repeat with other seeds and at each method's own best learning rate, then "
            "report all runs together. Every run's folder holds its run.yaml.",
            "rankwise train run.yaml seed=1 training.learning_rate=1e-3 output=runs/again",
        )
    if methods == {"full"}:
        return "Next: train an adapter from the same seed and report both runs.", _train("ralora")
    if methods == {"lora"}:
        sentence = "Next: train another adapter of this size from the same seed and report both."
        return sentence, _train("ralora", report.plans)
    if report.runs:
        sentence = "Next: train plain LoRA of this size from the same seed and report both runs."
        return sentence, _train("lora", report.plans)
    if report.plans:
        which = "this plan" if len(report.plans) == 1 else "one of these plans"
        return f"Next: train with {which}.", "rankwise train run.yaml plan=plan.json"
    if not report.profiles:
        return "Next: report it together with its run or its plan.", "rankwise report RUN ADAPTER"
    batches = [p.provenance["batches"] for p in report.profiles if _unsettled(p)]
    if batches:
        return (
            "Next: measure more batches, because the last ones still changed the dimensions.",
            f"rankwise profile MODEL DATA --batches {2 * max(batches)} --statistics convergence "
            "--out PROFILE",
        )
    return (
        "Next: turn the profile into a plan, and report both.",
        "rankwise plan PROFILE r=8 --out plan.json",
    )


def _train(method: str, plans: Sequence[PlanView] = ()) -> str:
    """The command that trains by another method, whatever else the run's file asks for."""
    options = f"name: {method}"
    plan = plans[0] if plans else None
    if plan is not None and plan.even_rank is not None and plan.alpha and plan.r_ref:
        r = max(1, round(plan.even_rank))
        options += f", r: {r}, alpha: {plan.alpha / plan.r_ref * r:g}"
    return (
        f"rankwise train run.yaml 'method={{{options}}}' 'adapter={{}}' dynamic=null plan=null "
        f"output=runs/{method}"
    )


def seeds_of(runs: Sequence[RunView], method: str) -> int:
    """How many seeds a method was run with."""
    return len({run.seed for run in runs if run.method == method})


def _losses(runs: Sequence[RunView]) -> str:
    measured = [run for run in runs if run.held_out]
    if not measured:
        return "No held-out loss was recorded."
    steps = {run.steps for run in measured}
    after = f"After {steps.pop():,} optimizer steps" if len(steps) == 1 else "After training"
    if len(measured) <= _NAMED_RUNS:
        changes = [
            f"from {loss(run.held_out[0].loss)} to {loss(run.held_out[-1].loss)} with {run.label}"
            for run in measured
        ]
        return f"{after}, held-out loss went {joined(changes)} (nats per token)."
    ranges = []
    for method in dict.fromkeys(run.method for run in measured):
        ends = [run.held_out[-1].loss for run in measured if run.method == method]
        ranges.append(f"{method} {loss(min(ends))} to {loss(max(ends))} ({len(ends)} runs)")
    return f"{after}, held-out loss ended at: {'; '.join(ranges)} (nats per token)."


def _sizes(runs: Sequence[RunView]) -> list[str]:
    sizes = [run.trainable_parameters for run in runs]
    if len(runs) == 1:
        return [f"It trains {whole(sizes[0])} parameters."]
    if min(sizes) == max(sizes):
        return [f"Every run trains {whole(sizes[0])} parameters."]
    span = f"{whole(min(sizes))} to {whole(max(sizes))}"
    if max(sizes) <= min(sizes) * (1 + _EQUAL_SIZE):
        return [f"The runs train {span} parameters, equal to within 1 %."]
    return [f"The runs train {span} parameters, so they are not of equal size."]


def _blocks(runs: Sequence[RunView]) -> list[str]:
    blocked: dict[str, list[Spread]] = {}
    for run in runs:
        if run.blocks and run.blocks.max > 1:
            blocked.setdefault(run.method, []).append(run.blocks)
    return [
        f"The gradients asked for {short(sum(b.mean for b in spreads) / len(spreads))} blocks per "
        f"module on average with {method} ({min(b.min for b in spreads):g} to "
        f"{max(b.max for b in spreads):g})."
        for method, spreads in blocked.items()
    ]


def _plan(plan: PlanView) -> str:
    words = (
        f"The {plan.label} plan adapts {len(plan.modules):,} modules with ranks "
        f"{plan.ranks.min:g} to {plan.ranks.max:g}"
        if plan.ranks.min < plan.ranks.max
        else f"The {plan.label} plan adapts {len(plan.modules):,} modules with rank "
        f"{plan.ranks.min:g} each"
    )
    if plan.blocks.max > 1:
        words += f" and {plan.blocks.min:g} to {plan.blocks.max:g} blocks"
    words += f": {whole(plan.parameters)} trainable parameters"
    return words + (f" of {whole(plan.budget)} allowed." if plan.budget is not None else ".")


def _plans(plans: Sequence[PlanView]) -> str:
    """All plans in one sentence."""
    sizes = [plan.parameters for plan in plans]
    low, high = min(sizes), max(sizes)
    span = whole(low) if low == high else f"{whole(low)} to {whole(high)}"
    ranks = [
        f"{plan.label} {plan.ranks.min:g}"
        + (f" to {plan.ranks.max:g}" if plan.ranks.max > plan.ranks.min else "")
        + (f" in up to {plan.blocks.max:g} blocks" if plan.blocks.max > 1 else "")
        for plan in plans
    ]
    return f"{len(plans)} plans of {span} trainable parameters give ranks: {'; '.join(ranks)}."


def _update(update: UpdateView) -> str:
    modules = update.modules.values()
    used = sum(module.update_stable_rank for module in modules) / len(modules)
    if update.kind == "lrlora":
        return (
            f"The learned updates of {update.label} use {short(used)} directions a module on "
            "average (stable rank); f(B·A) is not bound by the rank of B·A."
        )
    given = sum(module.reach for module in modules) / len(modules)
    return (
        f"The learned updates of {update.label} use {short(used)} directions a module on average "
        f"(stable rank) of the {short(given)} they were given."
    )


def _unsettled(profile: ProfileView) -> bool:
    return profile.convergence is not None and not profile.convergence.settled


def _profile(profile: ProfileView) -> str:
    words = (
        f"The gradients of {len(profile.modules):,} modules span {short(profile.gid.min)} to "
        f"{short(profile.gid.max)} dimensions (GID), {short(profile.gid.mean)} on average"
    )
    kinds = profile.gid_by_kind
    if 1 < len(kinds) < len(profile.modules):
        low = min(kinds, key=lambda kind: kinds[kind].mean)
        high = max(kinds, key=lambda kind: kinds[kind].mean)
        words += (
            f": fewest in {low} (mean {short(kinds[low].mean)}), most in {high} "
            f"(mean {short(kinds[high].mean)})"
        )
    if profile.curve is not None:
        chosen = next(p for p in profile.curve.points if p.r == profile.curve.recommended_r)
        words += (
            f". The best ranks in the budget of rank {chosen.r} already hold "
            f"{percent(chosen.water_fill)} of the gradient energy"
        )
    return words + "."
