"""The controller is pure: budgets, boxes and averages hold for any numbers that come in."""

from __future__ import annotations

import json
import math
from dataclasses import asdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from rankwise.dynamic import ControllerState, DynamicOptions, RankController, Rule
from rankwise.errors import PlanError
from rankwise.plan import ModulePlan, RankPlan
from rankwise.targets import LinearShape

SHAPES = {"a": LinearShape(10, 10), "b": LinearShape(10, 10), "c": LinearShape(10, 10)}
PROPORTIONAL = Rule("proportional", (1, 8))


def uniform_plan(shapes: dict[str, LinearShape], rank: int, budget: int | None = None) -> RankPlan:
    modules = {n: ModulePlan(d_in=s.d_in, d_out=s.d_out, rank=rank) for n, s in shapes.items()}
    return RankPlan("test", "lora", rank, 16.0, budget, modules)


def controller(rule: Rule = PROPORTIONAL, budget: int = 240, **options: object) -> RankController:
    return RankController(rule, SHAPES, budget, DynamicOptions(**options))  # type: ignore[arg-type]


def most_reachable(box: dict[str, tuple[int, int]], costs: dict[str, int], budget: int) -> int:
    """The largest sum of costs up to the budget with every rank in its box, by brute force."""
    sums = 1  # bit s is set if s parameters are reachable
    for name, (low, high) in box.items():
        choices = 0
        for rank in range(low, high + 1):
            choices |= sums << (rank * costs[name])
        sums = choices
    return (sums & ((1 << (budget + 1)) - 1)).bit_length() - 1


@st.composite
def event_sequences(
    draw: st.DrawFn,
) -> tuple[RankController, RankPlan, list[dict[str, list[float]]]]:
    count = draw(st.integers(1, 5))
    side = st.integers(2, 40)
    shapes = {f"m{i}": LinearShape(draw(side), draw(side)) for i in range(count)}
    r_max = draw(st.integers(1, 8))
    rank = draw(st.integers(1, min([r_max, *(s.max_rank for s in shapes.values())])))
    low = draw(st.integers(0, rank))
    kind = draw(st.sampled_from(["proportional", "water-fill"]))
    rule = Rule(kind, (low, r_max), draw(st.sampled_from(["floor", "nearest"])), offset=low)
    plan = uniform_plan(shapes, rank)
    slack = draw(st.integers(0, 100))
    options = DynamicOptions(
        delta_max=draw(st.integers(1, 4)), beta=draw(st.floats(0, 0.99)),
        floors={"m0": draw(st.integers(0, rank))},
    )  # fmt: skip
    number = st.floats(0, 1e6) | st.sampled_from([0.0, math.nan, math.inf])
    events = []
    for _ in range(draw(st.integers(1, 3))):
        length = {
            n: min(r_max, s.max_rank) if kind == "water-fill" else 1 for n, s in shapes.items()
        }
        events.append(
            {n: sorted(draw(st.lists(number, min_size=k, max_size=k)), reverse=True)
             for n, k in length.items()}
        )  # fmt: skip
    return RankController(rule, shapes, plan.parameters + slack, options), plan, events


@settings(max_examples=500)
@given(event_sequences())
def test_budget_and_box_hold_at_every_event(
    case: tuple[RankController, RankPlan, list[dict[str, list[float]]]],
) -> None:
    control, plan, events = case
    state = control.start(plan)
    for estimates in events:
        decision = control.decide(state, estimates)
        ranks, costs, delta = decision.state.ranks, control.costs, control.options.delta_max
        assert decision.used == sum(r * costs[n] for n, r in ranks.items()) <= control.budget
        box = {}
        for name, rank in ranks.items():
            low, high = control.limits[name]
            old = state.ranks[name]
            box[name] = (max(low, old - delta), min(high, old + delta))
            if not all(map(math.isfinite, estimates[name])) or not any(estimates[name]):
                assert name in decision.flagged
                box[name] = (old, old)
            assert box[name][0] <= rank <= box[name][1]
        room = [costs[n] for n, rank in ranks.items() if rank < box[n][1]]
        missed = most_reachable(box, costs, control.budget) - decision.used
        assert missed == 0 if not room else missed < min(room)
        moved = {c.module: (c.before, c.after) for c in decision.changes}
        assert moved == {n: (state.ranks[n], r) for n, r in ranks.items() if r != state.ranks[n]}
        state = decision.state


def test_equal_estimates_keep_uniform_ranks() -> None:
    control = controller()
    state = control.start(uniform_plan(SHAPES, 4))
    assert control.decide(state, {n: [3.0] for n in SHAPES}).changes == ()


def test_ranks_go_where_the_estimates_are_at_most_delta_at_a_time() -> None:
    control = controller(beta=0.0, delta_max=2)
    state = control.start(uniform_plan(SHAPES, 4))
    estimates = {"a": [10.0], "b": [1.0], "c": [1.0]}
    seen = []
    for _ in range(3):
        state = control.decide(state, estimates).state
        seen.append(tuple(state.ranks.values()))
    assert seen == [(6, 3, 3), (8, 2, 2), (8, 2, 2)]


