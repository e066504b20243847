"""Transfer functions that look trained, and a slow reference for each basis in fp64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rankwise.adapters.transfer import BASES, BasisName, GridKind, Transfer, grid_points

NAMES: tuple[BasisName, ...] = ("sinc", "rbf", "spline", "fourier", "polynomial", "sine")
GRIDS: tuple[GridKind, ...] = ("uniform", "chebyshev", "random", "learned")


def sample(
    basis: BasisName = "sinc",
    points: int = 50,
    *,
    grid: GridKind = "uniform",
    bandwidth: float = 1.0,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    constant: bool = True,
) -> Transfer:
    """Amplitudes of both signs and bandwidths spread by a third about `bandwidth`."""
    generator = torch.Generator().manual_seed(seed)
    if basis == "sine":
        return Transfer(basis, 20.0 * bandwidth, torch.ones(1, dtype=dtype), constant=constant)
    count = BASES[basis].amplitudes(points)
    amplitude = 0.3 * torch.randn(count, generator=generator, dtype=torch.float64)
    if not BASES[basis].local:
        return Transfer(basis, 3.0, amplitude.to(dtype), constant=constant)
    spread = 0.3 * torch.randn(points, generator=generator, dtype=torch.float64).clamp(-2, 2)
    g = grid_points(grid, points, 3.0, seed=seed)
    if grid == "learned":
        g = g + 0.05 * torch.randn(points, generator=generator, dtype=torch.float64)
    w = bandwidth * torch.exp(spread)
    return Transfer(basis, 3.0, amplitude.to(dtype), w.to(dtype), g.to(dtype), constant)


def reference(u: float, f: Transfer) -> float:
    """`f(u)` term by term, from the printed formulas, in Python's own floats."""
    a = f.amplitude.tolist()
    if f.basis == "sine":
        return math.sin(f.span * u)
    if f.basis == "fourier":
        k = len(a) // 2
        angles = [math.pi * m * u / f.span for m in range(1, k + 1)]
        sines = sum(c * math.sin(t) for c, t in zip(a[:k], angles, strict=True))
        return sines + sum(c * math.cos(t) for c, t in zip(a[k:], angles, strict=True))
    if f.basis == "polynomial":
        x = u / f.span
        if abs(x) <= 1:
            return sum(c * math.cos(m * math.acos(x)) for m, c in enumerate(a))
        sign = math.copysign(1, x)
        return sum(c * sign**m * math.cosh(m * math.acosh(abs(x))) for m, c in enumerate(a))
    if f.basis == "spline":
        h = 2 * f.span / (len(a) - 1)
        return sum(c * _cox_de_boor((u + f.span) / h - m + 2, 3) for m, c in enumerate(a))
    assert f.bandwidth is not None and f.grid is not None
    ts = [w * (u - g) for w, g in zip(f.bandwidth.tolist(), f.grid.tolist(), strict=True)]
    if f.basis == "rbf":
        return sum(c * math.exp(-t * t) for c, t in zip(a, ts, strict=True))
    terms = [math.sin(math.pi * t) / (math.pi * t) if t else 1.0 for t in ts]
    return sum(c * term for c, term in zip(a, terms, strict=True))


def _cox_de_boor(x: float, degree: int) -> float:
    """The B-spline on the knots 0, 1, ..., degree + 1."""
    if degree == 0:
        return float(0 <= x < 1)
    left, right = _cox_de_boor(x, degree - 1), _cox_de_boor(x - 1, degree - 1)
    return (x * left + (degree + 1 - x) * right) / degree


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest error in units of the largest expected element."""
    wide = expected.double()
    return float((actual.double() - wide).abs().max() / wide.abs().max())
