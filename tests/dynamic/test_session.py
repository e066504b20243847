"""Dynamic ranks in a plain training loop."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import rankwise as rw
from dynamic_runs import WATER, adamw, attached, plain_run
from rankwise.adapters.factors import lora_factors
from rankwise.dynamic import DynamicRanks
from rankwise.dynamic.estimates import default_method
from rankwise.dynamic.window import Window
from rankwise.errors import DynamicError, PlanError
from tiny_models import synthetic_profile, token_batch

METHODS = [WATER, rw.Gard(r=4, r_max=8), rw.LsLora(r=4), rw.Compose(r=4, r_max=8)]
by_and_along = pytest.mark.parametrize(
    ("shrink_by", "grow_along"), [("svd", "random"), ("norm", "gradient")]
)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
@by_and_along
def test_masked_and_resized_runs_are_the_same(method: Any, shrink_by: str, grow_along: str) -> None:
    options = {
        "method": method,
        "shrink_by": shrink_by,
        "grow_along": grow_along,
    }
    masked, losses, ranks = plain_run(**options)
    resized, other_losses, other_ranks = plain_run(mode="resize", **options)
    assert ranks == other_ranks and any(now != ranks[0] for now in ranks)
    assert losses == pytest.approx(other_losses, abs=1e-5)
    slots = {n: f.slots for n, f in lora_factors(resized.model).items()}
    assert slots == resized.state.ranks
    assert {f.slots for f in lora_factors(masked.model).values()} == {8}
    left, right = masked.compact(), resized.compact()
    for (name, one), (other, two) in zip(
        left.named_parameters(), right.named_parameters(), strict=True
    ):
        assert name == other and one.shape == two.shape
        assert (one - two).abs().max() < 1e-5


@pytest.mark.parametrize(
    "make",
    [
        lambda m: torch.optim.SGD(
            [p for p in m.parameters() if p.requires_grad], lr=0.1, momentum=0.9
        ),
        lambda m: adamw(m, fused=True),
        lambda m: adamw(m, foreach=True, weight_decay=0.1),
    ],
    ids=["sgd", "fused", "foreach"],
)
def test_budget_holds_at_every_step_with_any_plain_optimizer(make: Any) -> None:
    ranks, losses, seen = plain_run(12, interval=4, make_optimizer=make)
    costs = ranks.controller.costs
    assert all(sum(r * costs[n] for n, r in now.items()) <= ranks.controller.budget for now in seen)
    assert [event.step for event in ranks.events] == [4, 8, 12]
    assert any(move.before != move.after for event in ranks.events for move in event.moves)
    for name, factors in lora_factors(ranks.model).items():
        factors.check_empty(ranks.state.ranks[name], ranks._optimizer)
    assert all(map(torch.isfinite, map(torch.tensor, losses)))


def test_the_function_is_continuous_at_growth() -> None:
    """Events that only grow (the budget has slack) change no logit."""
    model, plan = attached()
    optimizer = adamw(model)
    roomy = replace(plan, budget=2 * plan.parameters)
    ranks = DynamicRanks(model, roomy, WATER, rw.DynamicOptions(interval=2), optimizer=optimizer)
    for step in range(6):
        with ranks.observe():
            model(**token_batch([9, 6], seed=step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            before = model(**token_batch([9, 6], seed=99)).logits
        event = ranks.step()
        with torch.no_grad():
            after = model(**token_batch([9, 6], seed=99)).logits
        grown = [m for m in event.moves if m.after > m.before] if event else []
        if event and len(grown) == len(event.moves):
            assert torch.equal(before, after)
    assert sum(m.after - m.before for e in ranks.events for m in e.moves) > 0


def full_gradients(batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Mean `dL/dW` of the base weights by autograd, on the adapted model."""
    model, plan = attached(dtype=torch.float64)
    weights = {n: model.get_base_model().get_submodule(n).base_layer.weight for n in plan.modules}
    for weight in weights.values():
        weight.requires_grad_(True)
    for batch in batches:
        model(**batch).loss.backward()
    return {name: weight.grad / len(batches) for name, weight in weights.items()}


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["plain", "reentrant", "not"])
def test_the_window_measures_the_gradient_of_the_frozen_weights(checkpointing: bool | None) -> None:
    batches = [token_batch([9, 6], seed=i) for i in range(3)]
    expected = full_gradients(batches)
    model, plan = attached(dtype=torch.float64)
    if checkpointing is not None:
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
        model.train()
    shapes = {name: m.shape for name, m in plan.modules.items()}
    window = Window(model.get_base_model(), shapes, ("mean",))
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    for batch in batches:
        window.begin_batch()
        model(**batch).loss.backward()
        window.end_batch()
    window.close()
    assert {n: p.requires_grad for n, p in model.named_parameters()} == before
    assert all(not m._forward_hooks for n, m in model.named_modules() if n.endswith("base_layer"))
    profile = window.finish("tiny")
    assert profile is not None and profile.gradients is not None
    for name, gradient in profile.gradients.items():
        assert torch.allclose(gradient, expected[name], rtol=1e-9, atol=1e-12)


