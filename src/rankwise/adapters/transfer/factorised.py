"""f(B A) as a LoRA of higher rank, where the range of U = B A is small.

On `[-R, R]` f is a polynomial of degree J to within `TRUNCATION`, and the power
`u_ij^d = (sum_k b_ik a_kj)^d` is `sum_m D_m b_i^m a_j^m` over the `C(r + d - 1, d)` monomials m of
degree d, D_m the multinomial coefficients. So `p(B A)` is exactly a product of two factors of rank
`C(r + J, J)` (1 + 8 + 36 = 45 for r = 8 and J = 2), whose rows are Khatri-Rao powers of A and B.
Forward and backward pass cost what a LoRA of that rank costs, and form no matrix of the size of W.
"""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import combinations_with_replacement, pairwise
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from rankwise.adapters.transfer.bases import BASES, BasisName, ParameterGradients, Transfer
from rankwise.adapters.transfer.expansion import MIN_RADIUS, power_map, rounded_reach
from rankwise.adapters.transfer.function import once_differentiable
from rankwise.adapters.transfer.passes import largest_norms

TRUNCATION = 1e-6
"""Largest error of `p`, in units of the sum of the amplitudes' sizes (or of 1, for `"sine"`)."""
SLOPE = 1e-4
"""Largest error of `R p'`, in the same units times the reach: what the gradients of A and B see."""
MIN_FACTORISED = 2
"""Degree 1 has a constant slope, but f starts even: then only f'' moves A and B."""
MAX_FACTORISED = 3
"""Degree 4 at r = 8 has 495 monomials and pays for no layer below d = 3,000."""
DENSE_TOKENS = 300
"""What f, its gradients and the sum with W cost, in tokens of one product with W."""


class Factorised(NamedTuple):
    """That f may be factorised: the degree, and the bounds of a row of B and a column of A."""

    degree: int
    radius_a: float
    radius_b: float


class _Monomials(NamedTuple):
    """The monomials of one degree: each is one of the degree below times one variable."""

    parent: Tensor
    last: Tensor
    multiplicity: Tensor


def factorisation(
    f: Transfer,
    a: Float[Tensor, "r d_in"],
    b: Float[Tensor, "d_out r"],
    tokens: int,
    norms: tuple[float, float] | None = None,
) -> Factorised | None:
    """Whether p(B A) is close enough to f(B A) and cheaper, and its degree; None if not.

    By Cauchy-Schwarz `|u_ij| <= max ||b_i|| max ||a_j|| = R`. The products that a LoRA of rank m
    takes in a step cost `3 m (d_in + d_out)` for each token, and the dense way at least
    `(tokens + DENSE_TOKENS) d_in d_out` for its gradient and for f.

    Args:
        f: The function.
        a: Factor A.
        b: Factor B.
        tokens: Rows of the input.
        norms: What `largest_norms` says of the factors, if it was asked already.
    """
    if a.dtype != torch.float32 or f.basis == "spline":
        return None
    radius_a, radius_b = largest_norms(a, b) if norms is None else norms
    reach = BASES[f.basis].reach(f, max(radius_a * radius_b, MIN_RADIUS))
    if not math.isfinite(reach):
        return None
    degree = factorised_degree(f.basis, rounded_reach(reach), len(f.amplitude))
    if degree is None:
        return None
    (r, d_in), d_out = a.shape, b.shape[0]
    cost = 3 * math.comb(r + degree, degree) * (d_in + d_out) * tokens
    if cost > (tokens + DENSE_TOKENS) * d_in * d_out:
        return None
    radius_a = radius_a or 1.0
    return Factorised(degree, radius_a, max(radius_b, MIN_RADIUS / radius_a))


@lru_cache(maxsize=1024)
def factorised_degree(basis: BasisName, reach: float, functions: int) -> int | None:
    """The smallest degree J within `TRUNCATION` and `SLOPE`, or None above the largest.

    Interpolation in Chebyshev nodes is off by at most `2 sum_{j>J} |c_j|` for every basis function,
    and `R` times its derivative by at most `2 sum_{j>J} j^2 |c_j|`.
    """
    bound = BASES[basis].log_bound
    terms = [2 * math.exp(min(bound(j, reach, functions), 300.0)) for j in range(200)]
    slope = SLOPE * min(1.0, reach)
    for degree in range(MIN_FACTORISED, MAX_FACTORISED + 1):
        left = range(degree + 1, len(terms))
        if (
            sum(terms[j] for j in left) <= TRUNCATION
            and sum(j * j * terms[j] for j in left) <= slope
        ):
            return degree
    return None


