"""What every rule promises, whatever the shapes, scores, bounds and budget."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rankwise.allocation import (
    cheapest_next,
    exact,
    finds_largest_total,
    parameters,
    proportional_ranks,
    smoothed_shares,
    uniform_ranks,
    water_filling_ranks,
)


@dataclass(frozen=True)
class Problem:
    costs: dict[str, int]
    limits: dict[str, tuple[int, int]]
    scores: dict[str, float]
    energies: dict[str, list[float]]

    @property
    def least(self) -> int:
        return sum(self.limits[name][0] * cost for name, cost in self.costs.items())

    @property
    def most(self) -> int:
        return sum(self.limits[name][1] * cost for name, cost in self.costs.items())


Rule = Callable[[Problem, int], dict[str, int]]


def sensitivity(problem: Problem, budget: int) -> dict[str, int]:
    if not any(problem.scores.values()):
        return uniform_ranks(problem.costs, budget, problem.limits)
    shares = smoothed_shares(problem.scores, problem.costs)
    return proportional_ranks(shares, problem.costs, budget, problem.limits)


RULES: dict[str, Rule] = {
    "uniform": lambda p, b: uniform_ranks(p.costs, b, p.limits),
    "proportional": lambda p, b: proportional_ranks(p.scores, p.costs, b, p.limits),
    "gard": lambda p, b: proportional_ranks(
        p.scores, p.costs, b, p.limits, offset=1, rounding="nearest",
        ties={name: (p.energies[name][0] if p.energies[name] else 0.0,) for name in p.costs},
    ),
    "sensitivity": sensitivity,
    "water-fill": lambda p, b: water_filling_ranks(p.energies, p.costs, b, p.limits),
}  # fmt: skip

SCORES = st.one_of(st.sampled_from([0.0, 1.0, 1.0, 2.0, 5e-324]), st.floats(0, 1e9))


@st.composite
def problems(draw: st.DrawFn, most_rank: int = 6) -> Problem:
    """Up to six modules; few costs with a common divisor, or any costs."""
    name = st.text("ab.1", min_size=1, max_size=4)
    names = draw(st.lists(name, min_size=1, max_size=6, unique=True))
    cost = draw(st.sampled_from([st.integers(1, 60), st.sampled_from([8, 12, 22])]))
    costs = {name: draw(cost) for name in names}
    lows = {name: draw(st.integers(0, 2)) for name in names}
    limits = {name: (low, draw(st.integers(low, most_rank))) for name, low in lows.items()}
    energies = {
        name: sorted((draw(SCORES) for _ in range(limits[name][1])), reverse=True) for name in names
    }
    return Problem(costs, limits, {name: draw(SCORES) for name in names}, energies)


@pytest.fixture(params=["few costs", "many costs"])
def _way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether what is left is spent exactly, or first fit as with too many different costs."""
    if request.param == "many costs":
        monkeypatch.setattr(exact, "MOST_WORK", -1)


