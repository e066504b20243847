"""The forward and the backward pass of `x (W + s f(B A))'`, without autograd.

The backward pass computes `U = B A` again, because that costs r products per entry and f a few
more. Products are of whole matrices, on all threads; f is evaluated in place, tile by tile.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from rankwise.adapters.transfer.bases import Transfer
from rankwise.adapters.transfer.compiled import CompiledPolynomial
from rankwise.adapters.transfer.evaluators import Direct, Evaluator, Polynomial
from rankwise.adapters.transfer.expansion import expand
from rankwise.adapters.transfer.scratch import scratch

Evaluation = Literal["auto", "fast", "direct", "compiled"]

FROZEN = (
    "transfer_linear has no gradient for weight, bias or columns; freeze them, or add the frozen "
    "layer's own output instead of passing its weight."
)
SECOND = (
    "LR-LoRA has no second derivative: its backward pass cannot be differentiated. Drop "
    "create_graph=True, or merge the adapter before asking for Hessians."
)


def evaluator(
    f: Transfer, radius: float, dtype: torch.dtype, evaluation: Evaluation = "auto"
) -> Evaluator:
    """The way to evaluate f on `[-radius, radius]`.

    Args:
        f: The function.
        radius: No entry is larger in size.
        dtype: fp32 or fp64, of entries and results.
        evaluation: `"auto"` expands f if its entries are fp32 and the expansion is short enough,
            else takes the formulas; `"compiled"` is the same with polynomials compiled by
            `torch.compile`; `"direct"` always takes the formulas; `"fast"` never does.

    Raises:
        ValueError: `evaluation="fast"` and the expansion would be too long.
    """
    wide = f.wide()
    if evaluation == "direct" or (evaluation != "fast" and dtype == torch.float64):
        return Direct(wide, dtype)
    found = expand(wide, radius, dtype)
    if isinstance(found, Polynomial) and evaluation == "compiled":
        return CompiledPolynomial(found)
    if found is not None:
        return found
    if evaluation == "fast":
        raise ValueError(
            f"evaluation='fast': a {f.basis} function on [-{radius:g}, {radius:g}] takes too long "
            "an expansion; use 'auto' or 'direct', or lower its bandwidths."
        )
    return Direct(wide, dtype)


def wide(tensor: Tensor) -> Tensor:
    """The tensor in fp32, or in fp64 if it is."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def largest_norms(a: Float[Tensor, "r d_in"], b: Float[Tensor, "d_out r"]) -> tuple[float, float]:
    """`max ||a_j||` and `max ||b_i||`, whose product no entry of `B A` exceeds (Cauchy-Schwarz)."""
    a, b = wide(a), wide(b)  # half precision would round the bound below what it bounds
    # norm() along the short side of a matrix costs ten times as much
    squares = torch.stack([a.square().sum(dim=0).max(), b.square().sum(dim=1).max()])
    largest_a, largest_b = squares.sqrt().tolist()
    return largest_a, largest_b