def factorised_linear(
    x: Float[Tensor, "*batch d_in"],
    a: Float[Tensor, "r d_in"],
    b: Float[Tensor, "d_out r"],
    f: Transfer,
    way: Factorised,
    *,
    scale: float,
    weight: Float[Tensor, "d_out d_in"] | None = None,
    bias: Float[Tensor, " d_out"] | None = None,
    columns: Float[Tensor, " d_in"] | None = None,
) -> Float[Tensor, "*batch d_out"]:
    """`transfer_linear` with p in place of f, its gradients exact for p.

    Args:
        x: Input, of the factors' dtype.
        a: Factor A.
        b: Factor B.
        f: Transfer function; its tensors may require gradients.
        way: What `factorisation` found.
        scale: The factor s.
        weight: W, which gets no gradient; None stands for zero.
        bias: Bias, which gets no gradient.
        columns: Factors on the columns of the update.
    """
    parameters = (x, a, b, f.amplitude, f.bandwidth, f.grid)
    fixed = (f.basis, f.span, f.constant, way, scale)
    output: Tensor = _Linear.apply(*parameters, weight, bias, columns, fixed)
    return output


@lru_cache(maxsize=64)
def _monomials(r: int, degree: int, device: torch.device) -> tuple[_Monomials, ...]:
    """Degrees 2 to `degree`, in rising order of variables."""
    found: list[_Monomials] = []
    below: dict[tuple[int, ...], int] = {(k,): k for k in range(r)}
    for d in range(2, degree + 1):
        names = list(combinations_with_replacement(range(r), d))
        counts = [
            math.factorial(d) / math.prod(math.factorial(name.count(k)) for k in set(name))
            for name in names
        ]
        found.append(
            _Monomials(
                torch.tensor([below[name[:-1]] for name in names], device=device),
                torch.tensor([name[-1] for name in names], device=device),
                torch.tensor(counts, device=device),
            )
        )
        below = {name: i for i, name in enumerate(names)}
    return tuple(found)


@lru_cache(maxsize=64)
def _spans(r: int, degree: int) -> list[slice]:
    """Where the monomials of each degree, 0 to `degree`, stand."""
    ends = [0, *(math.comb(r + d, d) for d in range(degree + 1))]
    return [slice(*pair) for pair in pairwise(ends)]


