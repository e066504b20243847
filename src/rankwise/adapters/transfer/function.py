"""Linear maps by `W + s f(B A)` that keep nothing of the size of W between passes.

The forward pass saves its input and the parameters; the backward pass computes `U = B A` again,
block of rows by block of rows, because that costs r products per entry and f a few more. Both are
opaque operators to `torch.compile`: the degree of the expansion follows from the numbers in U.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from rankwise.adapters.transfer.bases import BasisName, ParameterGradients, Transfer
from rankwise.adapters.transfer.compiled import CompiledPolynomial
from rankwise.adapters.transfer.evaluators import Direct, Evaluator, Polynomial
from rankwise.adapters.transfer.expansion import expand

Evaluation = Literal["auto", "fast", "direct", "compiled"]


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


def evaluate(
    u: Float[Tensor, "*shape"], f: Transfer, *, evaluation: Evaluation = "auto"
) -> Float[Tensor, "*shape"]:
    """`f(u)` elementwise, without autograd, in fp32 or, for fp64 entries, in fp64."""
    u = _wide(u.detach())
    used = evaluator(f, _radius(u), u.dtype, evaluation)
    result = torch.empty_like(u, memory_format=torch.contiguous_format)
    size = _block(used, u)
    for chunk, out in zip(u.reshape(-1).split(size), result.view(-1).split(size), strict=True):
        out.copy_(used.value(chunk * used.scale))
    return result


def gradients(
    u: Float[Tensor, "*shape"],
    upstream: Float[Tensor, "*shape"],
    f: Transfer,
    *,
    evaluation: Evaluation = "auto",
) -> tuple[Float[Tensor, "*shape"], ParameterGradients]:
    """`upstream * f'(u)`, and `sum upstream df(u)/dtheta` for every parameter, in fp64."""
    u, upstream = _wide(u.detach()), _wide(upstream.detach())
    used = evaluator(f, _radius(u), u.dtype, evaluation)
    result = torch.empty_like(u, memory_format=torch.contiguous_format)
    size = _block(used, u)
    chunks = zip(*(t.reshape(-1).split(size) for t in (u, upstream, result)), strict=True)
    for chunk, weight, out in chunks:
        v = torch.mul(chunk, used.scale, out=used.room(len(chunk), chunk))
        out.copy_(used.backward(v, weight)[1])
    return result, used.gradients()


def transfer_linear(
    x: Float[Tensor, "*batch d_in"],
    a: Float[Tensor, "r d_in"],
    b: Float[Tensor, "d_out r"],
    f: Transfer,
    *,
    scale: float,
    weight: Float[Tensor, "d_out d_in"] | None = None,
    bias: Float[Tensor, " d_out"] | None = None,
    columns: Float[Tensor, " d_in"] | None = None,
    evaluation: Evaluation = "auto",
) -> Float[Tensor, "*batch d_out"]:
    """`x (W + s f(B A) diag(columns))' + bias` in one product (LR-LoRA section 3.3).

    With `H = dL/d(delta_W)`: `dA = B' (H * f'(U))`, `dB = (H * f'(U)) A'` and the parameters'
    gradients from moments, all in one pass over H. The largest temporaries are two matrices of the
    size of W, in the backward pass.

    Args:
        x: Input.
        a: Factor A.
        b: Factor B.
        f: Transfer function; its tensors may require gradients.
        scale: The factor s.
        weight: W, which gets no gradient; None stands for zero.
        bias: Bias, which gets no gradient.
        columns: Factors on the columns of the update: a mask on the inputs it sees.
        evaluation: See `evaluator`.
    """
    empty = x.new_empty(0)
    return cast(
        Tensor,
        _forward_op(
            x,
            a,
            b,
            f.amplitude,
            empty if f.bandwidth is None else f.bandwidth,
            empty if f.grid is None else f.grid,
            weight,
            bias,
            columns,
            f.basis,
            f.span,
            scale,
            evaluation,
        ),
    )


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _radius(u: Tensor) -> float:
    return float(u.abs().max()) if u.numel() else 0.0


def _product_radius(a: Tensor, b: Tensor) -> float:
    """Cauchy-Schwarz: `|u_ij| <= max ||b_i|| max ||a_j||`, without forming U."""
    return float(b.norm(dim=1).max() * a.norm(dim=0).max())


GRAIN = 2**15
"""Entries that torch gives a thread at least."""


def _block(used: Evaluator, tensor: Tensor) -> int:
    if tensor.device.type != "cpu":
        return 2**24  # starting an operation costs more than the cache saves
    threads = torch.get_num_threads()
    return used.block if threads == 1 else threads * max(used.block, GRAIN)


def _row_blocks(used: Evaluator, a: Tensor, b: Tensor) -> Iterator[slice]:
    rows = max(1, _block(used, a) // a.shape[1])
    for start in range(0, b.shape[0], rows):
        yield slice(start, min(start + rows, b.shape[0]))


def _function(
    amplitude: Tensor, bandwidth: Tensor, grid: Tensor, basis: str, span: float
) -> Transfer:
    return Transfer(
        cast(BasisName, basis),
        span,
        amplitude,
        bandwidth if bandwidth.numel() else None,
        grid if grid.numel() else None,
    )


def _written(
    out: Tensor, values: Tensor, scale: float, weight: Tensor | None, columns: Tensor | None
) -> None:
    """`out = weight + scale values columns`, rounded once."""
    if columns is not None:
        values = values.mul_(columns)
    if weight is None:
        torch.mul(values, scale, out=values)
        out.copy_(values)
    else:
        torch.add(weight, values, alpha=scale, out=out)


def forward_pass(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    amplitude: Tensor,
    bandwidth: Tensor,
    grid: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    columns: Tensor | None,
    basis: str,
    span: float,
    scale: float,
    evaluation: str,
) -> Tensor:
    """`transfer_linear`, without autograd; an empty tensor stands for a missing parameter."""
    with torch.autocast(x.device.type, enabled=False):
        a, b = _wide(a), _wide(b)
        f = _function(amplitude, bandwidth, grid, basis, span)
        used = evaluator(f, _product_radius(a, b), a.dtype, cast(Evaluation, evaluation))
        matrix, scaled = x.new_empty(b.shape[0], a.shape[1]), b * used.scale
        for rows in _row_blocks(used, a, b):
            values = used.value((scaled[rows] @ a).view(-1)).view(-1, a.shape[1])
            _written(matrix[rows], values, scale, None if weight is None else weight[rows], columns)
        return F.linear(x, matrix, bias)


_forward_op = torch.library.custom_op(
    "rankwise::transfer_linear",
    forward_pass,
    mutates_args=(),
    schema=(
        "(Tensor x, Tensor a, Tensor b, Tensor amplitude, Tensor bandwidth, Tensor grid, "
        "Tensor? weight, Tensor? bias, Tensor? columns, str basis, float span, float scale, "
        "str evaluation) -> Tensor"
    ),
)


@_forward_op.register_fake
def _(x: Tensor, a: Tensor, b: Tensor, *_: object) -> Tensor:
    return x.new_empty((*x.shape[:-1], b.shape[0]))


def backward_pass(
    grad: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    amplitude: Tensor,
    bandwidth: Tensor,
    grid: Tensor,
    weight: Tensor | None,
    columns: Tensor | None,
    basis: str,
    span: float,
    scale: float,
    evaluation: str,
    for_input: bool,
    for_adapter: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients by x, A, B, amplitude, bandwidth and grid; empty where not asked for."""
    with torch.autocast(x.device.type, enabled=False):
        wide_a, wide_b = _wide(a), _wide(b)
        f = _function(amplitude, bandwidth, grid, basis, span)
        radius = _product_radius(wide_a, wide_b)
        used = evaluator(f, radius, wide_a.dtype, cast(Evaluation, evaluation))
        flat = grad.reshape(-1, grad.shape[-1])
        upstream = flat.T @ x.reshape(-1, x.shape[-1]) if for_adapter else None
        matrix = x.new_empty(b.shape[0], a.shape[1]) if for_input else None
        grad_a, grad_b = torch.zeros_like(wide_a), torch.zeros_like(wide_b)
        scaled, a_t, d_in = wide_b * used.scale, wide_a.T.contiguous(), a.shape[1]
        for rows in _row_blocks(used, a, b):
            count = (rows.stop - rows.start) * d_in
            v = torch.mm(scaled[rows], wide_a, out=used.room(count, wide_a).view(-1, d_in))
            if upstream is None:
                values = used.value(v.view(-1))
            else:
                h = _wide(upstream[rows])
                if columns is not None:
                    h = h * columns
                values, slopes = used.backward(v.view(-1), h.view(-1))
                torch.mm(slopes.view(-1, d_in), a_t, out=grad_b[rows])
                grad_a.addmm_(wide_b[rows].T, slopes.view(-1, d_in))
            if matrix is not None:
                base = None if weight is None else weight[rows]
                _written(matrix[rows], values.view(-1, d_in), scale, base, columns)
        del upstream
        grad_x = x.new_empty(0) if matrix is None else (flat @ matrix).view(x.shape)
        if not for_adapter:
            none = x.new_empty(0)
            return grad_x, none, none.clone(), none.clone(), none.clone(), none.clone()
        parts = used.gradients()
        like = zip(parts, (amplitude, bandwidth, grid), strict=True)
        grads = [
            torch.zeros_like(p) if part is None else (part * scale).to(p.dtype) for part, p in like
        ]
        factors = [(g * scale).to(p.dtype) for g, p in ((grad_a, a), (grad_b, b))]
        return grad_x, factors[0], factors[1], grads[0], grads[1], grads[2]


