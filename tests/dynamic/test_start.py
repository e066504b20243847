"""What a run of moving ranks takes over from its method and plan, and what not."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import rankwise as rw
from batch_reference import measure, model_and_batches
from dynamic_runs import WATER, adamw, attached
from rankwise.dynamic import DynamicRanks
from rankwise.dynamic.saved import read_saved
from rankwise.errors import DynamicError, PlanError
from rankwise.methods import Method
from rankwise.plan import RankPlan
from rankwise.profiling import GradientProfile
from tiny_models import token_batch


@pytest.fixture(scope="module", name="profile")
def profile_fixture() -> GradientProfile:
    return measure(*model_and_batches("llama"), statistics=("mean", "gram"))


def started(plan: RankPlan, method: Method, **options: Any) -> DynamicRanks:
    model, _ = model_and_batches("llama")
    adapted = rw.attach(model, plan, allow_other_base=True)
    chosen = rw.DynamicOptions(**({"interval": 1} | options))
    return DynamicRanks(adapted, plan, method, chosen, optimizer=adamw(adapted))


def moved(ranks: DynamicRanks, steps: int = 3) -> set[str]:
    """Train, and return the modules whose rank has moved."""
    for step in range(steps):
        with ranks.observe():
            ranks.model(**token_batch([9, 6], seed=step)).loss.backward()
        assert ranks._optimizer is not None
        ranks._optimizer.step()
        ranks.step()
        ranks._optimizer.zero_grad()
    return {m.module for event in ranks.events for m in event.moves if m.before != m.after}


@pytest.mark.parametrize(
    "method",
    [
        rw.LsLora(budget="r=6"),
        rw.LsLora(budget="r=2"),
        rw.Gard(r=1, budget="r=6"),
        rw.WaterFill(r=1, budget="r=6"),
        rw.Compose(budget="r=2"),
    ],
    ids=str,
)
def test_bounds_are_those_of_the_budget(method: Method, profile: GradientProfile) -> None:
    plan = method.plan(profile)
    ranks = started(plan, method)
    static = method.limits_for(  # type: ignore[attr-defined]
        {n: m.shape for n, m in profile.modules.items()}, plan.budget
    )
    assert ranks.controller.limits == {name: static[name] for name in plan.modules}
    assert moved(ranks)


def test_ranks_that_are_fixed_or_boxed_stay_so(profile: GradientProfile) -> None:
    fixed = rw.WaterFill(r=4, r_min=0, fixed={"q_proj": 2, "k_proj": 0})
    plan = fixed.plan(profile)
    ranks = started(plan, fixed)
    changed = moved(ranks, 4)
    assert changed and not any(name.endswith("q_proj") for name in changed)
    now = ranks.plan
    assert {m.rank for name, m in now.modules.items() if name.endswith("q_proj")} == {2}
    assert any(name.endswith("k_proj") for name in now.left_out)

    boxed = rw.Gard(r=4, around=rw.Lora(r=4).plan(profile), delta=1)
    ranks = started(boxed.plan(profile), boxed)
    assert moved(ranks, 4)
    assert {m.rank for m in ranks.plan.modules.values()} <= {3, 4, 5}


def test_a_plan_outside_of_what_is_fixed_is_refused(profile: GradientProfile) -> None:
    with pytest.raises(PlanError, match=r"q_proj rank 4, outside \[2, 2\]"):
        started(rw.Lora(r=4).plan(profile), rw.WaterFill(r=4, fixed={"q_proj": 2}))


def test_the_final_plan_states_no_facts_of_the_first(profile: GradientProfile) -> None:
    method = rw.WaterFill(r=2, r_min=0)
    plan = method.plan(profile)
    assert plan.captured is not None
    ranks = started(plan, method, delta_max=3)
    assert ranks.plan.captured == plan.captured, "nothing has moved yet"
    before = dict(ranks.state.ranks)
    assert moved(ranks, 6)
    now = ranks.plan
    assert (now.captured, now.captured_by_uniform, now.next_rank) == (None, None, None)
    assert (now.full, now.largest_total) == (False, None)
    empty = {name for name in before if not ranks.state.ranks[name]}
    assert set(now.left_out) == set(plan.left_out) | empty
    assert set(now.modules) | set(now.left_out) == set(profile.modules)


def test_when_a_plan_was_measured_does_not_matter_for_a_resume(profile: GradientProfile) -> None:
    """The checkpoint's plan is compared by what decides, also where all of it was kept."""
    method = rw.Gard(r=4, r_max=8)
    later = replace(profile, provenance=replace(profile.provenance, seconds=99.0))
    first, second = method.plan(profile), method.plan(later)
    assert asdict(first) != asdict(second)
    saved = started(first, method).saved()
    document = json.loads(json.dumps(asdict(saved)))
    started(second, method).restore(saved, {})
    document["settings"]["plan"] = json.loads(json.dumps(asdict(first)))  # as version 0.1 had it
    started(second, method).restore(read_saved(document, "p"), {})  # type: ignore[arg-type]
    other = replace(first, alpha=first.alpha * 2)
    with pytest.raises(DynamicError, match="made with another plan"):
        started(other, method).restore(saved, {})


class _Scaler:
    def __init__(self, *scales: float) -> None:
        self._scales = list(scales)

    def get_scale(self) -> float:
        return self._scales[0]

    def update(self) -> None:
        self._scales.pop(0)


@pytest.mark.parametrize("given", ["by the caller", "in a wrapper"])
@pytest.mark.parametrize("method", [WATER, rw.Gard(r=4, r_max=8)], ids=lambda m: m.name)
def test_the_scale_of_the_loss_is_taken_out(method: Method, given: str) -> None:
    """Whatever a loss scaler does inside a window, what is measured is the same."""

    def averages(scales: list[float]) -> dict[str, list[float]]:
        model, plan = attached(dtype=torch.float64)
        optimizer, scaler = adamw(model), _Scaler(*scales)
        ranks = DynamicRanks(model, plan, method, rw.DynamicOptions(interval=3))
        if given == "by the caller":
            ranks.watch(optimizer, scaler)
        else:
            ranks.watch(type("Wrapper", (), {"optimizer": optimizer, "scaler": scaler})())
        for step, scale in enumerate(scales):
            with ranks.observe():
                (model(**token_batch([9, 6], seed=step)).loss * scale).backward()
            for p in model.parameters():
                p.grad = None if p.grad is None else p.grad / scale
            optimizer.step()
            scaler.update()
            ranks.step()
            optimizer.zero_grad()
        assert len(ranks.events) == 1 and ranks.events[0].batches == 3
        return ranks.state.averages

    plain, scaled = averages([1.0, 1.0, 1.0]), averages([2.0**16, 2.0**8, 2.0**17])
    for name, values in plain.items():
        torch.testing.assert_close(_wide(scaled[name]), _wide(values), rtol=1e-9, atol=0)


def _wide(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)