def test_the_average_is_exponential_and_the_first_estimate_starts_it() -> None:
    control = controller(beta=0.75)
    state = control.start(uniform_plan(SHAPES, 4))
    state = control.decide(state, {n: [4.0] for n in SHAPES}).state
    assert state.averages == {n: [4.0] for n in SHAPES}
    state = control.decide(state, {n: [8.0] for n in SHAPES}).state
    assert state.averages == {n: [5.0] for n in SHAPES}


@pytest.mark.parametrize("bad", [[math.nan], [math.inf], [0.0]])
def test_a_gradient_that_vanishes_or_turns_nan_keeps_rank_and_average(bad: list[float]) -> None:
    control = controller(beta=0.5)
    state = control.start(uniform_plan(SHAPES, 4))
    state = control.decide(state, {"a": [1.0], "b": [2.0], "c": [3.0]}).state
    decision = control.decide(state, {"a": bad, "b": [2.0], "c": [30.0]})
    assert set(decision.flagged) == {"a"}
    assert decision.state.ranks["a"] == state.ranks["a"]
    assert decision.state.averages["a"] == state.averages["a"]
    assert decision.state.averages["c"] == [16.5]


def test_nothing_measured_moves_nothing() -> None:
    control = controller()
    state = control.start(uniform_plan(SHAPES, 4))
    decision = control.decide(state, {n: [0.0] for n in SHAPES})
    assert decision.changes == () and set(decision.flagged) == set(SHAPES)


@pytest.mark.parametrize(
    ("estimates", "message"),
    [
        ({"a": [1.0], "b": [1.0]}, "c is missing"),
        ({"a": [1.0], "b": [1.0], "c": []}, "c is missing"),
        ({"a": [-1.0], "b": [1.0], "c": [1.0]}, "a is -1.0"),
    ],
)
def test_missing_and_negative_estimates_are_errors(
    estimates: dict[str, list[float]], message: str
) -> None:
    control = controller()
    with pytest.raises(PlanError, match=message):
        control.decide(control.start(uniform_plan(SHAPES, 4)), estimates)


def test_estimates_of_another_length_are_an_error() -> None:
    control = controller()
    state = control.decide(control.start(uniform_plan(SHAPES, 4)), {n: [1.0] for n in SHAPES}).state
    with pytest.raises(PlanError, match="2 numbers and had 1"):
        control.decide(state, {n: [1.0, 2.0] for n in SHAPES})


def test_floors_hold_single_modules() -> None:
    control = controller(beta=0.0, delta_max=8, floors={"b": 4})
    state = control.start(uniform_plan(SHAPES, 4))
    ranks = control.decide(state, {"a": [9.0], "b": [0.1], "c": [1.0]}).state.ranks
    assert ranks == {"a": 7, "b": 4, "c": 1}


@pytest.mark.parametrize(
    ("floors", "message"), [({"d": 1}, "'d' carries no adapter"), ({"a": 9}, "between 0 and 8")]
)
def test_floors_that_cannot_be_are_errors(floors: dict[str, int], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        controller(floors=floors)


def test_a_plan_outside_the_bounds_or_the_budget_is_refused() -> None:
    with pytest.raises(PlanError, match=r"rank 9, outside \[1, 8\]"):
        controller(budget=10_000).start(uniform_plan(SHAPES, 9))
    with pytest.raises(PlanError, match="over the budget of 100"):
        controller(budget=100).start(uniform_plan(SHAPES, 4))


def test_the_state_survives_json_to_the_last_bit() -> None:
    control = controller(beta=0.7)
    state = control.start(uniform_plan(SHAPES, 4))
    for i in range(3):
        state = control.decide(
            state, {n: [math.pi * (i + j)] for j, n in enumerate(SHAPES, 1)}
        ).state
    text = json.dumps(asdict(state))
    assert TypeAdapter(ControllerState).validate_json(text, strict=True) == state


def test_schedule() -> None:
    options = DynamicOptions(interval=10, window=3, warmup=10, freeze_after=30)
    assert [s for s in range(1, 60) if options.is_event(s)] == [20, 30]
    assert [s for s in range(1, 60) if options.is_measured(s, 3)] == [18, 19, 20, 28, 29, 30]


def test_one_step_interval_measures_every_step() -> None:
    options = DynamicOptions(interval=1, window=1)
    assert all(options.is_event(s) and options.is_measured(s, 1) for s in range(1, 5))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"interval": 0}, "interval=0 must be a whole number of at least 1"),
        ({"interval": 2.5}, "interval=2.5"),
        ({"delta_max": 0}, "delta_max=0"),
        ({"warmup": -1}, "warmup=-1"),
        ({"interval": 4, "window": 5}, "window=5 must be at most interval=4"),
        ({"window": 0}, "window=0"),
        ({"freeze_after": -1}, "freeze_after=-1"),
        ({"beta": 1.0}, "beta=1.0"),
        ({"beta": math.nan}, "beta=nan"),
        ({"shrink_by": "magic"}, "shrink_by='magic'"),
        ({"grow_along": "magic"}, "grow_along='magic'"),
    ],
)
def test_options_that_cannot_be_are_errors(options: dict[str, object], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        DynamicOptions(**options)  # type: ignore[arg-type]
