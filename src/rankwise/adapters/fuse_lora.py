"""`fuse_lora_`: the fused layer for PEFT's own LoRA layers, where it computes the same."""

from __future__ import annotations

import logging
from typing import Any

from peft.tuners import lora
from torch import Tensor, nn

from rankwise.adapters.fused import add_update, frozen_linear, linear_with_update

logger = logging.getLogger(__name__)


class FusedLoraLinear(lora.Linear):
    """`peft.tuners.lora.Linear` with another forward pass; made by `fuse_lora_`, never built.

    Parameters, files, merging, adding and deleting adapters are the parent's. Whatever this forward
    pass does not cover (DoRA and other variants, biases of B, batches of mixed adapters, merged or
    disabled adapters) is left to the parent's, call by call.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`W x + sum_active s B A x` with each adapter's own rank and scaling."""
        active = [adapter for adapter in self.active_adapters if adapter in self.lora_A]
        plain = not (args or kwargs or self.disable_adapters or self.merged) and active
        if not plain or any(why_not_fused(self, adapter) for adapter in active):
            return super().forward(x, *args, **kwargs)
        a, b = self._factors(active[0])
        frozen = frozen_linear(self.base_layer, x, a)
        if frozen is not None:
            result = linear_with_update(x, *frozen, a, b, *self._options(active.pop(0)))
        else:
            result = self.base_layer(x)
        dtype = result.dtype
        for adapter in active:
            result = add_update(result, x, *self._factors(adapter), *self._options(adapter))
        return result.to(dtype)

    def _factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        """A and B as one block."""
        a, b = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        assert isinstance(a, Tensor) and isinstance(b, Tensor)
        return a[None], b[None]

    def _options(self, adapter: str) -> tuple[float, nn.Module]:
        """Scaling and dropout."""
        return self.scaling[adapter], self.lora_dropout[adapter]


def fuse_lora_(model: nn.Module) -> list[str]:
    """Make PEFT's own LoRA layers cheaper, in place; same numbers, same parameters, same files.

    For plain LoRA, however its ranks were chosen: static GARD, LS-LoRA, LoRA+GID. A layer is
    changed only where the fused forward pass computes what PEFT's does; the log says which were
    left, and why. `unfuse_lora_` undoes it.

    Args:
        model: A model with LoRA adapters.

    Returns:
        Names of the layers that are fused now.
    """
    fused = []
    for name, module in model.named_modules():
        if not isinstance(module, lora.LoraLayer):
            continue
        if type(module) is lora.Linear:
            reasons = [why_not_fused(module, adapter) for adapter in module.lora_A]
            reason = next(filter(None, reasons), None)
        elif type(module) is FusedLoraLinear:
            reason = None
        else:
            reason = f"it is a {type(module).__module__}.{type(module).__name__}"
        if reason:
            logger.info("%s is not fused: %s", name, reason)
            continue
        module.__class__ = FusedLoraLinear
        fused.append(name)
    return fused


def unfuse_lora_(model: nn.Module) -> list[str]:
    """Undo `fuse_lora_`.

    Returns:
        Names of the layers that were fused.
    """
    fused = [(n, m) for n, m in model.named_modules() if type(m) is FusedLoraLinear]
    for _, module in fused:
        module.__class__ = lora.Linear  # type: ignore[assignment]
    return [name for name, _ in fused]


def why_not_fused(layer: lora.Linear, adapter: str) -> str | None:
    """What an adapter does that the fused forward pass does not, or None."""
    if adapter in layer.lora_variant:
        return f"adapter {adapter!r} is a {type(layer.lora_variant[adapter]).__name__}"
    factors = layer.lora_A[adapter], layer.lora_B[adapter]
    if any(type(factor) is not nn.Linear for factor in factors):
        return f"adapter {adapter!r} has factors that are no plain matrices"
    if any(getattr(factor, "bias", None) is not None for factor in factors):
        return f"adapter {adapter!r} has a bias (lora_bias=True)"
    if any(factor._forward_hooks or factor._forward_pre_hooks for factor in factors):
        return f"adapter {adapter!r} has hooks on its factors"
    if type(layer.lora_dropout[adapter]) not in (nn.Identity, nn.Dropout):
        return f"adapter {adapter!r} has a {type(layer.lora_dropout[adapter]).__name__}"
    return None
