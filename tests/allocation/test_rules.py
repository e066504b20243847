from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from rankwise.allocation import (
    block_count,
    dividing_blocks,
    parameters,
    rank_limits,
    sensitivity_ranks,
    smoothed_shares,
)
from rankwise.allocation import (
    proportional_ranks as within_limits,
)
from rankwise.errors import PlanError

WEIGHTS = st.one_of(
    st.just(0.0),
    st.floats(0, 10, allow_subnormal=True),
    st.floats(1e-12, 1e12),
    st.sampled_from([1.0, 2.0, 1e-300, 5e-324]),
)


def proportional_ranks(
    weights: Mapping[str, float],
    costs: Mapping[str, int],
    budget: int,
    bounds: tuple[int, int],
    caps: Mapping[str, int],
) -> dict[str, int]:
    return within_limits(weights, costs, budget, rank_limits(caps, *bounds))


@st.composite
def problems(draw: st.DrawFn) -> dict[str, object]:
    """Weights, costs, caps, bounds and a feasible budget for a handful of modules."""
    names = draw(st.lists(st.text("abcdef", min_size=1, max_size=4), min_size=1, unique=True))
    shapes = {name: (draw(st.integers(1, 64)), draw(st.integers(1, 64))) for name in names}
    low = draw(st.integers(0, 8))
    bounds = (low, draw(st.integers(max(low, 1), 40)))
    costs = {name: sum(shape) for name, shape in shapes.items()}
    caps = {name: min(shape) for name, shape in shapes.items()}
    least = sum(min(bounds[0], caps[name]) * costs[name] for name in names)
    most = sum(min(bounds[1], caps[name]) * costs[name] for name in names)
    return {
        "weights": {name: draw(WEIGHTS) for name in names},
        "costs": costs,
        "budget": draw(st.integers(least, most + 50)),
        "bounds": bounds,
        "caps": caps,
    }


class TestProportionalRanks:
    @given(problems())
    @settings(max_examples=100)
    def test_budget_bounds_and_remainder(self, problem: dict[str, object]) -> None:
        costs, caps = problem["costs"], problem["caps"]
        low, high = problem["bounds"]
        ranks = proportional_ranks(**problem)
        assert list(ranks) == list(costs)
        left = problem["budget"] - sum(ranks[name] * costs[name] for name in costs)
        assert left >= 0
        for name, rank in ranks.items():
            assert isinstance(rank, int)
            assert min(low, caps[name]) <= rank <= min(high, caps[name])
        growing = [costs[name] for name in costs if ranks[name] < min(high, caps[name])]
        assert not growing or left < min(growing)

    @given(problems())
    @settings(max_examples=60)
    def test_more_weight_is_no_less_rank(self, problem: dict[str, object]) -> None:
        ranks = proportional_ranks(**problem)
        costs, caps, weights = problem["costs"], problem["caps"], problem["weights"]
        for a in costs:
            for b in costs:
                if costs[a] == costs[b] and caps[a] == caps[b] and weights[a] > weights[b]:
                    assert ranks[a] >= ranks[b] - 1  # a tie within flooring goes by name

    @given(st.integers(1, 40), st.integers(1, 30), st.integers(2, 500), st.floats(1e-9, 1e9))
    def test_equal_weights_and_costs_give_equal_ranks(
        self, modules: int, rank: int, cost: int, weight: float
    ) -> None:
        names = [f"layer.{i}" for i in range(modules)]
        ranks = proportional_ranks(
            dict.fromkeys(names, weight),
            dict.fromkeys(names, cost),
            rank * cost * modules,
            (1, 2 * rank),
            dict.fromkeys(names, 1000),
        )
        assert set(ranks.values()) == {rank}

    def test_shares_follow_weights(self) -> None:
        ranks = proportional_ranks(
            {"a": 1.0, "b": 2.0, "c": 5.0}, {"a": 10, "b": 10, "c": 10}, 160, (1, 16),
            {"a": 64, "b": 64, "c": 64},
        )  # fmt: skip
        assert ranks == {"a": 2, "b": 4, "c": 10}

    def test_ties_go_by_name(self) -> None:
        names = ["b", "c", "a"]
        equal = dict.fromkeys(names, 1.0)
        ranks = proportional_ranks(
            equal, dict.fromkeys(names, 10), 80, (1, 8), dict.fromkeys(names, 8)
        )
        assert ranks == {"a": 3, "b": 3, "c": 2}

    def test_a_cap_passes_its_share_on(self) -> None:
        ranks = proportional_ranks(
            {"a": 9.0, "b": 1.0}, {"a": 10, "b": 10}, 100, (1, 20), {"a": 4, "b": 20}
        )
        assert ranks == {"a": 4, "b": 6}

    def test_no_weight_gets_the_least(self) -> None:
        ranks = proportional_ranks(
            {"a": 0.0, "b": 1.0, "c": 1.0}, {"a": 10, "b": 10, "c": 10}, 240, (4, 16),
            {"a": 64, "b": 64, "c": 64},
        )  # fmt: skip
        assert ranks == {"a": 4, "b": 10, "c": 10}

    def test_least_of_zero_leaves_modules_out(self) -> None:
        ranks = proportional_ranks(
            {"a": 0.0, "b": 1.0}, {"a": 10, "b": 10}, 40, (0, 4), {"a": 8, "b": 8}
        )
        assert ranks == {"a": 0, "b": 4}

    def test_infeasible_budget_states_the_range(self) -> None:
        with pytest.raises(
            PlanError,
            match=r"budget of 79 .*infeasible: .* these 2 modules take from 80 to 260",
        ):
            proportional_ranks(
                {"a": 1.0, "b": 1.0}, {"a": 10, "b": 10}, 79, (4, 16), {"a": 64, "b": 10}
            )
        at_least = proportional_ranks(
            {"a": 1.0, "b": 1.0}, {"a": 10, "b": 10}, 80, (4, 16), {"a": 64, "b": 10}
        )
        assert at_least == {"a": 4, "b": 4}

    def test_dynamic_range_does_not_overflow(self) -> None:
        names = ["a", "b", "c", "d"]
        weights = {"a": 1e-308, "b": 1e300, "c": 0.0, "d": 5e-324}
        ranks = proportional_ranks(
            weights, dict.fromkeys(names, 4), 44, (1, 8), dict.fromkeys(names, 8)
        )
        assert ranks == {"a": 1, "b": 8, "c": 1, "d": 1}


