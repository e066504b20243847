"""Exporting adapters to plain LoRA, which loads anywhere, and to merged weights.

A block-diagonal update is exactly a LoRA of rank n r: row (i, j) of its A holds row j of `A_i` in
the columns of block i and zeros elsewhere, and likewise B. The scale s is folded into B, so that
every module's factor is 1 and readers cannot disagree about it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from rankwise.adapters.base_fingerprint import (
    base_fingerprint,
    write_base_fingerprint,
    write_fingerprint,
)
from rankwise.adapters.block_diagonal import RaLoraLinear
from rankwise.adapters.card import model_card
from rankwise.adapters.changed_base import why_base_changed
from rankwise.adapters.export_folder import check_export_folder, new_export
from rankwise.adapters.fuse_lora import why_not_fused
from rankwise.adapters.parity import (
    adapter_to_export,
    compared,
    example_inputs,
    outputs_of,
    twin_of,
)
from rankwise.adapters.readers import VLLM_RANKS, readers_that_are_right, vllm_max_rank
from rankwise.errors import ExportError
from rankwise.files import parse_json, read_text, write_text
from rankwise.targets import exact_target_modules

Mode = Literal["padded", "compact", "vllm"]
MODES: tuple[Mode, ...] = ("padded", "compact", "vllm")
CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
NATIVE_FOLDER = "native"


@dataclass(frozen=True)
class Exported:
    """What an export left, after it was checked.

    Attributes:
        folder: Where.
        mode: `"padded"`, `"compact"`, `"vllm"` or `"merged"`.
        ranks: Module -> LoRA rank in the file; empty for merged weights.
        error: Largest difference from the live model's outputs, relative to the largest of them.
        readers: Programs that see the right scale in every module.
        vllm_rank: What to pass to vLLM as `--max-lora-rank`; None if it allows none.
    """

    folder: Path
    mode: str
    ranks: dict[str, int] = field(default_factory=dict)
    error: float = 0.0
    readers: tuple[str, ...] = ()
    vllm_rank: int | None = None

    def __str__(self) -> str:
        lines = [f"{self.mode} export: {self.folder}, {self.error:.1e} off the live model"]
        if self.ranks:
            low, high = min(self.ranks.values()), max(self.ranks.values())
            spread = f"rank {high}" if low == high else f"ranks {low} to {high}"
            lines.append(f"plain LoRA of {len(self.ranks)} modules, {spread}")
            lines.append(f"the scale is read right by {', '.join(self.readers)}")
        if self.mode == "vllm":
            lines.append(
                f"vllm serve BASE_MODEL --enable-lora --max-lora-rank {self.vllm_rank} "
                f"--lora-modules NAME={self.folder}"
            )
        return "\n".join(lines)


@dataclass(frozen=True)
class _Factors:
    """`a (r, d_in)` and `b (d_out, r)` of one module, scale folded into b."""

    a: Tensor
    b: Tensor
    fan_in_fan_out: bool

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def padded(self, rank: int) -> _Factors:
        more = rank - self.rank
        a = torch.cat([self.a, self.a.new_zeros(more, self.a.shape[1])])
        b = torch.cat([self.b, self.b.new_zeros(self.b.shape[0], more)], dim=1)
        return _Factors(a, b, self.fan_in_fan_out)


def export_lora(
    model: PeftModel,
    folder: str | Path,
    *,
    mode: Mode = "padded",
    adapter: str | None = None,
    native: bool = False,
    example: Mapping[str, Any] | None = None,
) -> Exported:
    """Write an adapter as plain LoRA, for programs that know nothing of rankwise.

    The files are loaded again into plain PEFT on a copy of the base, and its outputs compared with
    the live model's, before the folder appears; it takes memory for one more copy of the model.
    Zeros added as padding stay zero in training: to go on training, use the native adapter.

    Args:
        model: With block-diagonal or plain LoRA adapters, not merged.
        folder: To be created, or an earlier export to be replaced.
        mode: `"padded"`: every module has the largest rank, `alpha = r`, right in every reader;
            `"compact"`: each module its own rank, smaller, but wrong in llama.cpp unless all ranks
            are equal; `"vllm"`: padded to a rank that vLLM takes as `--max-lora-rank`.
        adapter: Which; default: the active one.
        native: Also write the trainable original to `native/` in the folder.
        example: Inputs for the comparison; default: random tokens of the model's vocabulary.

    Returns:
        What was written. Print it: it says what to pass to vLLM.

    Raises:
        ExportError: The adapter cannot be a plain LoRA, or the outputs differ; nothing is written.
        FileError: The folder cannot be written.
    """
    if mode not in MODES:
        raise ExportError(f"mode={mode!r} must be one of {', '.join(map(repr, MODES))}.")
    folder = Path(folder)
    check_export_folder(folder)
    adapter = adapter_to_export(model, adapter)
    changed = why_base_changed(getattr(model.peft_config[adapter], "init_lora_weights", None))
    if changed is not None:
        raise ExportError(
            f"adapter {adapter!r} cannot be exported as plain LoRA: {changed}. Export merged "
            "weights instead."
        )
    factors = {name: _factors(name, layer, adapter) for name, layer in _layers(model, adapter)}
    config, factors = _laid_out(model, adapter, factors, mode)
    tensors = _other_tensors(model, adapter, mode)
    for name, pair in factors.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = pair.a.contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = pair.b.contiguous()
    ranks = {name: pair.rank for name, pair in factors.items()}
    with new_export(folder, mode) as draft:
        config.save_pretrained(str(draft))
        save_file(tensors, draft / WEIGHTS_FILE, metadata={"format": "pt"})
        write_fingerprint(draft / WEIGHTS_FILE, base_fingerprint(model, adapter))
        error = _check_lora(twin_of(model, adapter), draft, example)
        exported = Exported(
            folder,
            mode,
            ranks,
            error,
            tuple(readers_that_are_right(_as_read(draft), ranks, dict.fromkeys(ranks, 1.0))),
            vllm_max_rank(max(ranks.values())),
        )
        if native:
            save_native(model, draft / NATIVE_FOLDER, adapter)
        write_text(
            draft / "README.md", model_card(_as_read(draft), exported.readers, native=native)
        )
    return exported


def export_merged(
    model: PeftModel,
    folder: str | Path,
    *,
    adapter: str | None = None,
    tokenizer: Any = None,
    example: Mapping[str, Any] | None = None,
) -> Exported:
    """Write the base with the adapter merged into it, as a transformers folder.

    Merging and checking take memory for two more copies of the model.

    Args:
        model: With adapters of any kind that can be merged.
        folder: To be created, or an earlier export to be replaced.
        adapter: Which; default: the active one.
        tokenizer: Saved beside the model, if given.
        example: Inputs for the comparison; default: random tokens of the model's vocabulary.

    Raises:
        ExportError: The model is no transformers model, or the outputs differ; nothing is written.
        FileError: The folder cannot be written.
    """
    folder = Path(folder)
    check_export_folder(folder)
    adapter = adapter_to_export(model, adapter)
    base = model.get_base_model()
    if not hasattr(base, "save_pretrained"):
        raise ExportError(f"a {type(base).__name__} has no save_pretrained; merge it yourself.")
    if getattr(base, "is_quantized", False):
        raise ExportError("the base is quantised; attach the adapter to the full-precision model.")
    inputs = example_inputs(base) if example is None else example
    twin = twin_of(model, adapter)
    live = outputs_of(twin, inputs)
    merged = twin.merge_and_unload(safe_merge=True)
    with new_export(folder, "merged") as draft:
        merged.save_pretrained(str(draft))
        if tokenizer is not None:
            tokenizer.save_pretrained(str(draft))
        loaded = type(base).from_pretrained(str(draft), dtype=base.dtype)  # type: ignore[attr-defined]
        error = compared(
            live, outputs_of(loaded.to(base.device), inputs), "the merged model", model
        )
    return Exported(folder, "merged", error=error)


def save_native(model: PeftModel, folder: str | Path, adapter: str | None = None) -> None:
    """Save an adapter in its own, trainable form, with a model card for strangers.

    Args:
        model: With adapters.
        folder: The folder; files of the same names in it are replaced.
        adapter: Which; default: the active one.
    """
    folder = Path(folder)
    adapter = adapter_to_export(model, adapter)
    model.save_pretrained(str(folder), selected_adapters=[adapter])
    if adapter != "default":  # PEFT puts other names into a folder of their own
        for file in (folder / adapter).iterdir():
            file.replace(folder / file.name)
        (folder / adapter).rmdir()
    write_base_fingerprint(model, folder / WEIGHTS_FILE, adapter)
    write_text(folder / "README.md", model_card(_as_read(folder), (), native=False))


def _layers(model: PeftModel, adapter: str) -> Iterator[tuple[str, BaseTunerLayer]]:
    """Every layer that carries the adapter, by its name in the base model."""
    found = False
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, BaseTunerLayer) and adapter in module._all_available_adapter_names():
            found = True
            yield name, module
    if not found:
        raise ExportError(f"adapter {adapter!r} adapts no layer.")


def _factors(name: str, layer: BaseTunerLayer, adapter: str) -> _Factors:
    if isinstance(layer, RaLoraLinear):
        a, b = (factor.detach() for factor in layer.factors(adapter))
        a, b = torch.block_diag(*a.unbind()), torch.block_diag(*b.unbind())
        return _Factors(a, b * layer.scaling[adapter], layer.fan_in_fan_out)
    if isinstance(layer, lora.Linear):
        reason = why_not_fused(layer, adapter)
        if reason is None:
            pair = (layer.lora_A[adapter].weight, layer.lora_B[adapter].weight)
            a, b = (factor.detach() for factor in pair)  # type: ignore[operator]
            return _Factors(a, b * layer.scaling[adapter], layer.fan_in_fan_out)
    else:
        reason = f"it is a {type(layer).__name__}"
    raise ExportError(
        f"{name} cannot be exported as plain LoRA: {reason}. Export merged weights instead."
    )


def _laid_out(
    model: PeftModel, adapter: str, factors: Mapping[str, _Factors], mode: Mode
) -> tuple[LoraConfig, dict[str, _Factors]]:
    """The LoRA configuration of a mode, and the factors padded to it."""
    source: Any = model.peft_config[adapter]
    ranks = {name: pair.rank for name, pair in factors.items()}
    largest = max(ranks.values())
    if mode == "vllm":
        allowed = vllm_max_rank(largest)
        if allowed is None:
            raise ExportError(
                f"rank {largest} is over vLLM's largest, {VLLM_RANKS[-1]}; use mode='padded' for "
                "other programs, or export merged weights."
            )
        largest = allowed
    if mode != "compact":
        factors = {name: pair.padded(largest) for name, pair in factors.items()}
        ranks = dict.fromkeys(ranks, largest)
    other = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != largest}
    config = LoraConfig(
        r=largest,
        lora_alpha=largest,
        target_modules=list(ranks),
        rank_pattern=other,
        alpha_pattern=dict(other),
        fan_in_fan_out=all(pair.fan_in_fan_out for pair in factors.values()),
        bias=_bias(source.bias),
        modules_to_save=source.modules_to_save,
        task_type=source.task_type,
        base_model_name_or_path=source.base_model_name_or_path,
        inference_mode=True,
    )
    base_names = [name for name, _ in _base_modules(model)]
    config.target_modules = exact_target_modules(list(ranks), base_names)
    return config, dict(factors)


def _base_modules(model: PeftModel) -> Iterator[tuple[str, nn.Module]]:
    """The modules that the base model has without adapters."""
    for name, module in model.get_base_model().named_modules():
        parts = name.split(".")
        if "base_layer" not in parts:
            yield name, module


def _bias(bias: str) -> Literal["none", "all", "lora_only"]:
    return bias if bias in ("none", "all") else "lora_only"  # type: ignore[return-value]


def _other_tensors(model: PeftModel, adapter: str, mode: Mode) -> dict[str, Tensor]:
    """Biases and whole modules that the adapter trains."""
    state = get_peft_model_state_dict(model, adapter_name=adapter)
    others = {
        name: tensor.detach().contiguous().clone()
        for name, tensor in state.items()
        if not re.search(r"\.(ralora|lora)_[AB]\.", name)
    }
    if others and mode == "vllm":
        raise ExportError(
            f"vLLM loads no biases or whole modules, and the adapter trains {next(iter(others))}; "
            "export merged weights instead."
        )
    return others


def _as_read(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    return parse_json(read_text(path, "adapter"), dict[str, Any], path=path, what="adapter")


def _check_lora(twin: PeftModel, draft: Path, example: Mapping[str, Any] | None) -> float:
    """The exported adapter in plain PEFT against the live one; consumes the model."""
    inputs = example_inputs(twin.get_base_model()) if example is None else example
    live = outputs_of(twin, inputs)
    with torch.random.fork_rng(devices=[]):  # PEFT draws an adapter before it loads one
        loaded = PeftModel.from_pretrained(twin.unload(), str(draft))
    return compared(live, outputs_of(loaded, inputs), "the exported adapter", loaded)
