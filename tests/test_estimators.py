"""Energy rank, threshold ranks and participation ratio: closed forms and properties."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rankwise.errors import ProfileError
from rankwise.spectra import (
    effective_rank,
    energy_crossing,
    energy_rank,
    gram_eigenvalues,
    participation_ratio,
    singular_values,
    stable_rank,
    threshold_rank,
)

spectra = st.lists(st.floats(0, 1e6), min_size=1, max_size=40)
positive = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=40)
parts = st.floats(0.01, 1)


def wide(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def slow_energy_rank(values: list[float], energy: float) -> set[int]:
    """The definition, and its neighbour where rounding decides."""
    ordered, total = sorted(values, reverse=True), math.fsum(values)
    found = set()
    for slack in (-1e-11, 0.0, 1e-11):
        sums = (math.fsum(ordered[:k]) for k in range(1, len(ordered) + 1))
        reached = [k for k, s in enumerate(sums, 1) if s >= (energy + slack) * total]
        found.add(reached[0] if reached else len(ordered))
    return found


@pytest.mark.parametrize("value", [1.0, 0.37, 1e-30, 1e30])
@pytest.mark.parametrize(("count", "energy", "rank"), [(10, 0.9, 9), (10, 0.91, 10), (7, 1.0, 7)])
def test_energy_rank_of_equal_values(value: float, count: int, energy: float, rank: int) -> None:
    values = torch.full((count,), value, dtype=torch.float64)
    assert energy_rank(values, energy) == rank
    assert energy_crossing(values, energy) == pytest.approx(count * energy)


def test_energy_rank_closed_forms() -> None:
    assert energy_rank(wide([1, 90, 9])) == 1
    assert energy_rank(wide([1, 90, 9]), 0.95) == 2
    assert energy_crossing(wide([1, 90, 9]), 0.945) == pytest.approx(1.5)
    assert energy_rank(wide([5.0]), 0.01) == 1
    assert energy_crossing(wide([5.0, 0.0]), 0.25) == 0.25
    assert energy_rank(wide([5.0, 0.0]), 1.0) == 1
    assert energy_rank(torch.zeros(3)) == energy_crossing(torch.zeros(3)) == 0
    assert energy_rank(torch.zeros(0)) == 0


@given(spectra, parts)
def test_energy_rank_is_its_definition(values: list[float], energy: float) -> None:
    rank = energy_rank(wide(values), energy)
    if any(values):
        assert rank in slow_energy_rank(values, energy)
    assert rank <= sum(value > 0 for value in values)


@given(positive, parts, parts)
def test_energy_rank_grows_with_the_part(values: list[float], a: float, b: float) -> None:
    low, high = sorted((a, b))
    assert energy_crossing(wide(values), low) <= energy_crossing(wide(values), high)
    assert energy_rank(wide(values), low) - 1 < energy_crossing(wide(values), low)


@given(positive, parts, st.sampled_from([2.0**-40, 2.0**30]), st.randoms())
def test_energy_rank_ignores_scale_and_order(
    values: list[float], energy: float, scale: float, random: object
) -> None:
    shuffled = values.copy()
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    expected = energy_crossing(wide(values), energy)
    assert energy_crossing(wide(shuffled) * scale, energy) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("energy", [0.0, -0.1, 1.1, math.nan])
def test_impossible_part_is_refused(energy: float) -> None:
    with pytest.raises(ProfileError, match=r"energy=.* must be in \(0, 1\]"):
        energy_rank(torch.ones(3), energy)


def test_threshold_ranks() -> None:
    values = wide([2.0, 0.2, 0.02, 0.0])
    assert [threshold_rank(values, eps) for eps in (1e-1, 1e-2, 1e-5, 0.0)] == [2, 3, 3, 3]
    assert [threshold_rank(values, eps, relative=True) for eps in (0.1, 0.09, 1.0)] == [1, 2, 0]
    assert threshold_rank(torch.zeros(3), 0.0, relative=True) == 0
    assert threshold_rank(torch.zeros(0), 0.5, relative=True) == 0
    for bad in (-1.0, math.nan, math.inf):
        with pytest.raises(ProfileError, match="threshold="):
            threshold_rank(values, bad)


@given(positive, st.floats(0, 1), st.sampled_from([2.0**-20, 2.0**20]))
def test_relative_threshold_ignores_scale(values: list[float], eps: float, scale: float) -> None:
    expected = threshold_rank(wide(values), eps, relative=True)
    assert threshold_rank(wide(values) * scale, eps, relative=True) == expected


@pytest.mark.parametrize("k", [1, 3, 50])
def test_participation_ratio_of_equal_values(k: int) -> None:
    values = torch.cat([torch.full((k,), 1e-9), torch.zeros(9)])
    assert participation_ratio(values) == pytest.approx(k)
    assert participation_ratio(torch.zeros(k)) == 0
    assert participation_ratio(torch.zeros(0)) == 0


def test_participation_ratio_of_two_values() -> None:
    assert participation_ratio(wide([2.0, 1.0])) == pytest.approx(25 / 17)


@given(spectra)
def test_estimators_are_ordered(values: list[float]) -> None:
    spectrum = wide(values)
    rank = sum(value > 0 for value in values)
    if rank:
        peak = max(values)
        assert 1 - 1e-9 <= stable_rank(spectrum) <= participation_ratio(spectrum) * (1 + 1e-9)
        squares = (spectrum / peak) ** 2
        assert participation_ratio(spectrum) <= effective_rank(squares) * (1 + 1e-9)
        assert effective_rank(spectrum) <= rank * (1 + 1e-9)


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
def test_impossible_spectrum_is_refused(bad: float) -> None:
    for estimator in (energy_rank, energy_crossing, participation_ratio):
        with pytest.raises(ProfileError, match="finite and non-negative"):
            estimator(wide([1.0, bad]))
    with pytest.raises(ProfileError, match="finite and non-negative"):
        threshold_rank(wide([1.0, bad]), 0.1)


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_gram_eigenvalues_are_squared_singular_values(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(6, 40, generator=generator, dtype=torch.float64)
    vectors[5] = vectors[0] + vectors[1]  # five directions among six
    values = gram_eigenvalues(vectors @ vectors.T * scale)
    expected = torch.linalg.svdvals(vectors) ** 2 * scale
    torch.testing.assert_close(values, expected, rtol=1e-10, atol=1e-12 * float(expected[0]))
    assert float(values.min()) >= 0
    assert energy_rank(values, 1.0) == 5


def test_gram_eigenvalues_of_nothing_and_of_nonsense() -> None:
    assert gram_eigenvalues(torch.zeros(2, 2)).tolist() == [0, 0]
    assert gram_eigenvalues(torch.zeros(0, 0)).tolist() == []
    with pytest.raises(ProfileError, match="NaN or an infinity"):
        gram_eigenvalues(torch.tensor([[1.0, math.nan], [math.nan, 1.0]]))


@pytest.mark.parametrize("shape", [(600, 513), (513, 1100)])
def test_panels_give_the_same_singular_values(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    low = torch.randn(shape[0], 40, generator=generator) @ torch.randn(40, shape[1])
    for matrix in (torch.randn(*shape, generator=generator), low):
        expected = torch.linalg.svdvals(matrix.double())
        error = (singular_values(matrix) - expected).abs().max()
        assert float(error) <= 1e-12 * float(expected[0])
