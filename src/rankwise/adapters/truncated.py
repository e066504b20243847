"""LR-LoRA as plain LoRA, by truncated SVD, with what that loses.

`f(B A)` has no low rank, so this is an approximation: the best one of its rank in each module
(Eckart and Young). Its error is measured, printed and stored, and refused above a tolerance. Where
the loss matters, export merged weights, which are exact.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from rankwise.adapters import options
from rankwise.adapters.base_fingerprint import remember_base_
from rankwise.adapters.elementwise import LrLoraLinear
from rankwise.adapters.export import Exported, Mode, export_lora
from rankwise.adapters.export_folder import check_export_folder, new_export
from rankwise.adapters.parity import adapter_to_export, example_inputs, outputs_of, twin_of
from rankwise.errors import ExportError
from rankwise.files import write_text
from rankwise.targets import exact_target_modules

TOLERANCE = 0.01
TRUNCATION_FILE = "truncation.json"


@dataclass(frozen=True)
class Truncated:
    """What an export by truncated SVD left.

    Attributes:
        exported: The LoRA; its `error` is between this LoRA and its file.
        errors: Module -> `||delta_W - B A||_F / ||delta_W||_F`, 0 where nothing was lost.
        output_error: Largest difference from the LR-LoRA model's outputs, in units of the largest
            difference of those from the base model's.
    """

    exported: Exported
    errors: dict[str, float]
    output_error: float

    @property
    def error(self) -> float:
        """The largest of the modules' errors."""
        return max(self.errors.values())

    def __str__(self) -> str:
        worst = max(self.errors, key=lambda name: self.errors[name])
        return (
            f"{self.exported}\n"
            f"an approximation by truncated SVD: updates are off by up to {self.error:.2%} "
            f"({worst}), what the adapter does to the outputs by {self.output_error:.2%}"
        )


def export_truncated(
    model: PeftModel,
    folder: str | Path,
    *,
    rank: int | None = None,
    tolerance: float = TOLERANCE,
    mode: Mode = "padded",
    adapter: str | None = None,
    example: Mapping[str, Any] | None = None,
) -> Truncated:
    """Write an LR-LoRA adapter as plain LoRA, to within a tolerance.

    Args:
        model: With LR-LoRA adapters, not merged.
        folder: To be created, or an earlier export to be replaced; `truncation.json` in it has the
            error of every module.
        rank: Of every module; default: the smallest that keeps each module within the tolerance.
        tolerance: Largest relative error in the Frobenius norm that any module may have.
        mode: See `export_lora`.
        adapter: Which; default: the active one.
        example: Inputs for the comparison; default: random tokens of the model's vocabulary.

    Raises:
        ExportError: The adapter is no LR-LoRA or is merged, or a module's error is above the
            tolerance; nothing is written.
        FileError: The folder cannot be written.
    """
    try:
        options.check_positive("tolerance", tolerance)
        if rank is not None:
            options.check_whole("rank", rank)
    except ValueError as error:
        raise ExportError(str(error)) from error
    check_export_folder(Path(folder))
    adapter = adapter_to_export(model, adapter)
    twin = _lr_lora_copy(model, adapter)
    inputs = example_inputs(twin.get_base_model()) if example is None else example
    factors, errors = _truncated(twin, adapter, rank, tolerance)
    _refuse(errors, rank, tolerance)
    live = outputs_of(twin, inputs).double()
    with twin.disable_adapter():
        bare = outputs_of(twin, inputs).double()
    plain = _as_lora(twin, adapter, factors)
    moved = float((live - bare).abs().max())
    off = float((live - outputs_of(plain, inputs).double()).abs().max())
    with new_export(Path(folder), mode) as draft:
        exported = export_lora(plain, draft / "lora", mode=mode, example=inputs)
        for file in (draft / "lora").iterdir():
            file.rename(draft / file.name)
        (draft / "lora").rmdir()
        exported = Exported(**{**vars(exported), "folder": Path(folder)})
        found = Truncated(exported, errors, off / moved if moved else 0.0)
        stored = {"error": found.error, "output_error": found.output_error, "tolerance": tolerance}
        text = json.dumps({**stored, "modules": errors}, indent=2, allow_nan=False)
        write_text(draft / TRUNCATION_FILE, text + "\n")
    return found


