"""A rank plan as the report shows it, and what it takes to serve it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from rankwise.artifacts import SavedRun
from rankwise.errors import FileError
from rankwise.plan import RankPlan
from rankwise.profiling.profile import GradientProfile
from rankwise.records import RunRecord
from rankwise.report.profile_view import energy_held
from rankwise.report.views import ModuleAdapter, PlanView, Serving, Spread

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's `max_lora_rank` may be."""


def view_of_plan(plan: RankPlan, profiles: Sequence[GradientProfile] = ()) -> PlanView:
    """All that the report says of a plan; a profile of its model adds the energy it captures."""
    options = plan.provenance.get("options")
    modules = {
        name: ModuleAdapter(m.rank, m.blocks, m.rank * m.blocks, m.d_in, m.d_out, m.parameters)
        for name, m in plan.modules.items()
    }
    modules, captured = _captured(plan, modules, profiles)
    return PlanView(
        label=plan.method,
        method=plan.method,
        model=plan.model,
        model_fingerprint=plan.model_fingerprint,
        parameters=plan.parameters,
        ranks=Spread.of(m.rank for m in plan.modules.values()),
        blocks=Spread.of(m.blocks for m in plan.modules.values()),
        modules=modules,
        serving=serving(modules.values(), plan.adapter),
        even_rank=plan.even_rank,
        r_ref=plan.r_ref,
        alpha=plan.alpha,
        budget=plan.budget,
        used=None if plan.budget is None else plan.parameters / plan.budget,
        captured=captured,
        options=scalars(options, options) if isinstance(options, dict) else {},
    )


def plan_of_run(saved: SavedRun, profiles: Sequence[GradientProfile] = ()) -> PlanView:
    """The plan of a run; plans made without a profile do not know their model, the run does."""
    record = saved.record
    if saved.plan is None:
        return recorded_plan(record)
    named = replace(saved.plan, model=record.model, model_fingerprint=record.model_fingerprint)
    view = view_of_plan(named, profiles)
    if saved.plan.adapter != "lr-lora":
        return view
    # the plan's numbers are without the functions, the record's with them
    trained = record.trainable_parameters
    return replace(
        view,
        label=record.method,
        method=record.method,
        parameters=trained,
        used=None,
        even_rank=saved.plan.even_rank * trained / saved.plan.parameters,
    )


def recorded_plan(record: RunRecord) -> PlanView:
    """What a run record alone says of the adapters it trained.

    Raises:
        FileError: It names no adapted module.
    """
    if not record.ranks:
        raise FileError(f"the record of {record.method} names no adapted module; run it again.")
    blocks = {name: record.blocks.get(name, 1) for name in record.ranks}
    modules = {
        name: ModuleAdapter(rank, blocks[name], rank * blocks[name])
        for name, rank in record.ranks.items()
    }
    return PlanView(
        label=record.method,
        method=record.method,
        model=record.model,
        model_fingerprint=record.model_fingerprint,
        parameters=record.trainable_parameters,
        ranks=Spread.of(record.ranks.values()),
        blocks=Spread.of(blocks.values()),
        modules=modules,
        serving=serving(modules.values(), _recorded_adapter(record)),
    )


def _recorded_adapter(record: RunRecord) -> str:
    adapter = record.config.get("adapter")
    kind = adapter.get("kind") if isinstance(adapter, dict) else None
    if isinstance(kind, str):
        return kind
    return "ralora" if any(n > 1 for n in record.blocks.values()) else "lora"


def serving(modules: Iterable[ModuleAdapter], adapter: str) -> Serving:
    """What adapters of this kind need to be served as plain LoRA.

    n blocks count as rank n r; LR-LoRA has no low rank and is approximated or merged.
    """
    listed = list(modules)
    largest = max(module.reach for module in listed)
    sizes = [m.d_in + m.d_out for m in listed if m.d_in is not None and m.d_out is not None]
    return Serving(
        largest_rank=largest,
        uneven=len({module.reach for module in listed}) > 1,
        adapter=adapter,
        vllm_rank=next((rank for rank in VLLM_RANKS if rank >= largest), None),
        padded_parameters=largest * sum(sizes) if len(sizes) == len(listed) else None,
    )


def scalars(values: Mapping[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    """The named values that are text or finite numbers."""
    found = {key: values[key] for key in keys if key in values}
    return {
        key: value
        for key, value in found.items()
        if isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))
    }


def _captured(
    plan: RankPlan, modules: dict[str, ModuleAdapter], profiles: Sequence[GradientProfile]
) -> tuple[dict[str, ModuleAdapter], float | None]:
    """Captured energy of plain LoRA, by module and of all modules that were profiled.

    Blocks do not hold a matrix's leading directions, so a block-diagonal plan has no such number.
    """
    fitting = [p for p in profiles if _fits(plan, p)]
    own = [p for p in fitting if p.provenance.data_fingerprint == _measured_on(plan)]
    profile = next(iter(own or fitting), None)
    if profile is None or plan.adapter != "lora":
        return modules, None
    held = {name: energy_held(profile, name) for name in profile.modules}
    kept = {name: float(held[name][module.rank - 1]) for name, module in modules.items()}
    found = {
        name: replace(module, captured=kept[name] / float(held[name][-1]))
        if held[name][-1]
        else module
        for name, module in modules.items()
    }
    total = sum(float(energy[-1]) for energy in held.values())
    return found, sum(kept.values()) / total if total else None


def _measured_on(plan: RankPlan) -> object:
    """The fingerprint of the data that the plan's own profile was measured on, if it has one."""
    profile = plan.provenance.get("profile")
    return profile.get("data_fingerprint") if isinstance(profile, dict) else None


def _fits(plan: RankPlan, profile: GradientProfile) -> bool:
    known = profile.modules
    return plan.model_fingerprint in (None, profile.provenance.model_fingerprint) and all(
        name in known and known[name].shape == module.shape for name, module in plan.modules.items()
    )
