"""The layer as an operator that `torch.compile` takes as it is.

The degree of the expansion follows from the numbers in U, which a traced graph cannot follow.
Uncompiled, calling an operator costs half a millisecond a layer, so it is used in traces only.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from rankwise.adapters.transfer.bases import BasisName, Transfer
from rankwise.adapters.transfer.passes import (
    FROZEN,
    SECOND,
    Evaluation,
    Merge,
    backward_pass,
    forward_pass,
    layer_evaluator,
)

_PARAMETERS = (
    "(Tensor x, Tensor a, Tensor b, Tensor amplitude, Tensor? bandwidth, Tensor? grid, "
    "Tensor? weight, Tensor? bias, Tensor? columns, str basis, float span, "
    "bool constant, float scale, str evaluation, float radius"
)


def _forward(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    amplitude: Tensor,
    bandwidth: Tensor | None,
    grid: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    columns: Tensor | None,
    basis: str,
    span: float,
    constant: bool,
    scale: float,
    evaluation: str,
    radius: float,
) -> Tensor:
    f = Transfer(cast(BasisName, basis), span, amplitude, bandwidth, grid, constant)
    merge = Merge(weight, scale, columns)
    return forward_pass(x, a, b, f, merge, bias, cast(Evaluation, evaluation), radius)[0]


linear = torch.library.custom_op(
    "rankwise::transfer_linear", _forward, mutates_args=(), schema=_PARAMETERS + ") -> Tensor"
)


@linear.register_fake
def _(x: Tensor, a: Tensor, b: Tensor, *_: object) -> Tensor:
    return x.new_empty((*x.shape[:-1], b.shape[0]))


def _backward(grad: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    x, a, b, amplitude, bandwidth, grid, weight, _, columns = inputs[:9]
    basis, span, constant, scale, evaluation, radius, for_input, for_adapter = inputs[9:]
    f = Transfer(basis, span, amplitude, bandwidth, grid, constant)
    merge = Merge(weight, scale, columns)
    # the trace holds no objects: f's expansion is found again
    used = layer_evaluator(f, a, b, evaluation, radius)
    found = backward_pass(grad, x, a, b, used, merge, for_input=for_input, for_adapter=for_adapter)
    like = zip(found, inputs[:6], strict=True)
    return tuple(x.new_empty(0) if g is None or p is None else g.to(p.dtype) for g, p in like)


_gradients = torch.library.custom_op(
    "rankwise::transfer_linear_backward",
    _backward,
    mutates_args=(),
    schema=_PARAMETERS.replace("(", "(Tensor grad, ", 1)
    + ", bool for_input, bool for_adapter) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@_gradients.register_fake
def _(grad: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    for_input, for_adapter = inputs[-2:]
    asked = (for_input, *[for_adapter] * 5)
    empty = grad.new_empty(0)
    return tuple(
        torch.empty_like(p) if need and p is not None else empty.clone()
        for p, need in zip(inputs[:6], asked, strict=True)
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    if any(ctx.needs_input_grad[6:9]):
        raise RuntimeError(FROZEN)
    ctx.save_for_backward(*inputs[:9])
    ctx.fixed = inputs[9:]


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad
    results = _gradients(
        grad.contiguous(), *ctx.saved_tensors, *ctx.fixed, needs[0], any(needs[1:6])
    )
    wanted = [g if need else None for g, need in zip(results, needs[:6], strict=True)]
    return (*wanted, *[None] * 9)


def _refuse(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError(SECOND)


linear.register_autograd(_differentiate, setup_context=_setup)
_gradients.register_autograd(_refuse)
