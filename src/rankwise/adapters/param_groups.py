"""Learning rates for LR-LoRA."""

from __future__ import annotations

from typing import Any

from torch import nn

from rankwise.adapters.elementwise import LrLoraLinear
from rankwise.adapters.options import check_positive

AMPLITUDE_RATIO = 0.1


def lr_lora_param_groups(
    model: nn.Module, lr: float, *, amplitude_ratio: float = AMPLITUDE_RATIO
) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer, with a learning rate of their own for the amplitudes.

    Adam's first step moves every amplitude by its learning rate and by the sign of
    `sinc(-g_k) sum H`, so `f(0)` jumps by `lr_a sum_k |sinc(g_k)|`, 13.2 lr_a with 50 points on
    [-3, 3], in every entry of `delta_W` alike: a rank-one shock of spectral norm
    `13.2 s lr_a sqrt(d_in d_out)`. The ratio 0.1 brings the jump of an entry to 1.3 lr, about what
    Adam's first step does to an entry of any full matrix.

    Args:
        model: A model with LR-LoRA adapters; what else it trains goes into the first group.
        lr: Learning rate of A, B, bandwidths, grids and everything else.
        amplitude_ratio: Learning rate of the amplitudes, in units of `lr`.

    Returns:
        Two groups, `"name"` `"factors"` and `"amplitudes"`, of the parameters that require a
        gradient; the second is missing where no amplitude does.

    Raises:
        ValueError: The model has no LR-LoRA adapter, or a number is not positive.
    """
    check_positive("lr", lr)
    check_positive("amplitude_ratio", amplitude_ratio)
    layers = [module for module in model.modules() if isinstance(module, LrLoraLinear)]
    if not layers:
        raise ValueError("the model has no LR-LoRA adapter; attach one before asking for groups.")
    amplitudes = {id(p) for layer in layers for p in layer.lrlora_amplitude.parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"name": "factors", "params": [p for p in trained if id(p) not in amplitudes], "lr": lr},
        {
            "name": "amplitudes",
            "params": [p for p in trained if id(p) in amplitudes],
            "lr": lr * amplitude_ratio,
        },
    ]
    return [group for group in groups if group["params"]]
