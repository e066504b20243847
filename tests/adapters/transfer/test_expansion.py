"""The fast evaluation against the formulas, and where it gives up."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rankwise.adapters.transfer import (
    BASES,
    BasisName,
    Transfer,
    evaluate,
    evaluator,
    gradients,
)
from rankwise.adapters.transfer.bases import Spline
from rankwise.adapters.transfer.evaluators import Cells, Direct, Polynomial
from rankwise.adapters.transfer.expansion import MAX_POWER, expansion_degree
from transfer_samples import NAMES, relative_error, sample

LIMIT = 1e-6


def entries(radius: float, count: int = 3000, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    u = radius * (2 * torch.rand(count, generator=generator) - 1)
    u[0], u[-1] = radius, -radius
    return u


def kind_of(f: Transfer, radius: float) -> type:
    return type(evaluator(f, radius, torch.float32))


def check(f: Transfer, u: torch.Tensor) -> None:
    """f, dU and the parameters' gradients, relative to the largest of each."""
    generator = torch.Generator().manual_seed(1)
    # a gradient with a mean, or sums over it would measure their own cancellation
    upstream = torch.randn(len(u), generator=generator) + 0.3
    # a spline's pieces are fixed, so that near an extremum or a zero it has the rounding of a whole
    # cell, however little of the cell the range takes
    cell = Spline.step(f) if f.basis == "spline" else 0.0
    around = torch.linspace(-cell, cell, 99, dtype=torch.float64)
    value, right = evaluate(u, f, evaluation="fast"), evaluate(u.double(), f)
    whole = 0.0 if f.constant else float(evaluate(around, f).abs().max())
    scale = max(float(right.abs().max()), whole)
    assert float((value - right).abs().max()) / scale <= LIMIT
    du, found = gradients(u, upstream, f, evaluation="fast")
    expected_du, expected = gradients(u.double(), upstream.double(), f)
    largest = BASES[f.basis].slope(around, f).abs().max() * upstream.abs().max()
    scale = max(float(expected_du.abs().max()), float(largest) if cell else 0.0)
    assert float((du - expected_du).abs().max()) / scale <= LIMIT
    for gradient, right in zip(found, expected, strict=True):
        assert (gradient is None) == (right is None)
        if gradient is not None and gradient is found.amplitude:
            # an odd function's terms cancel, and those of a spline that f(0) is taken from; their
            # roundings add up as their norm
            cancels = f.basis == "sine" or (f.basis == "spline" and not f.constant)
            terms = float(upstream.norm()) if cancels else 0.0
            scale = max(float(right.abs().max()), terms)
            assert float((gradient - right).abs().max()) / scale <= LIMIT
        elif gradient is not None:
            assert relative_error(gradient, right) <= LIMIT


@pytest.mark.parametrize("points", [8, 50, 512])
@pytest.mark.parametrize("radius", [1e-4, 1e-2, 0.1, 0.7, 2.0, 5.0])
def test_sinc_is_right_to_a_millionth(points: int, radius: float) -> None:
    check(sample("sinc", points), entries(radius))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("radius", [1e-4, 1e-2, 0.3])
@pytest.mark.parametrize("constant", [True, False])
def test_every_basis_is_right_to_a_millionth(
    name: BasisName, radius: float, constant: bool
) -> None:
    check(sample(name, 12, constant=constant), entries(radius))


@settings(max_examples=40)
@given(
    name=st.sampled_from(NAMES),
    log_radius=st.floats(math.log(1e-5), math.log(6)),
    log_width=st.floats(math.log(0.05), math.log(8)),
    seed=st.integers(0, 2**31),
)
def test_whatever_is_expanded_is_right(
    name: BasisName, log_radius: float, log_width: float, seed: int
) -> None:
    f = sample(name, 10, bandwidth=math.exp(log_width), seed=seed)
    u = entries(math.exp(log_radius), 1000, seed)
    if kind_of(f, float(u.abs().max())) is Direct:
        # the fallback is the formula itself, in fp64
        assert relative_error(evaluate(u, f), evaluate(u.double(), f)) <= 2**-24
    else:
        check(f, u)


