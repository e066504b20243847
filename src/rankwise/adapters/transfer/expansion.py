"""A transfer function at a cost that does not grow with its number of basis functions.

f is a function of one variable on the range `[-R, R]` that the entries of U really have, and there
every basis function is a polynomial to the last digit. So all K of them are evaluated at J + 1
Chebyshev nodes only, in fp64, and their sum becomes one polynomial p of degree J:

- up to degree 14, p in powers of `v = u / R`, by Horner's rule; its derivative and the moments
  from the `T_j(v)`, because high powers of small entries are denormal numbers, which are slow;
- beyond, where powers lose digits, cubic pieces of p on a table of equal cells.

Both are linear in the node values, so the gradients of the parameters follow from the moments
`sum H_ij T_m(v_ij)` (of powers, cell by cell, for a table): carried back to weights of the nodes,
they enter the exact formulas there as if the nodes were the entries of U. A cubic spline is a table
of cells by itself.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

from rankwise.adapters.transfer.bases import (
    BASES,
    BasisName,
    ParameterGradients,
    Spline,
    Transfer,
    chebyshev_rows,
)
from rankwise.adapters.transfer.evaluators import Cells, Evaluator, Polynomial

REMAINDER = 2.0**-24
"""Largest remainder of `R f'`, in units of its size: one rounding of fp32."""
MAX_POWER = 14
"""Above it, a sum of powers cancels: its terms grow like e^x, x the reach of the range."""
MAX_CELLS = 4096
"""A table of 4,096 cubics in fp32 takes 64 KiB and stays in a core's own cache."""
MAX_DEGREE = 95
MIN_RADIUS = 1e-6
"""U may be zero; the narrowest range a function is expanded on."""


def expand(f: Transfer, radius: float, dtype: torch.dtype) -> Evaluator | None:
    """The fast evaluator of f on `[-radius, radius]`, or None where the expansion is too long.

    Args:
        f: In fp64.
        radius: No entry may be larger.
        dtype: In which it will evaluate.
    """
    if not math.isfinite(radius):
        return None
    if f.basis == "spline":
        return _spline_cells(f, dtype)
    radius = max(radius, MIN_RADIUS)
    reach = BASES[f.basis].reach(f, radius)
    if not math.isfinite(reach):
        return None
    reach = rounded_reach(reach)
    degree = expansion_degree(f.basis, reach, len(f.amplitude))
    if degree is None:
        return None
    if degree <= MAX_POWER:
        return _polynomial(f, radius, degree, dtype)
    cells = cell_count(f.basis, reach, len(f.amplitude))
    return None if cells is None else _chebyshev_cells(f, radius, degree, cells, dtype)


def rounded_reach(reach: float) -> float:
    """Up to one of eight steps an octave, so that what follows from it is looked up most times."""
    return 2.0 ** (math.ceil(8 * math.log2(max(reach, 1e-12))) / 8)


@lru_cache(maxsize=1024)
def expansion_degree(basis: BasisName, reach: float, functions: int) -> int | None:
    """The smallest degree J whose remainder is below rounding, or None above `MAX_DEGREE`.

    Interpolation in Chebyshev nodes leaves out `sum_{j>J} c_j` and folds it back once, and the
    derivative of `T_j` is at most `j^2`, so `R f'` is off by at most `2 sum_{j>J} j^2 |c_j|`. It is
    compared with `min(1, reach)`, the size of `R f'` itself.

    Args:
        basis: Its bound on `|c_j|` is `Basis.log_bound`.
        reach: As `Basis.reach` says.
        functions: Number of amplitudes.
    """
    bound = BASES[basis].log_bound
    allowed = REMAINDER * min(1.0, reach)
    terms = [
        2 * j * j * math.exp(min(bound(j, reach, functions), 300.0))
        for j in range(2 * MAX_DEGREE + 2)
    ]
    tail, degree = 0.0, len(terms) - 1
    while degree >= 4 and tail + terms[degree] <= allowed:
        tail += terms[degree]
        degree -= 1
    return degree if degree <= MAX_DEGREE else None


@lru_cache(maxsize=1024)
def cell_count(basis: BasisName, reach: float, functions: int) -> int | None:
    """Cells, a power of two, for cubics whose derivative is off by less than rounding, or None.

    A cubic through four equally spaced points of a cell of width h has a derivative off by at most
    `h^3 |f''''| / 108`; with `|f''''| <= x^4` and `|f'| ~ x` on `[-1, 1]`, `h^3 x^3 / 108`.
    """
    frequency = reach
    if basis == "polynomial":
        # T_m oscillates faster towards the ends, like m / sqrt(1 - y^2)
        if reach >= 0.95:
            return None
        frequency = 2 * (functions - 1) * reach / math.sqrt(1 - reach**2)
    needed = 2 * frequency / (108 * REMAINDER) ** (1 / 3)
    cells = max(256, 2 ** math.ceil(math.log2(needed)))
    return int(cells) if cells <= MAX_CELLS else None


