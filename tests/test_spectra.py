from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rankwise.errors import ProfileError
from rankwise.spectra import effective_rank, singular_values

SHAPES = [(1, 1), (1, 7), (7, 1), (12, 12), (9, 40), (40, 9), (64, 64), (150, 300)]


def gaussian(rows: int, columns: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64)


def low_rank(rows: int, columns: int, rank: int) -> Tensor:
    return gaussian(rows, rank, seed=1) @ gaussian(rank, columns, seed=2)


def orthogonal(size: int, seed: int) -> Tensor:
    return torch.linalg.qr(gaussian(size, size, seed)).Q


def reference_erank(matrix: Tensor) -> float:
    """Roy & Vetterli's definition, one term at a time, on an fp64 SVD."""
    values = torch.linalg.svdvals(matrix.double()).tolist()
    total = math.fsum(values)
    return math.exp(-math.fsum(v / total * math.log(v / total) for v in values if v > 0))


@pytest.mark.parametrize("k", [1, 2, 5, 100])
def test_equal_values_have_their_number_as_effective_rank(k: int) -> None:
    assert effective_rank(torch.full((k,), 0.37)) == pytest.approx(k, rel=1e-12)
    padded = torch.cat([torch.full((k,), 1e-9), torch.zeros(20)])
    assert effective_rank(padded) == pytest.approx(k, rel=1e-12)


def test_two_unequal_values() -> None:
    # p = (3/4, 1/4): exp of the entropy is 4 / 3^(3/4)
    assert effective_rank(torch.tensor([3.0, 1.0])) == pytest.approx(4 / 3**0.75, rel=1e-12)


@pytest.mark.parametrize("shape", [(30, 50), (50, 30), (256, 256)])
def test_rank_one_has_effective_rank_one(shape: tuple[int, int]) -> None:
    assert effective_rank(singular_values(low_rank(*shape, 1))) == pytest.approx(1, abs=1e-9)


def test_orthogonal_matrix_has_full_effective_rank() -> None:
    assert effective_rank(singular_values(orthogonal(24, 0))) == pytest.approx(24, rel=1e-12)


@pytest.mark.parametrize("scale", [1e-20, 1e-8, 1e8])
def test_scale_does_not_matter(scale: float) -> None:
    matrix = gaussian(20, 30)
    expected = effective_rank(singular_values(matrix))
    assert effective_rank(singular_values(matrix * scale)) == pytest.approx(expected, rel=1e-12)


def test_rotations_do_not_matter() -> None:
    matrix = low_rank(20, 30, 6)
    rotated = orthogonal(20, 3) @ matrix @ orthogonal(30, 4)
    expected = effective_rank(singular_values(matrix))
    assert effective_rank(singular_values(rotated)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("values", [torch.zeros(4), torch.zeros(0)])
def test_nothing_has_effective_rank_zero(values: Tensor) -> None:
    assert effective_rank(values) == 0.0


def test_zero_matrix_has_zero_values() -> None:
    values = singular_values(torch.zeros(3, 5, dtype=torch.bfloat16))
    assert values.dtype == torch.float64
    assert values.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1e-9])
def test_impossible_spectrum_is_refused(bad: float) -> None:
    with pytest.raises(ProfileError, match="finite and non-negative"):
        effective_rank(torch.tensor([1.0, bad]))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_matrix_that_is_not_finite_is_refused(bad: float) -> None:
    matrix = torch.ones(4, 4)
    matrix[2, 1] = bad
    with pytest.raises(ProfileError, match="NaN or an infinity"):
        singular_values(matrix)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("scale", [1.0, 1e-8])
@pytest.mark.parametrize("rank", [1, 4, None])
@pytest.mark.parametrize("shape", SHAPES)
def test_agrees_with_svd(
    shape: tuple[int, int], rank: int | None, scale: float, dtype: torch.dtype
) -> None:
    matrix = gaussian(*shape) if rank is None else low_rank(*shape, rank)
    matrix = (matrix * scale).to(dtype)
    expected = torch.linalg.svdvals(matrix.double())
    values = singular_values(matrix)
    assert values.shape == expected.shape
    assert values.dtype == torch.float64
    assert float((values - expected).abs().max()) <= 1e-12 * float(expected[0])
    assert effective_rank(values) == pytest.approx(reference_erank(matrix), rel=1e-6)


def test_agrees_with_svd_where_digits_run_out() -> None:
    # fourteen decades: the square of the small values is far below the rounding of the large ones
    spectrum = torch.logspace(0, -14, 60, dtype=torch.float64)
    matrix = orthogonal(60, 5) * spectrum @ orthogonal(60, 6)
    values = singular_values(matrix)
    assert float((values - spectrum).abs().max()) < 1e-12
    assert effective_rank(values) == pytest.approx(effective_rank(spectrum), rel=1e-9)


def test_values_come_largest_first_and_leave_the_matrix_alone() -> None:
    matrix = low_rank(30, 20, 5)
    before = matrix.clone()
    values = singular_values(matrix)
    assert torch.equal(values, values.sort(descending=True).values)
    assert torch.equal(matrix, before)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=40))
def test_effective_rank_is_between_one_and_the_rank(values: list[float]) -> None:
    rank = sum(value > 0 for value in values)
    erank = effective_rank(torch.tensor(values, dtype=torch.float64))
    assert (erank == 0) == (rank == 0)
    if rank:
        assert 1 - 1e-9 <= erank <= rank * (1 + 1e-9)


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 10**6))
def test_effective_rank_of_a_matrix_is_at_most_its_smaller_side(
    rows: int, columns: int, seed: int
) -> None:
    matrix = gaussian(rows, columns, seed)
    erank = effective_rank(singular_values(matrix))
    assert 1 - 1e-9 <= erank <= min(rows, columns) * (1 + 1e-9)
    assert effective_rank(singular_values(matrix.T)) == pytest.approx(erank, rel=1e-9)