def test_measuring_does_not_change_training() -> None:
    """A run whose events all come after its end has the same losses, measured or not."""
    _, measured, _ = plain_run(6, interval=100, window=100)
    _, plain, _ = plain_run(6, interval=100, window=1)
    assert measured == plain


def test_batches_are_measured_only_before_an_event() -> None:
    model, plan = attached()
    optimizer = adamw(model)
    options = rw.DynamicOptions(interval=6, window=2, warmup=6)
    ranks = DynamicRanks(model, plan, WATER, options, optimizer=optimizer)
    counts = []
    for step in range(12):
        with ranks.observe():
            model(**token_batch([5], seed=step)).loss.backward()
        counts.append(ranks.window.batches)
        optimizer.step()
        ranks.step()
    assert counts == [0] * 10 + [1, 2]
    assert [event.batches for event in ranks.events] == [2]


def test_gradient_accumulation_measures_every_batch_of_the_last_steps() -> None:
    ranks, _, _ = plain_run(5, accumulation=3)
    assert [event.batches for event in ranks.events] == [9]


def test_an_event_in_the_middle_of_accumulation_waits_for_the_step() -> None:
    model, plan = attached()
    optimizer = adamw(model)
    options = rw.DynamicOptions(interval=2)
    ranks = DynamicRanks(model, plan, WATER, options, optimizer=optimizer)

    def batch(seed: int) -> None:
        with ranks.observe():
            model(**token_batch([9, 6], seed=seed)).loss.backward()

    for seed in range(2):
        batch(seed)
        assert ranks.step() is None  # no optimizer step yet
        optimizer.step()
    batch(2)  # the next accumulation has begun: gradients are being collected
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert ranks.step() is None
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or torch.equal(parameter.grad, gradients[name])
    optimizer.step()
    event = ranks.step()
    assert event is not None and event.moves
    assert ranks.step() is None