class TestChoice:
    def test_narrow_ranges_take_powers_wider_ones_cells_the_widest_formulas(self) -> None:
        f = Transfer("sinc", 3.0, torch.ones(50), torch.ones(50), torch.linspace(-3, 3, 50)).wide()
        assert kind_of(f, 0.0) is Polynomial
        assert kind_of(f, 0.7) is Polynomial
        assert kind_of(f, 5.0) is Cells
        assert kind_of(f, 50.0) is Direct
        assert kind_of(f, math.inf) is kind_of(f, math.nan) is Direct

    def test_bandwidths_count_as_much_as_the_range(self) -> None:
        narrow, wide = sample(bandwidth=1.0), sample(bandwidth=50.0)
        assert kind_of(narrow, 0.5) is not Direct
        assert kind_of(wide, 0.01) is kind_of(narrow, 0.5)
        assert kind_of(wide, 0.5) is Direct

    def test_fast_says_when_it_cannot(self) -> None:
        with pytest.raises(ValueError, match=r"evaluation='fast': a sinc function on \[-50, 50\]"):
            evaluator(sample(), 50.0, torch.float32, "fast")

    def test_fp64_takes_the_formulas(self) -> None:
        assert isinstance(evaluator(sample(), 0.1, torch.float64), Direct)

    @pytest.mark.parametrize("name", [n for n in NAMES if n != "spline"])
    def test_the_degree_grows_with_the_range_until_none_will_do(self, name: BasisName) -> None:
        functions = BASES[name].amplitudes(12)
        for reach in (0.01, 0.5) if name == "polynomial" else (0.01, 0.5, 2.0, 8.0):
            degree = expansion_degree(name, reach, functions)
            assert degree is not None
            assert degree == 3 or degree > expansion_degree(name, reach / 4, functions)
        assert expansion_degree(name, 1e3, 400) is None

    def test_the_bound_of_sinc_is_the_documented_one(self) -> None:
        # 2 (x/2)^(J+1) / (J+1)! < 1e-8 gives 12 at |U| <= 0.7; ours is on the derivative
        assert expansion_degree("sinc", math.pi * 0.7, 50) == 12
        assert MAX_POWER >= 12


@pytest.mark.parametrize("name", [n for n in NAMES if n != "spline"])
def test_coefficients_stay_below_their_bounds(name: BasisName) -> None:
    """Chebyshev coefficients by a long discrete cosine transform in fp64."""
    count, radius = 200, 0.6
    angles = (torch.arange(count, dtype=torch.float64) + 0.5) * (math.pi / count)
    nodes = radius * torch.cos(angles)
    cosines = torch.cos(torch.arange(count, dtype=torch.float64)[:, None] * angles) * 2 / count
    f, basis = sample(name, 6), BASES[name]
    reach = basis.reach(f, radius)
    for m in range(len(f.amplitude)):
        one = torch.zeros_like(f.amplitude)
        one[m] = 1
        single = Transfer(f.basis, f.span, one, f.bandwidth, f.grid)
        coefficients = cosines @ basis.value(nodes, single)
        for j in range(1, 40):
            bound = math.exp(basis.log_bound(j, reach, len(f.amplitude)))
            assert abs(float(coefficients[j])) <= bound + 1e-14


def test_shapes_are_kept_and_nothing_is_changed() -> None:
    u = entries(0.3, 60).view(3, 4, 5)
    before, f = u.clone(), sample()
    assert evaluate(u, f).shape == u.shape
    assert gradients(u, torch.ones_like(u), f)[0].shape == u.shape
    assert torch.equal(u, before)
    assert evaluate(u[:0], f).shape == (0, 4, 5)
    assert evaluate(u.bfloat16(), f).dtype == torch.float32