def literal_ranks(
    scores: Mapping[str, float], costs: Mapping[str, int], r_ref: int, low: int, high: int
) -> dict[str, float]:
    """RaLoRA Eq. 6-8 one line at a time, before the floor and the clip."""
    total_score = sum(scores.values())
    a = {name: scores[name] / total_score for name in scores}  # Eq. 6
    pool = 0.0
    for name in scores:
        pool += r_ref * math.sqrt(costs[name])  # Eq. 7
    return {name: pool * a[name] / math.sqrt(costs[name]) for name in scores}  # Eq. 8


class TestSensitivityRanks:
    @given(
        st.lists(st.tuples(st.floats(1e-6, 1), st.integers(2, 20000)), min_size=1, max_size=30),
        st.integers(1, 64),
    )
    def test_agrees_with_the_literal_equations(
        self, modules: list[tuple[float, int]], r_ref: int
    ) -> None:
        scores = {f"m{i}": score for i, (score, _) in enumerate(modules)}
        costs = {f"m{i}": cost for i, (_, cost) in enumerate(modules)}
        low, high = max(1, r_ref // 2), 2 * r_ref
        exact = literal_ranks(scores, costs, r_ref, low, high)
        ranks = sensitivity_ranks(scores, costs, r_ref, (low, high))
        for name, value in exact.items():
            if abs(value - round(value)) > 1e-6:  # elsewhere flooring hangs on rounding
                assert ranks[name] == min(max(math.floor(value), low), high)
            else:
                assert ranks[name] == min(max(round(value), low), high)

    @pytest.mark.parametrize("cost", [96, 5120, 8192, 18432])
    def test_equal_scores_give_the_reference_rank(self, cost: int) -> None:
        for modules in range(1, 230):
            names = [f"m{i}" for i in range(modules)]
            ranks = sensitivity_ranks(
                dict.fromkeys(names, 0.37), dict.fromkeys(names, cost), 8, (4, 16)
            )
            assert set(ranks.values()) == {8}, modules

    def test_by_hand(self) -> None:
        # P = 4 (3 + 5) = 32; 32 * 3/4 / 3 = 8 and 32 * 1/4 / 5 = 1.6
        ranks = sensitivity_ranks({"a": 3.0, "b": 1.0}, {"a": 9, "b": 25}, 4, (1, 100))
        assert ranks == {"a": 8, "b": 1}
        clipped = sensitivity_ranks({"a": 3.0, "b": 1.0}, {"a": 9, "b": 25}, 4, (2, 6))
        assert clipped == {"a": 6, "b": 2}

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -1e-9])
    def test_impossible_score_names_the_module(self, bad: float) -> None:
        with pytest.raises(PlanError, match=r"sensitivity of layer\.3 is"):
            sensitivity_ranks({"layer.3": bad, "x": 1.0}, {"layer.3": 4, "x": 4}, 8, (4, 16))

    def test_missing_score_names_the_module(self) -> None:
        with pytest.raises(PlanError, match=r"sensitivity of layer\.3 is nan"):
            smoothed_shares({"x": 1.0}, {"x": 4, "layer.3": 4})

    def test_all_zero(self) -> None:
        with pytest.raises(PlanError, match="every sensitivity is zero"):
            smoothed_shares({"x": 0.0}, {"x": 4})