def tiles(used: Evaluator, matrix: Tensor) -> Iterator[tuple[slice, slice]]:
    """Contiguous pieces of a matrix, each as large as its evaluator likes them."""
    # starting an operation on a GPU costs more than a cache saves; a dozen rows take 100 MiB
    size = used.block if matrix.device.type == "cpu" else max(used.block, 2**21)
    height, width = matrix.shape
    if not matrix.numel():
        return
    rows, columns = max(1, size // width), min(width, size)
    for top in range(0, height, rows):
        for left in range(0, width, columns):
            yield slice(top, min(top + rows, height)), slice(left, min(left + columns, width))


class Merge(NamedTuple):
    """What becomes of `f(U)`: `weight + scale f(U) columns`."""

    weight: Tensor | None
    scale: float
    columns: Tensor | None

    def options(self, tile: tuple[slice, slice]) -> dict[str, Any]:
        """For an evaluator, which leaves the columns to `finish_`."""
        if self.columns is None and self.weight is not None:
            return {"scale": self.scale, "base": self.weight[tile]}
        return {"scale": self.scale}

    def finish_(self, values: Tensor, tile: tuple[slice, slice]) -> None:
        """Multiply the columns and add the weight, where that is not done yet."""
        if self.columns is not None:
            values.mul_(self.columns[tile[1]])
            if self.weight is not None:
                values.add_(self.weight[tile])


def layer_evaluator(
    f: Transfer, a: Tensor, b: Tensor, evaluation: Evaluation, radius: float
) -> Evaluator:
    """The way to evaluate f on `B A`; a negative radius is found from the factors' norms."""
    radius = math.prod(largest_norms(a, b)) if radius < 0 else radius
    return evaluator(f, radius, wide(a).dtype, evaluation)


def forward_pass(
    x: Float[Tensor, "*batch d_in"],
    a: Float[Tensor, "r d_in"],
    b: Float[Tensor, "d_out r"],
    f: Transfer,
    merge: Merge,
    bias: Float[Tensor, " d_out"] | None,
    evaluation: Evaluation,
    radius: float,
) -> tuple[Float[Tensor, "*batch d_out"], Evaluator]:
    """The output, and f as it was evaluated, for the backward pass."""
    with torch.autocast(x.device.type, enabled=False):
        a, b = wide(a), wide(b)
        used = layer_evaluator(f, a, b, evaluation, radius)
        matrix = _product(used, a, b)
        for tile in tiles(used, matrix):
            used.value_(matrix[tile], **merge.options(tile))
            merge.finish_(matrix[tile], tile)
        return F.linear(x, _laid_out_like(merge.weight, matrix.to(x.dtype)), bias), used


class Gradients(NamedTuple):
    """By the input, the factors and f's parameters; None where not asked for or not there."""

    x: Tensor | None
    a: Tensor | None = None
    b: Tensor | None = None
    amplitude: Tensor | None = None
    bandwidth: Tensor | None = None
    grid: Tensor | None = None


def backward_pass(
    grad: Float[Tensor, "*batch d_out"],
    x: Float[Tensor, "*batch d_in"],
    a: Float[Tensor, "r d_in"],
    b: Float[Tensor, "d_out r"],
    used: Evaluator,
    merge: Merge,
    *,
    for_input: bool,
    for_adapter: bool,
) -> Gradients:
    """The gradients.

    Args:
        grad: By the output.
        x: Input.
        a: Factor A.
        b: Factor B.
        used: From the forward pass, with no gradients gathered.
        merge: As in the forward pass.
        for_input: Whether x needs one.
        for_adapter: Whether any parameter does.
    """
    with torch.autocast(x.device.type, enabled=False):
        wide_a, wide_b = wide(a), wide(b)
        flat, u = grad.reshape(-1, grad.shape[-1]), _product(used, wide_a, wide_b)
        matrix = scratch.matrix(1, u.shape[0], u.shape[1], x)
        if for_adapter:
            # H, tile by tile replaced by the matrix of the forward pass
            torch.mm(flat.T, x.reshape(-1, x.shape[-1]), out=matrix)
        for tile in tiles(used, u):
            if for_adapter:
                values = wide(matrix[tile])
                if merge.columns is not None:
                    values *= merge.columns[tile[1]]
                used.backward_(u[tile], values, **merge.options(tile))
            else:
                values = u[tile]
                used.value_(values, **merge.options(tile))
            merge.finish_(values, tile)
            if values.data_ptr() != matrix[tile].data_ptr():
                matrix[tile] = values
        grad_x = (flat @ matrix).view(x.shape) if for_input else None
        if not for_adapter:
            return Gradients(grad_x)
        grad_a, grad_b = (wide_b.T @ u).mul_(merge.scale), (u @ wide_a.T).mul_(merge.scale)
        parts = (None if p is None else p * merge.scale for p in used.gradients())
        return Gradients(grad_x, grad_a, grad_b, *parts)


def _laid_out_like(weight: Tensor | None, matrix: Tensor) -> Tensor:
    """The matrix in the weight's memory order, in the second scratch matrix.

    A BLAS may round products of a transposed matrix differently, and a fresh adapter must be its
    base to the last bit. `Conv1D` is the layer that keeps its weight transposed.
    """
    if weight is None or weight.is_contiguous() or not weight.T.is_contiguous():
        return matrix
    rows, columns = matrix.shape
    return scratch.matrix(1, columns, rows, matrix).copy_(matrix.T).T


def _product(used: Evaluator, a: Tensor, b: Tensor) -> Tensor:
    """U, in the units of an evaluator and in the first scratch matrix."""
    return torch.mm(b * used.scale, a, out=scratch.matrix(0, len(b), a.shape[1], a))