def _lr_lora_copy(model: PeftModel, adapter: str) -> PeftModel:
    """A copy in evaluation mode with the one adapter active."""
    config: Any = model.peft_config[adapter]
    layers = [m for m in model.modules() if isinstance(m, LrLoraLinear) and m.has_adapter(adapter)]
    if not layers:
        raise ExportError(
            f"adapter {adapter!r} is no LR-LoRA; export_lora writes it as plain LoRA without loss."
        )
    if config.bias != "none":
        raise ExportError(f"bias={config.bias!r}: trained biases need merged weights.")
    return twin_of(model, adapter)


def _truncated(
    model: PeftModel, adapter: str, rank: int | None, tolerance: float
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, float]]:
    """The best `(A, B)` of every module, and their errors."""
    factors, errors = {}, {}
    for name, layer in model.get_base_model().named_modules():
        if not isinstance(layer, LrLoraLinear) or not layer.has_adapter(adapter):
            continue
        with torch.no_grad():
            u, sigma, v = torch.linalg.svd(layer.delta_weight(adapter), full_matrices=False)
        energy = sigma.double().square()
        total = float(energy.sum())
        # what is left behind at each rank, summed from the small end
        left = (energy.flip(0).cumsum(0).flip(0) / total).sqrt() if total else energy
        left = torch.cat([left[1:], left.new_zeros(1)])
        r = int((left > tolerance).sum()) + 1 if rank is None else min(rank, len(sigma))
        root = sigma[:r].sqrt()
        factors[name] = (v[:r] * root[:, None], u[:, :r] * root)
        errors[name] = float(left[r - 1])
    return factors, errors


def _refuse(errors: Mapping[str, float], rank: int | None, tolerance: float) -> None:
    over = {name: error for name, error in errors.items() if not error <= tolerance}
    if over:
        worst = max(over, key=lambda name: over[name])
        raise ExportError(
            f"rank {rank} leaves {over[worst]:.2%} of the update of {worst} behind, and more than "
            f"{tolerance:.2%} in {len(over)} of {len(errors)} modules; nothing was written. Raise "
            "rank, leave it out to have it chosen, raise tolerance, or export merged weights."
        )


def _as_lora(
    twin: PeftModel, adapter: str, factors: Mapping[str, tuple[Tensor, Tensor]]
) -> PeftModel:
    """The copy's base with plain LoRA; consumes the copy."""
    layers = dict(twin.get_base_model().named_modules())
    conv = all(getattr(layers[name], "fan_in_fan_out", False) for name in factors)
    source: Any = twin.peft_config[adapter]
    base: nn.Module = twin.unload()
    ranks = {name: len(a) for name, (a, _) in factors.items()}
    largest = max(ranks.values())
    pattern = {f"^{re.escape(name)}": rank for name, rank in ranks.items()}
    config = LoraConfig(
        r=largest,
        lora_alpha=largest,
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        fan_in_fan_out=conv,
        modules_to_save=source.modules_to_save,
        task_type=source.task_type,
        base_model_name_or_path=source.base_model_name_or_path,
    )
    if source.base_fingerprint is not None:
        remember_base_(config, source.base_fingerprint)
    names = [name for name, _ in base.named_modules()]
    config.target_modules = exact_target_modules(list(factors), names)
    with torch.random.fork_rng(devices=[]):
        plain = get_peft_model(base, config)
    with torch.no_grad():
        for name, (a, b) in factors.items():
            layer: Any = plain.get_base_model().get_submodule(name)
            layer.lora_A["default"].weight.copy_(a)
            layer.lora_B["default"].weight.copy_(b)
    return plain.eval()
