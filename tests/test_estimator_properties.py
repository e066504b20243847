"""Every estimator: closed forms, invariances, bounds, and input that is no spectrum."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rankwise.errors import ProfileError
from rankwise.spectra import (
    effective_rank,
    energy_rank,
    participation_ratio,
    singular_values,
    stable_rank,
    threshold_rank,
)

# from the singular values; the fraction is a power of two, so that scaling by one is exact
SCALE_FREE: dict[str, Callable[[Tensor], float]] = {
    "effective": effective_rank,
    "stable": stable_rank,
    "participation": participation_ratio,
    "energy": lambda values: energy_rank(values**2, 1.0),
    "relative threshold": lambda values: threshold_rank(values, 0.5**10, relative=True),
}
ALL = SCALE_FREE | {"threshold": lambda values: threshold_rank(values, 0.5**10)}
scale_free = pytest.mark.parametrize("estimator", SCALE_FREE.values(), ids=SCALE_FREE)
every = pytest.mark.parametrize("estimator", ALL.values(), ids=ALL)
spectra = st.lists(st.floats(1e-3, 1e3) | st.just(0.0), min_size=1, max_size=30)


def wide(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def orthogonal(size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q


@every
@pytest.mark.parametrize("k", [1, 2, 7, 64])
@pytest.mark.parametrize("zeros", [0, 5])
def test_equal_values_have_their_number(
    estimator: Callable[[Tensor], float], k: int, zeros: int
) -> None:
    spectrum = torch.cat([torch.full((k,), 0.37), torch.zeros(zeros)])
    assert estimator(spectrum) == pytest.approx(k, rel=1e-9)


@every
def test_rank_one_matrix_has_one_dimension(estimator: Callable[[Tensor], float]) -> None:
    matrix = torch.outer(torch.arange(1.0, 9), torch.arange(2.0, 7))  # exact in fp32
    values = singular_values(matrix)
    # what rounding leaves of the other values is 1e-16 of the first
    values = torch.where(values < 1e-12 * values[0], 0, values)
    assert estimator(values) == pytest.approx(1, rel=1e-9)


@scale_free
@settings(max_examples=25)
@given(values=spectra, exponent=st.integers(-60, 60))
def test_scale_does_not_matter(
    estimator: Callable[[Tensor], float], values: list[float], exponent: int
) -> None:
    expected = estimator(wide(values))
    assert estimator(wide(values) * 2.0**exponent) == pytest.approx(expected, rel=1e-9)


@settings(max_examples=25)
@given(values=spectra, exponent=st.integers(-60, 60))
def test_an_absolute_threshold_scales_with_the_values(values: list[float], exponent: int) -> None:
    scale = 2.0**exponent
    scaled = threshold_rank(wide(values) * scale, 0.25 * scale)
    assert scaled == threshold_rank(wide(values), 0.25)


@every
@settings(max_examples=25)
@given(values=spectra, random=st.randoms(use_true_random=False))
def test_order_and_zeros_do_not_matter(
    estimator: Callable[[Tensor], float], values: list[float], random: object
) -> None:
    shuffled = [*values, 0.0, 0.0]
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert estimator(wide(shuffled)) == pytest.approx(estimator(wide(values)), rel=1e-9)


@every
def test_rotations_do_not_matter(estimator: Callable[[Tensor], float]) -> None:
    spectrum = torch.logspace(0, -2.5, 12, dtype=torch.float64)
    matrix = orthogonal(12, 1) * spectrum @ orthogonal(20, 2)[:12]
    rotated = orthogonal(12, 3) @ matrix @ orthogonal(20, 4)
    for found in (matrix, rotated, rotated.T):
        values = singular_values(found)
        assert estimator(values) == pytest.approx(estimator(spectrum), rel=1e-9)


@scale_free
@settings(max_examples=25)
@given(values=spectra)
def test_between_one_and_the_rank(
    estimator: Callable[[Tensor], float], values: list[float]
) -> None:
    rank = sum(value > 0 for value in values)
    found = estimator(wide(values))
    assert found == 0 if not rank else 1 - 1e-9 <= found <= rank * (1 + 1e-9)


@every
@settings(max_examples=25)
@given(rows=st.integers(1, 9), columns=st.integers(1, 9), rank=st.integers(1, 9))
def test_at_most_the_rank_of_the_matrix(
    estimator: Callable[[Tensor], float], rows: int, columns: int, rank: int
) -> None:
    generator = torch.Generator().manual_seed(rows + 10 * columns)
    left, right = (torch.randn(n, rank, generator=generator).double() for n in (rows, columns))
    values = singular_values(left @ right.T)
    values = torch.where(values < 1e-12 * values[0], 0, values)
    assert len(values) == min(rows, columns)
    assert 1 - 1e-9 <= estimator(values) <= min(rank, rows, columns) * (1 + 1e-9)


@every
@pytest.mark.parametrize("size", [0, 1, 6])
def test_nothing_has_no_dimension(estimator: Callable[[Tensor], float], size: int) -> None:
    assert estimator(torch.zeros(size)) == 0


@every
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused(estimator: Callable[[Tensor], float], bad: float) -> None:
    for spectrum in (wide([1.0, bad]), wide([bad])):
        with pytest.raises(ProfileError, match="must be finite and non-negative"):
            estimator(spectrum)


@pytest.mark.parametrize("name", sorted(ALL.keys() - {"energy"}))  # it is given squares
def test_negative_values_are_refused(name: str) -> None:
    with pytest.raises(ProfileError, match="must be finite and non-negative"):
        ALL[name](wide([1.0, -1e-9]))