class TestBlocks:
    @given(st.floats(0, 1e5, allow_subnormal=False), st.integers(1, 512), st.integers(0, 10))
    @settings(max_examples=500)
    def test_count_agrees_with_the_literal_formula(
        self, erank: float, rank: int, log_n_max: int
    ) -> None:
        ratio = Fraction(erank) / rank
        exponent = -1
        while Fraction(2) ** (exponent + 1) <= ratio and exponent < 100:
            exponent += 1  # floor(log2(ratio)) in exact arithmetic, where it is at least 0
        if exponent + 1 <= 99:
            nearest = ratio / Fraction(2) ** (exponent + 1)
            assume(not Fraction(999999999, 1000000000) < nearest < 1)
        expected = 2 ** min(max(exponent, 0), log_n_max)
        assert block_count(erank, rank, 2**log_n_max) == expected

    @given(st.floats(0, 1e5), st.integers(1, 512), st.integers(0, 10))
    def test_rank_stays_within_the_effective_rank(
        self, erank: float, rank: int, log_n_max: int
    ) -> None:
        n = block_count(erank, rank, 2**log_n_max)
        assert n & (n - 1) == 0
        assert 1 <= n <= 2**log_n_max
        assert n == 1 or n * rank <= erank * (1 + 1e-12)

    @pytest.mark.parametrize(
        ("erank", "rank", "n_max", "n"),
        [
            (0.0, 8, 32, 1),
            (7.99, 8, 32, 1),
            (8.0, 8, 32, 1),
            (15.99, 8, 32, 1),
            (16.0, 8, 32, 2),
            (63.9, 8, 32, 4),  # a ceiling would say 8
            (64.0, 8, 32, 8),
            (math.exp(math.log(64)), 8, 32, 8),  # what 64 equal singular values come to
            (1e4, 8, 32, 32),
            (1e4, 8, 1, 1),
        ],
    )
    def test_count(self, erank: float, rank: int, n_max: int, n: int) -> None:
        assert block_count(erank, rank, n_max) == n

    @given(st.integers(1, 600), st.integers(1, 5000), st.integers(1, 5000))
    def test_dividing_is_the_largest_power_that_does(
        self, blocks: int, d_in: int, d_out: int
    ) -> None:
        powers = [2**k for k in range(12)]
        expected = max(p for p in powers if p <= blocks and d_in % p == 0 and d_out % p == 0)
        assert dividing_blocks(blocks, d_in, d_out) == expected


def test_parameters_by_hand() -> None:
    assert parameters({"a": 2, "b": 0}, {"a": 10, "b": 7}) == 20


def test_everything_with_a_weight_full_leaves_the_rest_even_shares() -> None:
    names = ["a", "b", "c"]
    limits = {"a": (0, 2), "b": (0, 8), "c": (0, 8)}
    ranks = within_limits({"a": 1.0, "b": 0.0, "c": 0.0}, dict.fromkeys(names, 1), 11, limits)
    assert ranks == {"a": 2, "b": 5, "c": 4}


def test_nearest_rounding_and_offset() -> None:
    costs, limits = dict.fromkeys("ab", 1), dict.fromkeys("ab", (1, 8))
    # 1 + c w with c = 6: 5.2 and 2.8, so 5 and 3 when rounded to nearest
    weights = {"a": 0.7, "b": 0.3}
    assert within_limits(weights, costs, 8, limits, offset=1, rounding="nearest") == {
        "a": 5,
        "b": 3,
    }
