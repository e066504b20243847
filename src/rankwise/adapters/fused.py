"""The fused layer: a low-rank or block-diagonal update in as few passes over memory as possible.

`y = y0 + s blockdiag(B_1 A_1, ..., B_n A_n) x` costs little arithmetic and much memory traffic. So
the tokens of one block are a strided view of x, never a copy; the update is accumulated by the
product itself (`baddbmm_`) into the output; and so is its input gradient into that of the frozen
layer. The backward pass is written by hand, because autograd would add both in passes of their own
and form the gradient of B in the slow orientation:

    z = s x A'        (n, tokens, r), the only intermediate
    y = y0 + z B'
    u = s g B         (n, tokens, r)
    dx = g W + u A,   dA = u' x,   dB = (z' g)'

With r much smaller than the layer, `z' g` takes less than half the time of `g' z`; for the other
products token-major z and u are as fast as rank-major ones or faster (MKL, AVX-512, r = 8 and 16).
One block keeps z for the backward pass, as autograd would: r numbers a token and layer are under
1 % of a step's memory. Several blocks compute it again: n r numbers cost more to keep than to
compute (SmolLM2 with its own RaLoRA plan: 5 % of a step's memory). x itself is kept as the layer
got it, one tensor for all layers that read it; what autograd would keep for each of them, a copy in
the factors' dtype and one with dropout, is made again. No tensor is as large as the weight,
whatever n.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

NO_DROPOUT = nn.Identity()


def add_update(
    result: Float[Tensor, "*batch d_out"],
    x: Float[Tensor, "*batch d_in"],
    a: Float[Tensor, "n r k"],
    b: Float[Tensor, "n ko r"],
    scaling: float,
    dropout: nn.Module = NO_DROPOUT,
) -> Float[Tensor, "*batch d_out"]:
    """`result + s blockdiag(b_1 a_1, ..., b_n a_n) dropout(x)` for `d_in = n k` and `d_out = n ko`.

    Works with any frozen or trainable layer behind `result`. The products are computed in the
    factors' dtype (autocast's, where it is on), the sum in the wider of theirs and the result's.

    Args:
        result: What the update is added to; it is not changed.
        x: Input of the layer, in any dtype.
        a: Input factors; one block is LoRA's A.
        b: Output factors; one block is LoRA's B.
        scaling: The factor s.
        dropout: `nn.Dropout` or `nn.Identity`; the update alone goes through it.
    """
    mask, scaling = _dropped(x, a.dtype, scaling, dropout)
    x, a, b = _autocast(x, a, b)
    return _AddUpdate.apply(result, x, mask, a, b, scaling)[0]


def linear_with_update(
    x: Float[Tensor, "*batch d_in"],
    weight: Float[Tensor, "d_out d_in"],
    bias: Float[Tensor, " d_out"] | None,
    a: Float[Tensor, "n r k"],
    b: Float[Tensor, "n ko r"],
    scaling: float,
    dropout: nn.Module = NO_DROPOUT,
) -> Float[Tensor, "*batch d_out"]:
    """`W x + bias + s blockdiag(b_1 a_1, ..., b_n a_n) dropout(x)` with W and bias frozen.

    One step more than `add_update`: the update and its input gradient are accumulated where the
    frozen layer has just written, so nothing is added in a pass of its own.

    Args:
        x: Input of the layer.
        weight: W, which gets no gradient.
        bias: Which gets no gradient either.
        a: Input factors.
        b: Output factors.
        scaling: The factor s.
        dropout: `nn.Dropout` or `nn.Identity`; the update alone goes through it.
    """
    mask, scaling = _dropped(x, a.dtype, scaling, dropout)
    return _LinearWithUpdate.apply(x, mask, weight, bias, a, b, scaling)[0]


def frozen_linear(
    base: nn.Module, x: Tensor, factor: Tensor
) -> tuple[Tensor, Tensor | None] | None:
    """Weight `(d_out, d_in)` and bias of a layer that `linear_with_update` may compute itself.

    None where calling the layer could do anything else than `W x + bias`: it is quantised, a
    subclass, sharded, hooked or patched, it trains, or dtypes differ.
    """
    if type(base) not in (nn.Linear, Conv1D) or "forward" in base.__dict__ or _is_hooked(base):
        return None
    weight, bias = base.weight, base.bias
    if type(weight) is not nn.Parameter or weight.requires_grad:
        return None
    if bias is not None and (type(bias) is not nn.Parameter or bias.requires_grad):
        return None
    if torch.is_autocast_enabled(x.device.type) or not x.dtype == weight.dtype == factor.dtype:
        return None
    return (weight.T if type(base) is Conv1D else weight), bias


def _is_hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or nn.modules.module._has_any_global_hook()
    )


class _AddUpdate(torch.autograd.Function):
    @staticmethod
    def forward(
        result: Tensor, x: Tensor, mask: Tensor | None, a: Tensor, b: Tensor, scaling: float
    ) -> tuple[Tensor, Tensor | None]:
        dtype = torch.promote_types(result.dtype, a.dtype)
        out = result.to(dtype, copy=True, memory_format=torch.contiguous_format)
        z = _reduced(_masked(x.to(a.dtype), mask), a, scaling)
        _add_expanded_(out, z, b.transpose(1, 2))
        return out, _worth_keeping(z)

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor | None]
    ) -> None:
        result, x, mask, a, b, ctx.scaling = inputs
        ctx.result_dtype = result.dtype
        _save(ctx, x, mask, a, b, z=output[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        x, mask, a, b, z = ctx.saved_tensors
        narrow = gradient.to(a.dtype)
        u = _reduced(narrow, b.transpose(1, 2), ctx.scaling)
        grad_x = None
        if ctx.needs_input_grad[1]:
            grad_x = torch.empty(x.shape, dtype=a.dtype, device=x.device)
            _add_expanded_(grad_x, u, a, beta=0)
            grad_x = _masked(grad_x, mask).to(x.dtype)
        grad_a, grad_b = _factor_gradients(
            ctx, narrow, (x, mask, a, u, z), ctx.needs_input_grad[3:5]
        )
        return gradient.to(ctx.result_dtype), grad_x, None, grad_a, grad_b, None


class _LinearWithUpdate(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor,
        mask: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scaling: float,
    ) -> tuple[Tensor, Tensor | None]:
        out = F.linear(x, weight, bias)
        z = _reduced(_masked(x, mask), a, scaling)
        _add_expanded_(out, z, b.transpose(1, 2))
        return out, _worth_keeping(z)

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor | None]
    ) -> None:
        x, mask, weight, _, a, b, ctx.scaling = inputs
        _save(ctx, x, mask, weight, a, b, z=output[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        x, mask, weight, a, b, z = ctx.saved_tensors
        u = _reduced(gradient, b.transpose(1, 2), ctx.scaling)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = gradient @ weight
            if mask is None:
                _add_expanded_(grad_x, u, a)
            else:
                update = torch.empty_like(grad_x)
                _add_expanded_(update, u, a, beta=0)
                grad_x += _masked(update, mask)
        grad_a, grad_b = _factor_gradients(
            ctx, gradient, (x, mask, a, u, z), ctx.needs_input_grad[4:6]
        )
        return grad_x, None, None, None, grad_a, grad_b, None


def _dropped(
    x: Tensor, dtype: torch.dtype, scaling: float, dropout: nn.Module
) -> tuple[Tensor | None, float]:
    """What `dropout` keeps of x, and `scaling` with its factor `1 / (1 - p)`.

    The random numbers are those that `dropout(x)` would draw with x in the factors' dtype. A mask
    costs a byte an entry; the product with it costs a pass.
    """
    if not isinstance(dropout, nn.Dropout) or not dropout.training or not dropout.p:
        return None, scaling
    _, mask = torch.native_dropout(x.detach().to(dtype), dropout.p, train=True)
    return mask, scaling / (1 - dropout.p) if dropout.p < 1 else 0.0


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x * mask


def _in_blocks(x: Tensor, n: int) -> Tensor:
    """`(..., n k)` as a view `(n, tokens, k)`."""
    return x.reshape(-1, n, x.shape[-1] // n).transpose(0, 1)


def _reduced(x: Tensor, factor: Tensor, scaling: float) -> Tensor:
    """`scaling x_i factor_i'` for each block: `(n, tokens, r)`."""
    return torch.bmm(_in_blocks(x, factor.shape[0]), factor.transpose(1, 2)) * scaling


def _add_expanded_(out: Tensor, z: Tensor, factor: Tensor, *, beta: int = 1) -> None:
    """Columns of block i become `beta` (0 or 1) times what they were plus `z_i factor_i`."""
    blocks = out.view(-1, factor.shape[0], factor.shape[2]).transpose(0, 1)
    # The compiler takes baddbmm_'s result for contiguous, and cannot see it as columns of out then.
    if blocks.dtype == z.dtype and not torch.compiler.is_compiling():
        blocks.baddbmm_(z, factor, beta=beta)
    elif beta:
        blocks.add_(torch.bmm(z, factor))
    else:
        blocks.copy_(torch.bmm(z, factor))


def _worth_keeping(z: Tensor) -> Tensor | None:
    return z if z.shape[0] == 1 else None


def _save(ctx: Any, *tensors: Tensor, z: Tensor | None) -> None:
    if z is not None:
        ctx.mark_non_differentiable(z)
    ctx.save_for_backward(*tensors, z)


def _factor_gradients(
    ctx: Any,
    gradient: Tensor,
    operands: tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor | None],
    needed: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """`dA = u' x` and `dB = (z' g)'` for each block."""
    x, mask, a, u, z = operands
    x = _masked(x.to(a.dtype), mask)
    n = a.shape[0]
    grad_a = torch.bmm(u.transpose(1, 2), _in_blocks(x, n)) if needed[0] else None
    if not needed[1]:
        return grad_a, None
    if z is None or torch.is_grad_enabled():  # second derivatives need z as a function of x and a
        z = _reduced(x, a, ctx.scaling)
    return grad_a, torch.bmm(z.transpose(1, 2), _in_blocks(gradient, n)).transpose(1, 2)


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """What autocast would do to the operands of a product; a custom function must do it itself."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t.dtype == torch.float64 else t.to(dtype) for t in tensors)
