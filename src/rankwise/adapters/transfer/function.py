"""Linear maps by `W + s f(B A)` that keep nothing of the size of W between passes."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rankwise.adapters.transfer import operator
from rankwise.adapters.transfer.bases import ParameterGradients, Transfer
from rankwise.adapters.transfer.passes import (
    FROZEN,
    SECOND,
    Evaluation,
    Merge,
    backward_pass,
    evaluator,
    forward_pass,
    tiles,
    wide,
)


def evaluate(
    u: Float[Tensor, "*shape"], f: Transfer, *, evaluation: Evaluation = "auto"
) -> Float[Tensor, "*shape"]:
    """`f(u)` elementwise, without autograd, in fp32 or, for fp64 entries, in fp64."""
    u = wide(u.detach())
    used = evaluator(f, _radius(u), u.dtype, evaluation)
    result = _matrix(u * used.scale)
    for tile in tiles(used, result):
        used.value_(result[tile])
    return result.view(u.shape)


def gradients(
    u: Float[Tensor, "*shape"],
    upstream: Float[Tensor, "*shape"],
    f: Transfer,
    *,
    evaluation: Evaluation = "auto",
) -> tuple[Float[Tensor, "*shape"], ParameterGradients]:
    """`upstream * f'(u)`, and `sum upstream df(u)/dtheta` for every parameter, in fp64."""
    u, upstream = wide(u.detach()), wide(upstream.detach())
    used = evaluator(f, _radius(u), u.dtype, evaluation)
    result, weights = _matrix(u * used.scale), _matrix(upstream)
    for tile in tiles(used, result):
        used.backward_(result[tile], weights[tile].clone())
    return result.view(u.shape), used.gradients()


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
    radius: float = -1.0,
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
        radius: No entry of `B A` is larger in size; negative: found from the factors' norms.
    """
    parameters = (x, a, b, f.amplitude, f.bandwidth, f.grid)
    fixed = (f.basis, f.span, f.constant, scale, evaluation, radius)
    linear = operator.linear if torch.compiler.is_compiling() else _Linear.apply
    output: Tensor = linear(*parameters, weight, bias, columns, *fixed)
    return output


def _radius(u: Tensor) -> float:
    return max(float(end.abs()) for end in u.aminmax()) if u.numel() else 0.0


def _matrix(tensor: Tensor) -> Tensor:
    """The entries as a contiguous matrix."""
    return tensor.reshape(-1, tensor.shape[-1] if tensor.dim() else 1).contiguous()


class _Linear(torch.autograd.Function):
    """Keeps its inputs and the expansion of f, whose few numbers cost more to find than to keep."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *inputs: Any) -> Tensor:
        a, b, amplitude, bandwidth, grid, weight, bias, columns, *fixed = inputs
        if any(ctx.needs_input_grad[6:9]):
            raise RuntimeError(FROZEN)
        basis, span, constant, ctx.scale, evaluation, radius = fixed
        ctx.save_for_backward(x, a, b, amplitude, bandwidth, grid, weight, columns)
        f = Transfer(basis, span, amplitude, bandwidth, grid, constant)
        merge = Merge(weight, ctx.scale, columns)
        output, ctx.used = forward_pass(x, a, b, f, merge, bias, evaluation, radius)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # may be had once only
        x, a, b, *parameters, weight, columns = saved
        needs, merge = ctx.needs_input_grad, Merge(weight, ctx.scale, columns)
        asked = {"for_input": needs[0], "for_adapter": any(needs[1:6])}
        with torch.no_grad():
            found = backward_pass(grad, x, a, b, ctx.used.fresh(), merge, **asked)
        like = zip(found, (x, a, b, *parameters), needs[:6], strict=True)
        wanted = (None if g is None or not need else g.to(p.dtype) for g, p, need in like)
        return (*once_differentiable(tuple(wanted), (grad, *saved)), *[None] * 9)


class _Once(torch.autograd.Function):
    """Nothing, but that a second derivative is refused rather than left out."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *inputs: Tensor) -> Tensor:
        return gradient.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise NotImplementedError(SECOND)


def once_differentiable(
    gradients: tuple[Tensor | None, ...], inputs: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    """The gradients, which raise where somebody differentiates them by the inputs.

    torch's decorator of this name says so only if the gradient that comes in requires gradients.
    """
    if not torch.is_grad_enabled():
        return gradients
    needed = [t for t in inputs if t is not None and t.requires_grad]
    return tuple(g if g is None else _Once.apply(g, *needed) for g in gradients)
