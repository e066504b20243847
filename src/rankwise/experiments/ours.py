"""This project's own adapters as rows that are sized like the baselines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from peft import PeftConfig
from torch import nn
from torch.optim import AdamW, Optimizer

from rankwise.adapters import LrLoraConfig, RaLoraConfig, lr_lora_param_groups
from rankwise.adapters.transfer import BASES
from rankwise.errors import ConfigError, nearest
from rankwise.experiments.baselines import SIZE_OPTIONS, common_options
from rankwise.experiments.sizing import Baseline, Job, OptimizerFactory, Size, lora_cost

_RATIO_KEY = "amplitude_ratio"
MELORA_BLOCKS = 2
"""Mini adapters of MELoRA, as in the RaLoRA paper's comparison; its own paper tries 2 to 16."""


def lr_lora(name: str, options: Mapping[str, Any], alpha_over_r: float = 2.0) -> Baseline:
    """LR-LoRA, or SineLoRA with `basis="sine"`, with options of `LrLoraConfig`.

    A module costs `r (d_in + d_out)` and the parameters of its function: K amplitudes, K bandwidths
    if they are learned and K grid points if they are (LR-LoRA section 4.1).

    Raises:
        ConfigError: An option is unknown or its value is not allowed.
    """
    settings = dict(options)
    ratio = settings.pop(_RATIO_KEY, None)
    example = _config(LrLoraConfig, settings, name, [_RATIO_KEY])
    own, shared = function_parameters(example)

    def config(job: Job, size: Size) -> PeftConfig:
        return LrLoraConfig(
            r=size.common,
            alpha=alpha_over_r * size.common,
            rank_pattern=dict(size.values),
            **common_options(job),
            **drawn_by(job, settings),
        )

    return Baseline(
        name,
        "Ji et al. 2025 (SineLoRA)" if example.basis == "sine" else "LR-LoRA",
        lambda shape, r: r * shape.rank_cost + own,
        config,
        per_module=True,
        revision=2 if draws_grid(settings) else 1,  # the first drew one grid for every seed
        shared=shared,
        optimizer=None if example.basis == "sine" else lr_lora_optimizer(ratio),
    )


def draws_grid(options: Mapping[str, Any]) -> bool:
    """Whether LR-LoRA's grid is random and has no seed of its own."""
    return options.get("grid") == "random" and "grid_seed" not in options


def drawn_by(job: Job, options: Mapping[str, Any]) -> dict[str, Any]:
    """LR-LoRA's options; a random grid is drawn by the seed of the run."""
    return dict(options) | ({"grid_seed": job.seed} if draws_grid(options) else {})


def lr_lora_optimizer(amplitude_ratio: float | None = None) -> OptimizerFactory:
    """AdamW with LR-LoRA's own learning rate for the amplitudes."""
    options = {} if amplitude_ratio is None else {_RATIO_KEY: amplitude_ratio}

    def make(model: nn.Module, lr: float, weight_decay: float) -> Optimizer:
        return AdamW(lr_lora_param_groups(model, lr, **options), weight_decay=weight_decay)

    return make


def function_parameters(config: LrLoraConfig) -> tuple[int, int]:
    """Trainable parameters of f: of each module, and those that all modules share."""
    if config.basis == "sine":
        return 0, 0
    basis, k = BASES[config.basis], config.points
    parts = {"amplitude": basis.amplitudes(k)}
    if basis.local and config.bandwidth == "learned":
        parts["bandwidth"] = k
    if basis.local and config.grid == "learned":
        parts["grid"] = k
    shared = sum(n for part, n in parts.items() if config.share in (part, "all"))
    return sum(parts.values()) - shared, shared


def melora(name: str, options: Mapping[str, Any], alpha_over_r: float = 2.0) -> Baseline:
    """MELoRA: every module's update is `blocks` small LoRAs side by side, all of LoRA's cost.

    Each mini adapter draws A for its own fan-in, as a LoRA of that size would.

    Raises:
        ConfigError: An option is unknown or its value is not allowed.
    """
    own = {"blocks": MELORA_BLOCKS, "init_fan_in": "block", "scaling": "paper"}
    settings: dict[str, Any] = own | dict(options)
    _config(RaLoraConfig, settings, name)

    def config(job: Job, size: Size) -> PeftConfig:
        return RaLoraConfig(
            r=size.common,
            alpha=alpha_over_r * size.common,
            rank_pattern=dict(size.values),
            **common_options(job),
            **settings,
        )

    revision = 1 if "blocks" in options else 2  # the first had 4 blocks
    return Baseline(name, "Ren et al. 2024", lora_cost, config, per_module=True, revision=revision)


def _config(
    cls: type[Any], options: Mapping[str, Any], name: str, also: list[str] | None = None
) -> Any:
    """A configuration, so that wrong options are found before anything runs."""
    known = [field.name for field in fields(cls) if field.name not in SIZE_OPTIONS]
    for key in options:
        if key not in known:
            raise ConfigError(f"{name}.{key}: no such option; {nearest(key, known + (also or []))}")
    try:
        return cls(target_modules=["x"], **options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{name}: {error}") from error
