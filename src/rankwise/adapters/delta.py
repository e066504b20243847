"""What every additive adapter shares: `y = W x + sum_active delta(x)`, merging, switching.

A subclass says how one adapter's update acts on an input and what it is as a matrix; merging,
unmerging, disabling, quantised bases and dtype handling live here once.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from peft.utils import (
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    get_quantization_kwargs,
    resolve_quantization_backend,
)
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rankwise.quantised import keep_layout_
from rankwise.targets import linear_shape


class DeltaLayer(nn.Module, BaseTunerLayer):
    """A linear layer with additive updates `delta_W (d_out, d_in)`, one per adapter."""

    def __init__(self, base_layer: nn.Module, **quantization: Any) -> None:
        super().__init__()
        self.base_layer = base_layer
        innermost = self.get_base_layer()
        self.quantization_backend = resolve_quantization_backend(innermost, **quantization)
        shape = linear_shape(innermost)
        if shape is None:
            raise TypeError(
                f"{type(innermost).__name__} cannot carry this adapter; only Linear (also "
                "quantised) and transformers Conv1D layers can."
            )
        keep_layout_(innermost)
        self.in_features, self.out_features = shape.d_in, shape.d_out
        self.fan_in_fan_out = isinstance(innermost, Conv1D)
        self.cast_input_dtype_enabled = True
        self._disable_adapters = False
        self.merged_adapters = []

    @abstractmethod
    def has_adapter(self, adapter: str) -> bool:
        """Whether this layer carries the named adapter."""

    @abstractmethod
    def add_delta(
        self,
        result: Float[Tensor, "*batch d_out"],
        x: Float[Tensor, "*batch d_in"],
        adapter: str,
    ) -> Float[Tensor, "*batch d_out"]:
        """`result + delta_W x`, scaling and dropout included; `result` itself is not changed.

        The input comes in any dtype.
        """

    @abstractmethod
    def delta_weight(self, adapter: str) -> Float[Tensor, "d_out d_in"]:
        """The adapter's update as a matrix in fp32 or wider, scaling included."""

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The update in the layout of the base weight (`(d_in, d_out)` for Conv1D)."""
        delta = self.delta_weight(adapter)
        return delta.T if self.fan_in_fan_out else delta

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Base output plus the updates of all active adapters, in the base layer's dtype."""
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        result: Tensor = self.base_layer(x, *args, **kwargs)
        if self.merged:
            return result
        if self.quantization_backend is not None:
            result = self.quantization_backend.maybe_clone_base_result(result)
        dtype = result.dtype
        for adapter in self.active_adapters:
            if self.has_adapter(adapter):
                result = self.add_delta(result, x, adapter)
        return result.to(dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the active (or named) adapters' updates to the base weight.

        Args:
            safe_merge: Check the merged weight for NaN and infinity before keeping it.
            adapter_names: Adapters to merge; default: the active ones.

        Raises:
            ValueError: `safe_merge` found a non-finite weight; the layer is unchanged.
        """
        adapters = [
            adapter
            for adapter in check_adapters_to_merge(self, adapter_names)
            if self.has_adapter(adapter)
        ]
        if not adapters:
            return
        merged = self._shifted_weight(adapters, sign=1)
        if safe_merge and not torch.isfinite(merged).all():
            raise ValueError(
                f"merging {', '.join(map(repr, adapters))} gives non-finite weights; nothing was "
                "merged into this layer. The adapter seems to be broken."
            )
        self.set_base_weight(merged)
        self.merged_adapters.extend(adapters)

    def unmerge(self) -> None:
        """Subtract all merged updates from the base weight."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.set_base_weight(self._shifted_weight(self.merged_adapters, sign=-1))
        self.merged_adapters.clear()

    def _shifted_weight(self, adapters: list[str], *, sign: int) -> Tensor:
        """The base weight plus or minus some updates, rounded to its dtype once."""
        weight = self.get_base_weight()
        shifted = weight
        for adapter in adapters:
            delta = self.get_delta_weight(adapter).to(weight.device)
            shifted = shifted.to(torch.promote_types(shifted.dtype, delta.dtype)) + sign * delta
        return shifted.to(weight.dtype)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """The update is additive and known as a matrix, so PEFT can factorise it."""
        return True


class DeltaModel(BaseTuner):
    """PEFT's tuner over `DeltaLayer`s; a subclass names its prefix and layer class."""

    layer_cls: ClassVar[type[DeltaLayer]]
    tuner_layer_cls = DeltaLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING  # type: ignore[assignment]

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, self.layer_cls):
            target.add_adapter(adapter_name, peft_config, current_key)  # type: ignore[operator]
            return
        layer = self.layer_cls(target, **get_quantization_kwargs(self))
        layer._active_adapter = adapter_name
        layer.add_adapter(adapter_name, peft_config, current_key)  # type: ignore[operator]
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        """Put one module in another's place; adapters are on their base's device already.

        PEFT's own method also hands `child.weight` on, which a head that is trained whole need not
        have.
        """
        setattr(parent, child_name, new_module)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Refuse batches whose rows are for different adapters, rather than ignore which."""
        if kwargs.get("adapter_names") is not None:
            raise NotImplementedError(
                f"adapter_names: {type(self).__name__} computes a batch with one adapter; call the "
                "model once for each, or export plain LoRA."
            )
        yield