@lru_cache(maxsize=128)
def _interpolation(degree: int) -> tuple[Tensor, Tensor]:
    """Chebyshev nodes of [-1, 1], and the matrix from values there to Chebyshev coefficients."""
    count = degree + 1
    angles = (torch.arange(count, dtype=torch.float64) + 0.5) * (math.pi / count)
    matrix = torch.cos(torch.arange(count, dtype=torch.float64)[:, None] * angles) * (2 / count)
    matrix[0] /= 2
    return torch.cos(angles), matrix


@lru_cache(maxsize=32)
def power_map(degree: int) -> tuple[Tensor, Tensor]:
    """The nodes, and the matrix from values there to coefficients of powers."""
    nodes, matrix = _interpolation(degree)
    powers = torch.zeros(degree + 1, degree + 1, dtype=torch.float64)  # T_j in powers, by rows
    powers[0, 0] = powers[1, 1] = 1
    for j in range(2, degree + 1):
        powers[j, 1:] = 2 * powers[j - 1, :-1]
        powers[j] -= powers[j - 2]
    return nodes, powers.T @ matrix


@lru_cache(maxsize=32)
def _slope_map(degree: int) -> Tensor:
    """From Chebyshev coefficients of p to those of p': `T_j' = 2 j (T_{j-1} + T_{j-3} + ...)`."""
    slopes = torch.zeros(degree + 1, degree + 1, dtype=torch.float64)
    for j in range(1, degree + 1):
        slopes[(j - 1) % 2 : j : 2, j] = 2 * j
    slopes[0] /= 2
    return slopes


def _polynomial(f: Transfer, radius: float, degree: int, dtype: torch.dtype) -> Evaluator:
    device = f.amplitude.device
    nodes, matrix = (part.to(device) for part in _interpolation(degree))
    nodes, powers = nodes * radius, power_map(degree)[1].to(device)
    values = f.value(nodes)
    chebyshev = matrix @ values

    def adjoint(moments: Tensor) -> ParameterGradients:
        return f.gradients(nodes, moments @ matrix)

    slopes = _slope_map(degree).to(device) @ chebyshev / radius
    return Polynomial(powers @ values, (chebyshev, slopes), radius, adjoint, dtype)


_THIRDS = torch.linspace(0, 1, 4, dtype=torch.float64)
_CUBIC = torch.linalg.inv(torch.stack([_THIRDS**m for m in range(4)], dim=1))
"""From values at 0, 1/3, 2/3 and 1 to the coefficients of a cubic."""


@lru_cache(maxsize=8)
def _rows_at_thirds(cells: int, device: torch.device) -> Float[Tensor, "degrees points"]:
    """`T_j` at the thirds of all cells of [-1, 1], for every degree up to the largest."""
    points = torch.linspace(-1, 1, 3 * cells + 1, dtype=torch.float64, device=device)
    return chebyshev_rows(points, MAX_DEGREE + 1)


def _chebyshev_cells(
    f: Transfer, radius: float, degree: int, cells: int, dtype: torch.dtype
) -> Evaluator:
    device = f.amplitude.device
    nodes, matrix = (part.to(device) for part in _interpolation(degree))
    nodes, cubic = nodes * radius, _CUBIC.to(device)
    rows = _rows_at_thirds(cells, device)[: degree + 1]
    values = (matrix @ f.value(nodes)) @ rows
    table = cubic @ torch.stack([values[q : q + 3 * cells - 2 : 3] for q in range(4)])

    def adjoint(moments: Tensor) -> ParameterGradients:
        weights = torch.zeros_like(values)
        for q, part in enumerate(cubic.T @ moments):
            weights[q : q + 3 * cells - 2 : 3] += part
        return f.gradients(nodes, (rows @ weights) @ matrix)

    return Cells(table, cells / (2 * radius), cells / 2, adjoint, dtype)


_B_SPLINE = (
    torch.tensor(
        [[1, 4, 1, 0], [-3, 0, 3, 0], [3, -6, 3, 0], [-1, 3, -3, 1]],
        dtype=torch.float64,
    )
    / 6
)
"""From the amplitudes around a cell, `a_{i-1}, ..., a_{i+2}`, to the coefficients of its cubic."""


def _spline_cells(f: Transfer, dtype: torch.dtype) -> Evaluator:
    """The pieces of a spline, with a cell of zeros on each side for what lies outside."""
    matrix, count = _B_SPLINE.to(f.amplitude.device), len(f.amplitude)
    padded = torch.nn.functional.pad(f.amplitude, (4, 4))

    def adjoint(moments: Tensor) -> ParameterGradients:
        gradient = torch.zeros_like(padded)
        for q, part in enumerate(matrix.T @ moments):
            gradient[q : q + count + 5] += part
        if not f.constant:
            gradient[4:-4] -= moments[0].sum() * at_zero
        return ParameterGradients(gradient[4:-4], None, None)

    step = Spline.step(f)
    table = matrix @ padded.unfold(0, 4, 1).T
    at_zero = Spline().functions(f.amplitude.new_zeros(1), f)[0]
    if not f.constant:
        table[0] -= at_zero @ f.amplitude
    return Cells(table, 1 / step, f.span / step + 3, adjoint, dtype)