@lru_cache(maxsize=64)
def _counts(r: int, degree: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Of every monomial its degree, and its multinomial coefficient in a column."""
    spans, steps = _spans(r, degree), _monomials(r, degree, device)
    ones = torch.ones(1 + r if degree else 1, device=device)
    counts = torch.cat([ones, *(step.multiplicity for step in steps)])
    sizes = torch.tensor([span.stop - span.start for span in spans], device=device)
    return torch.arange(degree + 1, device=device).repeat_interleave(sizes), counts[:, None]


def khatri_rao(rows: Float[Tensor, "r d"], degree: int) -> Float[Tensor, "m d"]:
    """All monomials of the rows up to a degree, by degree."""
    r, spans = len(rows), _spans(len(rows), degree)
    out = rows.new_empty(spans[-1].stop, rows.shape[1])
    out[0] = 1
    if degree:
        out[spans[1]] = rows
    for d, step in enumerate(_monomials(r, degree, rows.device), start=2):
        torch.mul(out[spans[d - 1]][step.parent], rows[step.last], out=out[spans[d]])
    return out


def khatri_rao_adjoint(
    rows: Float[Tensor, "r d"], powers: Float[Tensor, "m d"], upstream: Float[Tensor, "m d"]
) -> Float[Tensor, "r d"]:
    """From the gradient by `khatri_rao(rows)` to that by the rows; `upstream` is used up."""
    r, gradient, degree = len(rows), torch.zeros_like(rows), 0
    while math.comb(r + degree, degree) < len(powers):
        degree += 1
    spans, steps = _spans(r, degree), _monomials(r, degree, rows.device)
    for d in range(degree, 1, -1):
        parent, last, _ = steps[d - 2]
        part = upstream[spans[d]]
        gradient.index_add_(0, last, part * powers[spans[d - 1]][parent])
        upstream[spans[d - 1]].index_add_(0, parent, part * rows[last])
    return gradient.add_(upstream[spans[1]]) if degree else gradient


class _Polynomial:
    """p as a function of the monomials: few numbers, found once for both passes."""

    def __init__(self, f: Transfer, way: Factorised, r: int) -> None:
        self.f, self.way, device = f.wide(), way, f.amplitude.device
        nodes, self.matrix = (part.to(device) for part in power_map(way.degree))
        self.nodes = nodes * (way.radius_a * way.radius_b)
        self.degrees, self.counts = _counts(r, way.degree, device)
        coefficients = self.matrix @ self.f.value(self.nodes)
        self.weights = coefficients[self.degrees][:, None] * self.counts

    def gradients(self, sums: Float[Tensor, "m 1"]) -> ParameterGradients:
        """By f's parameters, from those by the weights."""
        sums = sums.double() * self.counts
        moments = sums.new_zeros(len(self.nodes)).index_add_(0, self.degrees, sums[:, 0])
        return self.f.gradients(self.nodes, moments @ self.matrix)


class _Factors:
    """The two factors of `p(B A)`, and the way back from their gradients."""

    def __init__(self, a: Tensor, b: Tensor, p: _Polynomial) -> None:
        self.p, self.weights = p, p.weights.to(a.dtype)
        self.rows_a, self.rows_b = a / p.way.radius_a, b.T / p.way.radius_b
        self.powers_a = khatri_rao(self.rows_a, p.way.degree)
        self.powers_b = khatri_rao(self.rows_b, p.way.degree)

    def weighted_b(self, scale: float) -> Tensor:
        """The right factor `(m, d_out)`, with coefficients and scale."""
        return self.powers_b * (self.weights * scale)

    def adjoint(self, grad_a: Tensor, grad_b: Tensor) -> tuple[Tensor, Tensor, ParameterGradients]:
        """From `d/d powers_a` and `d/d weighted_b(1)` to A, B and the parameters of f."""
        parameters = self.p.gradients((grad_b * self.powers_b).sum(dim=1, keepdim=True))
        a = khatri_rao_adjoint(self.rows_a, self.powers_a, grad_a) / self.p.way.radius_a
        weighted = grad_b.mul_(self.weights)
        b = khatri_rao_adjoint(self.rows_b, self.powers_b, weighted) / self.p.way.radius_b
        return a, b.T, parameters


class _Linear(torch.autograd.Function):
    """Keeps its input and `z`, the input in the left factor; the factors are made twice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *inputs: Any) -> Tensor:
        a, b, amplitude, bandwidth, grid, weight, bias, columns, fixed = inputs
        if any(ctx.needs_input_grad[6:9]):
            raise RuntimeError(
                "factorised_linear has no gradient for weight, bias or columns; freeze them."
            )
        basis, span, constant, way, ctx.scale = fixed
        with torch.autocast(x.device.type, enabled=False):
            f = Transfer(basis, span, amplitude, bandwidth, grid, constant)
            ctx.polynomial = _Polynomial(f, way, len(a))
            factors = _Factors(a, b, ctx.polynomial)
            left = factors.powers_a if columns is None else factors.powers_a * columns
            flat = x.reshape(-1, x.shape[-1])
            z, right = flat @ left.T, factors.weighted_b(ctx.scale)
            if weight is None:
                out = z @ right if bias is None else torch.addmm(bias, z, right)
            else:
                out = F.linear(flat, weight, bias).addmm_(z, right)
        ctx.save_for_backward(x, z, a, b, amplitude, bandwidth, grid, weight, columns)
        return out.view(*x.shape[:-1], b.shape[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # may be had once only
        with torch.no_grad():
            results = _Linear.gradients(ctx, saved, grad)
        return once_differentiable(results, (grad, *saved))

    @staticmethod
    def gradients(ctx: Any, saved: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor | None, ...]:
        """By x, A, B and the parameters of f."""
        x, z, a, b, amplitude, bandwidth, grid, weight, columns = saved
        scale, needs = ctx.scale, ctx.needs_input_grad
        with torch.autocast(x.device.type, enabled=False):
            factors = _Factors(a, b, ctx.polynomial)
            left = factors.powers_a if columns is None else factors.powers_a * columns
            flat, back = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
            u = back @ factors.weighted_b(scale).T
            grad_x = None
            if needs[0]:
                grad_x = u @ left if weight is None else (back @ weight).addmm_(u, left)
                grad_x = grad_x.view(x.shape)
            if not any(needs[1:6]):
                return (grad_x, *[None] * 9)
            grad_left = u.T @ flat
            if columns is not None:
                grad_left *= columns
            d_a, d_b, parts = factors.adjoint(grad_left, (z.T @ back).mul_(scale))
        like = zip(parts, (amplitude, bandwidth, grid), needs[3:6], strict=True)
        parameters = [
            part.to(p.dtype) if part is not None and need else None for part, p, need in like
        ]
        return (grad_x, d_a, d_b, *parameters, *[None] * 4)
