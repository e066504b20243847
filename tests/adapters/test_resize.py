"""Growing keeps the function, shrinking loses exactly the discarded part, moments follow."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import Tensor

import rankwise as rw
from rankwise.adapters.factors import LoraFactors, lora_factors
from rankwise.adapters.resize import (
    allocate_slots_,
    compact_,
    gradient_directions,
    grow_,
    matching_factors,
    plan_with,
    random_directions,
    shrink_,
)
from rankwise.errors import DynamicError, PlanError
from rankwise.plan import RankPlan
from tiny_models import tiny_gpt2, tiny_llama, token_batch

RANK, SLOTS = 4, 8
TRAINERS: dict[str, Any] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True),
    "fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-1, momentum=0.9, weight_decay=0.1),
}
BY: tuple[Literal["svd", "norm"], ...] = ("svd", "norm")
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])


def masked(
    dtype: torch.dtype = torch.float64, architecture: Any = tiny_llama
) -> tuple[PeftModel, RankPlan]:
    base = architecture().to(dtype)
    plan = rw.Lora(r=RANK).plan(rw.find_targets(base))
    model = rw.attach(base, plan, fan_in_fan_out=architecture is tiny_gpt2).to(dtype)
    allocate_slots_(model, plan, dict.fromkeys(plan.modules, SLOTS))
    return model, plan


def trained(
    dtype: torch.dtype = torch.float64,
    make: Any = TRAINERS["adamw"],
    architecture: Any = tiny_llama,
) -> tuple[PeftModel, RankPlan, torch.optim.Optimizer]:
    model, plan = masked(dtype, architecture)
    optimizer = make([p for p in model.parameters() if p.requires_grad])
    train(model, optimizer, 4)
    return model, plan, optimizer


def train(model: PeftModel, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for seed in range(steps):
        optimizer.zero_grad()
        model(**token_batch([9, 6], seed=seed)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def logits(model: PeftModel) -> Tensor:
    with torch.no_grad():
        return model(**token_batch([9, 6], seed=99)).logits


def update(factors: LoraFactors) -> Tensor:
    return factors.scaling * factors.b.detach().double() @ factors.a.detach().double()


def directions(factors: LoraFactors, count: int, seed: int = 0) -> Tensor:
    return random_directions(count, factors.a.shape[1], torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("architecture", [tiny_llama, tiny_gpt2])
@dtypes
def test_slots_change_nothing(dtype: torch.dtype, architecture: Any) -> None:
    base = architecture().to(dtype)
    plan = rw.Lora(r=RANK).plan(rw.find_targets(base))
    model = rw.attach(base, plan, fan_in_fan_out=architecture is tiny_gpt2).to(dtype)
    for factors in lora_factors(model).values():
        torch.nn.init.normal_(factors.b)
    before = logits(model)
    allocate_slots_(model, plan, dict.fromkeys(plan.modules, SLOTS))
    assert (logits(model) - before).abs().max() < (1e-6 if dtype == torch.float32 else 1e-14)
    assert all(factors.slots == SLOTS for factors in lora_factors(model).values())


@pytest.mark.parametrize("name", list(TRAINERS))
def test_empty_slots_stay_empty_whatever_the_optimizer_does(name: str) -> None:
    model, _, optimizer = trained(make=TRAINERS[name])
    for factors in lora_factors(model).values():
        factors.check_empty(RANK, optimizer)
        assert factors.moments(optimizer)
        assert all(bool(m[:RANK].any()) for m in factors.moments(optimizer))
        assert factors.a.grad is not None and factors.b.grad is not None
        assert not factors.a.grad[RANK:].any() and not factors.b.grad[:, RANK:].any()


@dtypes
def test_growth_keeps_the_function_and_is_alive(dtype: torch.dtype) -> None:
    model, _, optimizer = trained(dtype)
    before = logits(model)
    for factors in lora_factors(model).values():
        grow_(factors, RANK, 6, directions(factors, 2), optimizer)
    assert (logits(model) - before).abs().max() <= (1e-6 if dtype == torch.float32 else 0.0)
    optimizer.zero_grad()
    model(**token_batch([9, 6], seed=5)).loss.backward()
    for factors in lora_factors(model).values():
        assert factors.b.grad is not None and bool(factors.b.grad[:, RANK:6].any(0).all())
        assert not any(bool(m[RANK:].any()) for m in factors.moments(optimizer))
    train(model, optimizer, 1)
    for factors in lora_factors(model).values():
        assert bool(factors.b[:, RANK:6].any(0).all())
        factors.check_empty(6, optimizer)


def test_random_directions_have_the_scale_of_lora_and_leave_the_global_generator() -> None:
    state = torch.random.get_rng_state()
    rows = random_directions(500, 400, torch.Generator().manual_seed(1))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert rows.abs().max() <= 1 / 20 and rows.std() == pytest.approx(1 / 20 / 3**0.5, rel=0.01)


def test_growth_along_the_gradient_goes_downhill_fastest() -> None:
    """The first step along the top directions lowers `<G, delta_W>` most."""
    gradient = torch.randn(12, 9, dtype=torch.float64)
    rows = gradient_directions(gradient, 2)
    assert torch.allclose(rows.norm(dim=1), torch.full((2,), 3**-0.5, dtype=torch.float64))

    def descent(a: Tensor) -> float:
        b = -gradient @ a.T  # what one gradient step makes of B = 0
        return float((gradient * (b @ a)).sum())

    sigma = torch.linalg.svdvals(gradient)
    assert descent(rows) == pytest.approx(-float(sigma[:2].square().sum()) / 3)
    other = torch.linalg.qr(torch.randn(9, 2, dtype=torch.float64)).Q.T / 3**0.5
    assert descent(rows) < descent(other) < 0


@pytest.mark.parametrize("architecture", [tiny_llama, tiny_gpt2])
def test_svd_shrinkage_is_the_truncated_svd(architecture: Any) -> None:
    model, _, optimizer = trained(architecture=architecture)
    for factors in lora_factors(model).values():
        before = update(factors)
        u, s, vh = torch.linalg.svd(before)
        lost = shrink_(factors, RANK, 2, "svd", optimizer)
        best = u[:, :2] * s[:2] @ vh[:2]
        assert torch.allclose(update(factors), best, atol=1e-12)
        assert lost.discarded == pytest.approx(float(s[2:].square().sum()), rel=1e-9)
        assert lost.total == pytest.approx(float(s.square().sum()), rel=1e-9)
        difference = torch.linalg.svdvals(before - update(factors))
        assert torch.allclose(difference[:2], s[2:4], atol=1e-12)
        factors.check_empty(2, optimizer)
        assert lost.moments == "reset"
        assert not any(bool(m.any()) for m in factors.moments(optimizer))


def test_svd_shrinkage_in_fp32_changes_the_update_by_the_discarded_values() -> None:
    model, _, optimizer = trained(torch.float32)
    for factors in lora_factors(model).values():
        before = update(factors)
        lost = shrink_(factors, RANK, 2, "svd", optimizer)
        change = float((before - update(factors)).square().sum())
        assert change == pytest.approx(lost.discarded, rel=1e-4, abs=1e-12)


def test_norm_shrinkage_keeps_slots_and_their_moments() -> None:
    model, _, optimizer = trained()
    for factors in lora_factors(model).values():
        before = update(factors)
        weight = factors.a.norm(dim=1) * factors.b.norm(dim=0)
        kept = sorted(weight[:RANK].argsort(descending=True)[:2].tolist())
        expected = [view[kept].clone() for view in factors.rows(optimizer)]
        lost = shrink_(factors, RANK, 2, "norm", optimizer)
        for view, old in zip(factors.rows(optimizer), expected, strict=True):
            assert torch.equal(view[:2], old)
        factors.check_empty(2, optimizer)
        assert lost.moments == "kept"
        assert lost.discarded == pytest.approx(float((before - update(factors)).square().sum()))
        assert lost.total == pytest.approx(float(before.square().sum()))


def test_norm_shrinkage_drops_later_slots_among_equals() -> None:
    model, _ = masked()
    factors = next(iter(lora_factors(model).values()))
    first = factors.a.detach()[:2].clone()
    shrink_(factors, RANK, 2, "norm")  # B = 0: every weight is 0
    assert torch.equal(factors.a.detach()[:2], first)


@pytest.mark.parametrize("by", BY)
def test_shrinking_an_untrained_adapter_leaves_it_alive(by: Literal["svd", "norm"]) -> None:
    model, _ = masked()
    for factors in lora_factors(model).values():
        lost = shrink_(factors, RANK, 2, by)
        assert lost.discarded == lost.total == 0
        assert bool(factors.a[:2].any(1).all())
    model(**token_batch([9, 6])).loss.backward()
    for factors in lora_factors(model).values():
        assert factors.b.grad is not None and bool(factors.b.grad[:, :2].any(0).all())


@pytest.mark.parametrize("by", BY)
def test_shrinking_to_nothing_loses_everything(by: Literal["svd", "norm"]) -> None:
    model, _, optimizer = trained()
    factors = next(iter(lora_factors(model).values()))
    lost = shrink_(factors, RANK, 0, by, optimizer)
    assert lost.discarded == pytest.approx(lost.total) and lost.total > 0
    factors.check_empty(0, optimizer)


@pytest.mark.parametrize("name", list(TRAINERS))
def test_a_physical_change_keeps_parameters_moments_and_step_counts(name: str) -> None:
    model, plan, optimizer = trained(make=TRAINERS[name])
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    before = {
        n: [v[:RANK].clone() for v in f.rows(optimizer)] for n, f in lora_factors(model).items()
    }
    steps = [s["step"].clone() for s in optimizer.state.values() if "step" in s]
    loss = model(**token_batch([9, 6])).loss  # its graph is still alive at the next backward
    loss.backward()
    for slots in (RANK, 7):
        allocate_slots_(model, plan, dict.fromkeys(plan.modules, slots), optimizer=optimizer)
        assert held == {id(p) for p in model.parameters() if p.requires_grad}
        for n, factors in lora_factors(model).items():
            assert factors.a.grad is None and factors.b.grad is None
            views = factors.rows(optimizer)
            assert all(len(view) == slots for view in views)
            assert all(map(torch.equal, [v[:RANK] for v in views], before[n]))
            factors.check_empty(RANK, optimizer)
    assert all(
        map(torch.equal, steps, [s["step"] for s in optimizer.state.values() if "step" in s])
    )
    train(model, optimizer, 2)


def test_slots_in_use_are_not_cut_off() -> None:
    model, plan, optimizer = trained()
    with pytest.raises(DynamicError, match="a slot beyond its rank 2 is not empty"):
        allocate_slots_(model, plan, dict.fromkeys(plan.modules, 2), optimizer=optimizer)
    assert all(factors.slots == SLOTS for factors in lora_factors(model).values())


def test_an_optimizer_whose_state_has_no_rows_is_refused() -> None:
    model, _ = masked(torch.float32)
    optimizer = torch.optim.Adafactor([p for p in model.parameters() if p.requires_grad])
    train(model, optimizer, 1)
    factors = next(iter(lora_factors(model).values()))
    before = [p.detach().clone() for p in (factors.a, factors.b)]
    with pytest.raises(DynamicError, match=r"'row_var' as torch.float32 .* Use an optimizer with"):
        shrink_(factors, RANK, 2, "norm", optimizer)
    assert torch.equal(before[0], factors.a) and torch.equal(before[1], factors.b)


def test_compaction_ends_as_plain_lora(tmp_path: Path) -> None:
    model, plan, optimizer = trained()
    ranks = {name: i % 3 for i, name in enumerate(plan.modules)}  # 0, 1 and 2
    for name, factors in lora_factors(model).items():
        shrink_(factors, RANK, ranks[name], "svd", optimizer)
    now = plan_with(plan, ranks, budget=None)
    before = logits(model)
    assert compact_(model, now) is model
    assert torch.allclose(logits(model), before, atol=1e-12)
    kept = {name: rank for name, rank in ranks.items() if rank}
    assert {n: f.slots for n, f in lora_factors(model).items()} == kept
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trainable == now.parameters

    config = model.peft_config["default"]
    expected = now.to_lora_config()
    assert type(config) is LoraConfig
    for field in ("r", "lora_alpha", "rank_pattern", "alpha_pattern"):
        assert getattr(config, field) == getattr(expected, field)
    model.save_pretrained(str(tmp_path))
    again = PeftModel.from_pretrained(tiny_llama().double(), str(tmp_path)).double()
    assert {n: f.slots for n, f in lora_factors(again).items()} == kept
    assert torch.equal(logits(again), logits(model))


def test_compaction_leaves_other_adapters_alone() -> None:
    model, plan = masked()
    model.add_adapter("other", plan.to_lora_config())
    now = plan_with(plan, {n: RANK * (i > 0) for i, n in enumerate(plan.modules)}, budget=None)
    first = lora_factors(model)[next(iter(plan.modules))]
    with torch.no_grad():
        first.a.zero_()
    compact_(model, now)
    assert len(lora_factors(model)) == len(plan.modules) - 1
    assert len(lora_factors(model, "other")) == len(plan.modules)


def test_masked_adapters_are_saved_as_plain_lora_at_any_time(tmp_path: Path) -> None:
    model, _, _ = trained()
    model.save_pretrained(str(tmp_path))
    again = PeftModel.from_pretrained(tiny_llama().double(), str(tmp_path)).double()
    assert torch.allclose(logits(again), logits(model), atol=1e-12)


def test_adapters_that_are_not_plain_lora_are_refused() -> None:
    targets = ["q_proj"]
    dora = rw.attach(tiny_llama(), rw.Lora().plan(rw.find_targets(tiny_llama())), use_dora=True)
    with pytest.raises(PlanError, match="a LoRA variant"):
        lora_factors(dora)
    with pytest.raises(PlanError, match="adapter 'none' of this model is NoneType"):
        lora_factors(dora, "none")
    config = rw.RaLoraConfig(r=4, target_modules=targets)
    with pytest.raises(PlanError, match="RaLoraConfig; only plain LoRA"):
        lora_factors(PeftModel(tiny_llama(), config))


def test_a_plan_for_other_adapters_is_refused() -> None:
    model, plan = masked()
    fewer = plan_with(plan, {n: RANK * (i > 0) for i, n in enumerate(plan.modules)}, budget=None)
    with pytest.raises(PlanError, match=r"layers.0.self_attn.q_proj is only in the model"):
        matching_factors(model, fewer, "default")
    base = tiny_llama()
    scaled = rw.Lora(r=RANK, alpha=1).plan(rw.find_targets(base))
    with pytest.raises(PlanError, match=r"is scaled by 4.0 and the plan says 0.25"):
        matching_factors(model, scaled, "default")