def test_a_step_that_a_loss_scaler_skips_moves_nothing() -> None:
    model, plan = attached()
    optimizer = adamw(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    ranks = DynamicRanks(model, plan, WATER, rw.DynamicOptions(interval=1), optimizer=optimizer)
    with ranks.observe():
        (scaler.scale(model(**token_batch([9, 6])).loss) * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    assert ranks.step() is None
    assert ranks.steps == 0 and not ranks.state.averages and not ranks.events
    optimizer.zero_grad()
    with ranks.observe():
        scaler.scale(model(**token_batch([9, 6])).loss).backward()
    scaler.step(optimizer)
    event = ranks.step()
    assert event is not None and event.batches == 1 and event.dropped == 1


@pytest.mark.parametrize("fused", [False, True])
def test_a_skipped_step_brings_no_event(fused: bool) -> None:
    model, plan = attached()
    optimizer = adamw(model, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    options = rw.DynamicOptions(interval=2, window=2)
    ranks = DynamicRanks(model, plan, WATER, options, optimizer=optimizer)
    counted = []
    for step in range(4):
        with ranks.observe():
            scaler.scale(model(**token_batch([9, 6], seed=step)).loss).backward()
        if step == 1:
            next(p.grad for p in model.parameters() if p.grad is not None).fill_(float("inf"))
        before = [p.detach().clone() for p in model.parameters()]
        scaler.step(optimizer)
        scaler.update()
        moved = any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        assert moved == (step != 1)
        counted.append((ranks.steps, ranks.step() is not None))
        optimizer.zero_grad()
    assert counted == [(1, False), (1, False), (2, True), (3, False)]


def test_a_step_counts_once_however_often_its_optimizer_was_shown() -> None:
    model, plan = attached()
    optimizer = adamw(model)
    ranks = DynamicRanks(model, plan, WATER, optimizer=optimizer)
    ranks.begin_batch()  # one that is not brought to an end, as where memory runs out
    ranks.watch(optimizer)
    other = adamw(model)
    ranks.watch(other)
    for stepping in (optimizer, other):
        with ranks.observe():
            model(**token_batch([9, 6])).loss.backward()
        stepping.step()
    assert ranks.steps == 1


def test_an_optimizer_that_keeps_another_iterate_is_refused() -> None:
    model, plan = attached()
    optimizer = torch.optim.ASGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    options = rw.DynamicOptions(interval=1)
    ranks = DynamicRanks(model, plan, WATER, options, optimizer=optimizer)
    with ranks.observe():
        model(**token_batch([9, 6])).loss.backward()
    optimizer.step()
    with pytest.raises(DynamicError, match="keeps 'ax' of every parameter, which may be no moment"):
        ranks.step()


def test_a_window_without_a_finite_batch_keeps_every_rank_and_says_so() -> None:
    model, plan = attached()
    optimizer = adamw(model, lr=0.0)
    ranks = DynamicRanks(model, plan, WATER, rw.DynamicOptions(interval=2), optimizer=optimizer)
    before = dict(ranks.state.ranks)
    for _ in range(2):
        with ranks.observe():
            (model(**token_batch([9, 6])).loss * float("nan")).backward()
        optimizer.zero_grad()
        optimizer.step()
        event = ranks.step()
    assert event is not None and event.batches == 0 and event.dropped == 2
    assert ranks.state.ranks == before and not ranks.state.averages
    assert {move.module for move in event.moves} == set(before)
    assert "no batch of the window is finite" in event.moves[0].reason


def test_a_layer_without_a_gradient_keeps_its_rank_and_is_flagged() -> None:
    model, plan = attached()
    optimizer = adamw(model)
    unused = next(name for name in plan.modules if name.endswith("o_proj"))
    layer = model.get_base_model().get_submodule(unused)
    layer.register_forward_hook(lambda *_: _[-1].detach() * 0)
    ranks = DynamicRanks(model, plan, WATER, rw.DynamicOptions(interval=2), optimizer=optimizer)
    for seed in range(2):
        with ranks.observe():
            model(**token_batch([9, 6], seed=seed)).loss.backward()
        optimizer.step()
        event = ranks.step()
    assert event is not None
    flagged = {move.module: move for move in event.moves if move.before == move.after}
    assert flagged[unused].reason == "kept: its gradient is zero"
    assert ranks.state.ranks[unused] == 4 and event.used <= event.budget


def test_what_writes_to_an_empty_slot_is_caught_at_the_next_event() -> None:
    model, plan = attached()
    optimizer = adamw(model)
    ranks = DynamicRanks(model, plan, WATER, rw.DynamicOptions(interval=1), optimizer=optimizer)
    with ranks.observe():
        model(**token_batch([9, 6])).loss.backward()
    optimizer.step()
    factors = next(iter(lora_factors(model).values()))
    with torch.no_grad():
        factors.a[7] = 1.0
    with pytest.raises(DynamicError, match=r"q_proj: a slot beyond its rank 4 is not empty"):
        ranks.step()


def test_freeze_ends_events() -> None:
    ranks, _, seen = plain_run(10, interval=3, freeze_after=6)
    assert [event.step for event in ranks.events] == [3, 6]
    assert seen[5] == seen[-1]


def test_every_event_is_recorded() -> None:
    ranks, _, seen = plain_run(10)
    before = dict.fromkeys(seen[0], 4)
    for event, after in zip(ranks.events, [seen[4], seen[9]], strict=True):
        moves = {m.module: (m.before, m.after) for m in event.moves}
        assert moves == {n: (before[n], r) for n, r in after.items() if r != before[n]}
        assert event.used == sum(r * ranks.controller.costs[n] for n, r in after.items())
        for move in event.moves:
            assert "of all estimates" in move.reason
            assert (move.discarded > 0) == (move.after < move.before)
            assert move.discarded <= move.total or move.total == 0
            assert move.moments == ("reset" if move.after < move.before else "kept")
        before = after
    scalars = ranks.scalars()
    assert {n: scalars[f"rank/{n}"] for n in before} == before
    assert scalars["rank_event/active_parameters"] == ranks.plan.parameters
    assert "grew" in str(ranks.events[0])


def test_the_plan_is_the_present_ranks() -> None:
    ranks, _, seen = plain_run(10)
    assert {n: m.rank for n, m in ranks.plan.modules.items()} == seen[-1]
    assert ranks.plan.parameters <= ranks.controller.budget == ranks.plan.budget


def test_unknown_modes_and_optimizers_are_refused() -> None:
    model, plan = attached()
    with pytest.raises(PlanError, match="mode='elastic'"):
        DynamicRanks(model, plan, WATER, mode="elastic")  # type: ignore[arg-type]
    ranks = DynamicRanks(model, plan, WATER)
    with pytest.raises(DynamicError, match="no optimizer is watched"):
        ranks.step()
    with pytest.raises(DynamicError, match="optimizer is a int"):
        ranks.watch(3)  # type: ignore[arg-type]


def test_the_default_method_is_gard_between_one_and_twice_the_rank() -> None:
    model, plan = attached()
    assert DynamicRanks(model, plan).method == rw.Gard(r=4, r_max=8)


def test_a_budget_in_words_leaves_room_to_move() -> None:
    profile = synthetic_profile({name: (64, 64) for name in "abcd"})
    plan = rw.Compose(rule="uniform", r=2, budget="r=16").plan(profile)
    assert default_method(plan) == rw.Gard(r=2, r_max=32)
