from __future__ import annotations

import pytest

from rankwise.budgets import parse_budget
from rankwise.errors import PlanError

COSTS = {"a": 100, "b": 28}


@pytest.mark.parametrize(
    ("said", "parameters"),
    [
        (2570, 2570),
        ("2570", 2570),
        ("2,570", 2570),
        ("2_570 params", 2570),
        ("1,234,567.5 params", 1234567),
        ("params=2570", 2570),
        ("2.4M", 2_400_000),
        ("2.4M params", 2_400_000),
        ("2.4 m parameters", 2_400_000),
        ("1.5k", 1500),
        ("1B params", 10**9),
        ("r=8", 8 * 128),
        ("r 8", 8 * 128),
        ("0.5%", 5_000),
        ("0.5 % of the model", 5_000),
        ("0.33333%", 3_333),
        ("10MB", 2_500_000),
        ("10 MB bf16", 5_000_000),
        ("10MB in float16", 5_000_000),
        ("1 MiB", 2**18),
        ("3kb fp32", 750),
    ],
)
def test_what_is_said_is_what_is_meant(said: object, parameters: int) -> None:
    assert parse_budget(said).parameters(COSTS, 1_000_000) == parameters


@pytest.mark.parametrize(
    "said",
    ["", "eight", "r=0", "r=-1", 0, -5, "0", "0%", "-3%", 8.5, True, None, "10MB int3", "1.2.3",
     "10 apples", "0,5%", "0,125%", "2,4M params", "1,5 MB", "1,23,456", "r=8.5", "8r", "0.4",
     "nan", "inf"],
)  # fmt: skip
def test_nonsense_is_refused_with_what_is_allowed(said: object) -> None:
    with pytest.raises(PlanError, match=r"budget=.*(is not understood; allowed: 'r=8'|positive)"):
        parse_budget(said)


@pytest.mark.parametrize(
    "said",
    [10**400, -(10**5000), 10**18 + 1, f"r={10**19}", f"{10**21}%", "2000000000 GB"],
    ids=["huge", "beyond printing", "number", "rank", "part", "bytes"],
)
def test_an_amount_beyond_any_model_is_refused(said: object) -> None:
    with pytest.raises(PlanError, match=r"an amount beyond 1,000,000,000,000,000,000 was received"):
        parse_budget(said)


@pytest.mark.parametrize(
    "said", ["1" + "0" * 400, "9" * 5000, "0." + "0" * 5000 + "1%"], ids=["400", "5000", "decimals"]
)
def test_a_long_text_is_not_repeated(said: str) -> None:
    with pytest.raises(PlanError, match=rf"a text of {len(said)} characters") as info:
        parse_budget(said)
    assert len(str(info.value)) < 300


def test_a_percentage_needs_the_size_of_the_model() -> None:
    with pytest.raises(PlanError, match="profile again or name a number of parameters"):
        parse_budget("1%").parameters(COSTS, None)


def test_less_than_one_parameter_is_refused() -> None:
    with pytest.raises(PlanError, match="less than one parameter"):
        parse_budget("0.0001%").parameters(COSTS, 1000)
