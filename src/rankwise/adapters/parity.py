"""What is exported computes what the live model computes, or nothing is written."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from rankwise.errors import ExportError

TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}
"""Largest difference allowed between the live model's outputs and the exported one's, relative to
the largest of them: some roundings of the dtype that the model computes in."""


def adapter_to_export(model: PeftModel, adapter: str | None) -> str:
    """The name of the adapter to export: the one asked for, or the only active one.

    Raises:
        ExportError: There is no such adapter, several are active, or one is merged.
    """
    if not isinstance(model, PeftModel):
        raise ExportError(f"a {type(model).__name__} has no adapters; pass the model of attach().")
    if adapter is None:
        active = model.active_adapters
        if len(active) != 1:
            raise ExportError(f"adapters {active} are active; name one: adapter={active[0]!r}.")
        adapter = active[0]
    if adapter not in model.peft_config:
        raise ExportError(f"adapter={adapter!r}: there are only {', '.join(model.peft_config)}.")
    if any(m.merged for m in model.modules() if isinstance(m, BaseTunerLayer)):
        raise ExportError("an adapter is merged into the base; call model.unmerge_adapter() first.")
    return adapter


def twin_of(model: PeftModel, adapter: str) -> PeftModel:
    """A copy with one adapter active, so that the live model stays as it is."""
    twin = copy.deepcopy(model).eval()
    twin.set_adapter(adapter)
    return twin


def example_inputs(model: nn.Module) -> dict[str, Tensor]:
    """Two sequences of random tokens, by the model's configuration.

    Raises:
        ExportError: The configuration names no vocabulary.
    """
    config: Any = getattr(model, "config", None)
    size = getattr(config, "vocab_size", None)
    if not isinstance(size, int):
        raise ExportError(
            f"a {type(model).__name__} names no vocabulary to draw inputs from; pass example=, the "
            "keyword arguments of its forward pass."
        )
    generator = torch.Generator().manual_seed(0)
    device = next(model.parameters()).device
    tokens = torch.randint(size, (2, 8), generator=generator).to(device)
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = tokens
    return inputs


def outputs_of(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """Logits, or whatever tensor comes first, in evaluation mode."""
    with torch.no_grad():
        output: Any = model.eval()(**inputs)
    if isinstance(output, Tensor):
        return output
    logits = getattr(output, "logits", None)
    return logits if isinstance(logits, Tensor) else output[0]


def compared(live: Tensor, found: Tensor, what: str, model: nn.Module) -> float:
    """The largest difference between outputs, relative to the largest of the live model's.

    Args:
        live: Its outputs.
        found: Those of what is exported.
        what: What that is, for messages.
        model: The live model, which may compute in less than its outputs' dtype.

    Raises:
        ExportError: It is over the tolerance of the dtypes.
    """
    scale = float(live.abs().max()) or 1.0
    error = float((live.double() - found.double()).abs().max()) / scale
    dtypes = {live.dtype, *(p.dtype for p in model.parameters())}
    tolerance = max(TOLERANCES.get(dtype, 0.0) for dtype in dtypes)
    if not error <= tolerance:
        raise ExportError(
            f"outputs of {what} differ from the live model's by {error:.1e} of the largest, more "
            f"than {tolerance:.0e}; nothing was written."
        )
    return error
