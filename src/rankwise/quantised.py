"""What quantised layers need so that their weights can be read more than once."""

from __future__ import annotations

from typing import Any

from torch import nn


def keep_layout_(module: nn.Module) -> None:
    """Keep bitsandbytes from rearranging a 4-bit weight in place, and undo it where it has.

    On CPUs with AVX512-BF16 its forward pass in evaluation mode does; a backward pass, a merge or
    whatever else dequantises the weight afterwards gets another matrix.
    """
    if not getattr(module, "support_avx512bf16_for_cpu", False):
        return
    weight: Any = module.weight
    if getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False):
        from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

        weight.data, weight.quant_state = _convert_weight_packed_for_cpu_inverse(
            weight.data, weight.quant_state
        )
    module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