_backward_op = torch.library.custom_op(
    "rankwise::transfer_linear_backward",
    backward_pass,
    mutates_args=(),
    schema=(
        "(Tensor grad, Tensor x, Tensor a, Tensor b, Tensor amplitude, Tensor bandwidth, "
        "Tensor grid, Tensor? weight, Tensor? columns, str basis, float span, float scale, "
        "str evaluation, bool for_input, bool for_adapter) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
)


@_backward_op.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    amplitude: Tensor,
    bandwidth: Tensor,
    grid: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:
    for_input, for_adapter = rest[-2:]
    grad_x = torch.empty_like(x) if for_input else x.new_empty(0)
    parameters = (a, b, amplitude, bandwidth, grid)
    return (
        grad_x,
        *(torch.empty_like(p) if for_adapter else x.new_empty(0) for p in parameters),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.basis, ctx.span, ctx.scale, ctx.evaluation = inputs
    x, a, b, amplitude, bandwidth, grid, weight, _, columns = tensors
    if any(ctx.needs_input_grad[i] for i in (6, 7, 8)):
        raise RuntimeError(
            "transfer_linear has no gradient for weight, bias or columns; freeze them, or add "
            "the frozen layer's own output instead of passing its weight."
        )
    ctx.save_for_backward(x, a, b, amplitude, bandwidth, grid, weight, columns)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad
    for_adapter = any(needs[1:6])
    results = _backward_op(
        grad.contiguous(),
        *ctx.saved_tensors,
        ctx.basis,
        ctx.span,
        ctx.scale,
        ctx.evaluation,
        needs[0],
        for_adapter,
    )
    wanted = [g if need else None for g, need in zip(results, needs[:6], strict=True)]
    return (*wanted, *[None] * 7)


def refuse_second(ctx: Any, *grads: Tensor) -> None:
    """Raise where somebody differentiates a gradient."""
    raise NotImplementedError(
        "LR-LoRA has no second derivative: its backward pass cannot be differentiated. Drop "
        "create_graph=True, or merge the adapter before asking for Hessians."
    )


_forward_op.register_autograd(_backward, setup_context=_setup)
_backward_op.register_autograd(refuse_second)