every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
both_ways = pytest.mark.usefixtures("_way")
few = settings(
    max_examples=30,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@every_rule
@both_ways
@given(problem=problems(), share=st.floats(0, 1.1))
@few
def test_within_budget_and_bounds(rule: Rule, problem: Problem, share: float) -> None:
    budget = problem.least + math.ceil(share * (problem.most - problem.least))
    ranks = rule(problem, budget)
    assert list(ranks) == list(problem.costs)
    for name, rank in ranks.items():
        low, high = problem.limits[name]
        assert type(rank) is int
        assert low <= rank <= high
    left = budget - parameters(ranks, problem.costs)
    following = cheapest_next(ranks, problem.costs, problem.limits)
    assert left >= 0
    assert following is None or left < following


@every_rule
@both_ways
@given(problem=problems(), share=st.floats(0, 1), random=st.randoms(use_true_random=False))
@few
def test_order_does_not_matter(rule: Rule, problem: Problem, share: float, random: object) -> None:
    budget = problem.least + math.ceil(share * (problem.most - problem.least))
    order = list(problem.costs)
    random.shuffle(order)  # type: ignore[attr-defined]
    fields = ("costs", "limits", "scores", "energies")
    shuffled = replace(
        problem, **{f: {name: getattr(problem, f)[name] for name in order} for f in fields}
    )
    found = rule(problem, budget)
    assert rule(shuffled, budget) == found
    assert rule(problem, budget) == found


@every_rule
@both_ways
@given(problem=problems(most_rank=4))
@settings(few, max_examples=6)
def test_the_total_never_falls(rule: Rule, problem: Problem) -> None:
    totals = [
        parameters(rule(problem, budget), problem.costs)
        for budget in range(problem.least, problem.most + 2, max(1, problem.most // 60))
    ]
    assert totals == sorted(totals)
    assert parameters(rule(problem, problem.most), problem.costs) == problem.most


def every_plan(problem: Problem, budget: int) -> Iterator[dict[str, int]]:
    ranges = (range(low, high + 1) for low, high in problem.limits.values())
    for ranks in itertools.product(*ranges):
        plan = dict(zip(problem.limits, ranks, strict=True))
        if parameters(plan, problem.costs) <= budget:
            yield plan


@pytest.mark.parametrize("rule", ["uniform", "proportional", "gard", "sensitivity"])
@given(problem=problems(most_rank=3), share=st.floats(0, 1))
@settings(few, max_examples=40)
def test_the_largest_total_is_found(rule: str, problem: Problem, share: float) -> None:
    assert finds_largest_total(problem.costs, problem.limits) or problem.least == problem.most
    budget = problem.least + math.ceil(share * (problem.most - problem.least))
    weights = dict.fromkeys(problem.costs, 1.0) if rule == "uniform" else problem.scores
    top = max(weights.values())
    living = {name for name, weight in weights.items() if weight > 1e-100 * top} or {*weights}

    def of_the_living(plan: Mapping[str, int]) -> int:
        return sum(plan[name] * problem.costs[name] for name in living)

    largest = max(of_the_living(plan) for plan in every_plan(problem, budget))
    assert of_the_living(RULES[rule](problem, budget)) == largest


def captured(problem: Problem, ranks: Mapping[str, int]) -> Fraction:
    return sum(
        (Fraction(e) for name, rank in ranks.items() for e in problem.energies[name][:rank]),
        Fraction(0),
    )


@given(problem=problems(most_rank=3), share=st.floats(0, 1))
@settings(few, max_examples=80)
def test_water_filling_is_the_brute_force_optimum(problem: Problem, share: float) -> None:
    """Nearer than one cheapest step: exact but for rounding to 2^-44 of the largest energy."""
    budget = problem.least + math.ceil(share * (problem.most - problem.least))
    best = max(captured(problem, plan) for plan in every_plan(problem, budget))
    found = captured(problem, water_filling_ranks(
        problem.energies, problem.costs, budget, problem.limits
    ))  # fmt: skip
    units = sum(high for _, high in problem.limits.values())
    largest = max((e for spectrum in problem.energies.values() for e in spectrum), default=0.0)
    assert best - found <= units * Fraction(largest) / 2**43


@pytest.mark.usefixtures("_way")
@given(problem=problems(most_rank=3), share=st.floats(0, 1))
@settings(few, max_examples=30)
def test_water_filling_loses_at_most_one_direction(problem: Problem, share: float) -> None:
    budget = problem.least + math.ceil(share * (problem.most - problem.least))
    best = max(captured(problem, plan) for plan in every_plan(problem, budget))
    ranks = water_filling_ranks(problem.energies, problem.costs, budget, problem.limits)
    following = [
        Fraction(problem.energies[name][rank])
        for name, rank in ranks.items()
        if rank < problem.limits[name][1]
    ]
    lost = best - captured(problem, ranks)
    assert lost <= max(following, default=Fraction(0)) + Fraction(1, 2**13)


def test_a_larger_total_worth_less_is_not_taken() -> None:
    """Water-filling spends for energy: 12 of 12 parameters would hold a tenth of 10 of 12."""
    energies, costs = {"a": [100.0], "b": [5.0, 5.0]}, {"a": 10, "b": 6}
    limits = {"a": (0, 1), "b": (0, 2)}
    assert water_filling_ranks(energies, costs, 12, limits) == {"a": 1, "b": 0}
    assert proportional_ranks({"a": 9, "b": 1}, costs, 12, limits) == {"a": 0, "b": 2}


def test_a_costly_step_beats_cheap_ones_that_block_it() -> None:
    """First fit would take the cheap unit, 1.1 of 1000."""
    costs, limits = {"big": 1000, "small": 1}, {"big": (0, 1), "small": (0, 1)}
    energies = {"big": [1000.0], "small": [1.1]}
    assert water_filling_ranks(energies, costs, 1000, limits) == {"big": 1, "small": 0}
