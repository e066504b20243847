from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankwise.errors import ConfigError
from rankwise.experiments.trade import Curve, describe, parameters_needed, trade


def test_a_crossing_is_linear_in_log_parameters() -> None:
    needed = parameters_needed([100, 1000, 10_000], [4.0, 2.0, 1.0], 3.0, lower_is_better=True)
    assert needed == pytest.approx(math.sqrt(100 * 1000))
    needed = parameters_needed([100, 1000], [0.2, 0.8], 0.5, lower_is_better=False)
    assert needed == pytest.approx(math.sqrt(100 * 1000))


def test_what_lies_outside_is_said() -> None:
    assert parameters_needed([100, 200], [1.0, 0.5], 1.5, lower_is_better=True) == 100
    assert parameters_needed([100, 200], [3.0, 2.0], 1.5, lower_is_better=True) == math.inf


@given(
    values=st.lists(st.floats(0, 10), min_size=2, max_size=6),
    targets=st.tuples(st.floats(0, 10), st.floats(0, 10)),
)
def test_a_harder_target_never_needs_less(
    values: list[float], targets: tuple[float, float]
) -> None:
    sizes = [100 * 2**i for i in range(len(values))]
    easy, hard = max(targets), min(targets)
    cost = [parameters_needed(sizes, values, t, lower_is_better=True) for t in (easy, hard)]
    assert cost[0] <= cost[1] * (1 + 1e-9)


def _trade(values: dict[str, list[float]], results: dict[str, float]) -> str:
    curve = Curve([100, 400, 1600], values)
    return describe(trade("t", "ours", curve, ("lora", 8, 400, results), lower_is_better=True))


def test_equal_seeds_have_an_interval_of_no_width() -> None:
    curve = Curve([100, 400], {str(seed): [3.0 + seed, 1.0 + seed] for seed in range(5)})
    reference = ("lora", 8, 400, {str(seed): 2.0 + seed for seed in range(5)})
    found = trade("t", "ours", curve, reference, lower_is_better=True)
    # every seed is as much harder for both, so that pairs leave no spread
    assert found.needed == found.low == found.high == 200.0
    assert found.target == 4.0


def test_an_interval_covers_the_spread_of_the_seeds() -> None:
    values = {"0": [3.0, 1.0, 0.5], "1": [5.0, 3.0, 1.9], "2": [2.0, 1.0, 0.9]}
    results = dict.fromkeys("012", 2.0)
    curve = Curve([100, 400, 1600], values)
    found = trade("t", "ours", curve, ("lora", 8, 400, results), lower_is_better=True)
    assert found.needed is not None and found.low is not None and found.high is not None
    assert found.low < found.needed < found.high
    assert found.low == 100  # where the third seed alone is drawn
    assert "at most 100" in describe(found)


def test_words_for_what_is_never_reached() -> None:
    values = {"0": [3.0, 2.5, 2.2], "1": [3.0, 2.5, 2.1]}
    assert _trade(values, {"0": 1.0, "1": 1.0}) == "ours does not get there with 1,600 parameters"


def test_nothing_in_common_is_an_error() -> None:
    with pytest.raises(ConfigError, match="share no seed"):
        _trade({"0": [3.0, 2.5, 2.2]}, {"1": 1.0})
    with pytest.raises(ConfigError, match="do not grow"):
        trade("t", "x", Curve([2, 2], {"0": [1, 1]}), ("l", 8, 4, {"0": 1}), lower_is_better=True)
