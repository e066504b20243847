"""Formulas and grids against printed definitions, term by term."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from rankwise.adapters.transfer import BASES, BasisName, GridKind, Transfer, grid_points
from rankwise.adapters.transfer.bases import sinc_derivative
from transfer_samples import GRIDS, NAMES, reference, sample

WITH_GRIDS = [
    (name, grid) for name in NAMES for grid in (GRIDS if BASES[name].local else GRIDS[:1])
]


@pytest.mark.parametrize(("name", "grid"), WITH_GRIDS)
class TestFormulas:
    U = torch.linspace(-3.7, 3.7, 41, dtype=torch.float64)

    def test_value(self, name: BasisName, grid: GridKind) -> None:
        f = sample(name, 5, grid=grid)
        expected = torch.tensor([reference(u, f) for u in self.U.tolist()], dtype=torch.float64)
        torch.testing.assert_close(BASES[name].value(self.U, f), expected, rtol=1e-11, atol=1e-12)

    def test_slope_and_gradients_are_differences(self, name: BasisName, grid: GridKind) -> None:
        f, basis, h = sample(name, 5, grid=grid), BASES[name], 1e-5
        upper, lower = basis.value(self.U + h, f), basis.value(self.U - h, f)
        slope = basis.slope(self.U, f)
        scale = slope.abs().max()
        assert ((upper - lower) / (2 * h) - slope).abs().max() < 1e-6 * scale
        upstream = torch.cos(3 * self.U)
        found = basis.gradients(self.U, upstream, f)
        for parameter in ("amplitude", "bandwidth", "grid"):
            gradient, tensor = getattr(found, parameter), getattr(f, parameter)
            assert (gradient is None) == (tensor is None)
            for k in range(0 if tensor is None else len(tensor)):
                if name == "sine":
                    continue
                shift = torch.zeros_like(tensor)
                shift[k] = h
                ends = [
                    upstream @ basis.value(self.U, replace(f, **{parameter: tensor + sign * shift}))
                    for sign in (1, -1)
                ]
                difference = (ends[0] - ends[1]) / (2 * h)
                assert abs(difference - gradient[k]) < 1e-6 * gradient.abs().max() + 1e-9


def test_the_derivative_of_sinc_keeps_its_digits_near_zero() -> None:
    t = torch.logspace(-12, 0, 200, dtype=torch.float64)
    # -pi^2 integral of s sin(pi s t) / pi over [0, 1], by Gauss's rule: nothing cancels
    nodes, weights = map(torch.from_numpy, np.polynomial.legendre.leggauss(30))
    s = (nodes + 1) / 2
    expected = (-math.pi * s * torch.sin(math.pi * t[:, None] * s)) @ (weights / 2)
    torch.testing.assert_close(sinc_derivative(t), expected, rtol=1e-13, atol=0)
    torch.testing.assert_close(sinc_derivative(-t), -expected, rtol=1e-13, atol=0)
    assert sinc_derivative(torch.zeros(1)) == 0


class TestGrids:
    def test_uniform_and_learned(self) -> None:
        expected = torch.tensor([-3, -1.5, 0, 1.5, 3], dtype=torch.float64)
        assert torch.equal(grid_points("uniform", 5, 3.0), expected)
        assert torch.equal(grid_points("learned", 5, 3.0), expected)
        assert torch.equal(grid_points("uniform", 5, 3.0, shift=0.25), expected + 0.375)

    def test_chebyshev_points_are_the_zeros_of_the_polynomial(self) -> None:
        points = grid_points("chebyshev", 7, 3.0)
        f = Transfer("polynomial", 3.0, torch.eye(8, dtype=torch.float64)[7])
        assert BASES["polynomial"].value(points, f).abs().max() < 1e-14
        assert (points.diff() > 0).all()

    def test_random_points_come_from_their_seed(self) -> None:
        points = grid_points("random", 1000, 3.0, seed=1)
        assert torch.equal(points, grid_points("random", 1000, 3.0, seed=1))
        assert not torch.equal(points, grid_points("random", 1000, 3.0, seed=2))
        assert (points.diff() >= 0).all()
        assert -3 <= points[0] < -2.9 < 2.9 < points[-1] <= 3


def test_bases_have_equally_many_parameters() -> None:
    for name in NAMES:
        per_function = 2 if BASES[name].local else 1
        expected = 1 if name == "sine" else 2 * 50
        assert per_function * BASES[name].amplitudes(50) == expected
