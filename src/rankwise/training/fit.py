"""The Trainer's part of a run: optimizer, schedule, callbacks, and the curves they leave."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
)
from transformers.integrations import get_reporting_integration_callbacks
from trl import SFTConfig, SFTTrainer

from rankwise.adapters import LrLoraLinear, fuse_lora_, lr_lora_param_groups, unfuse_lora_
from rankwise.dynamic import RankCallback
from rankwise.errors import ConfigError
from rankwise.out_of_memory import out_of_memory_as
from rankwise.records import HeldOutLoss, TrainLoss
from rankwise.training.analysis import AnalysisCallback, adapted_layers, default_steps
from rankwise.training.config import RunConfig, TrainingConfig
from rankwise.training.data import TokenData
from rankwise.training.evaluate import HeldOutCallback, held_out_loss
from rankwise.training.tracking import GradientTracker

Notify = Callable[[str], None]

_OUT_OF_MEMORY = (
    "out of memory while training; nothing was written. Less is needed with a smaller "
    "training.batch_size (training.gradient_accumulation makes up for it), a smaller "
    "data.max_length, training.gradient_checkpointing=true or dtype=bfloat16."
)

# transformers 5 renamed the option on the way and warns at the old name
_CHECKPOINTING = (
    "activation_checkpointing"
    if "activation_checkpointing" in SFTConfig.__dataclass_fields__
    else "gradient_checkpointing"
)


@dataclass(frozen=True)
class Curves:
    """What training left beside the weights; seconds of `evaluate`, `train`, and `track` if any."""

    train_loss: list[TrainLoss]
    held_out: list[HeldOutLoss]
    tokens: int
    seconds: dict[str, float]
    analysis: dict[str, Any] | None


def fit(
    config: RunConfig,
    model: PeftModel | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: TokenData,
    say: Notify,
    scratch: Path,
    *callbacks: RankCallback | GradientTracker | None,
) -> Curves:
    """Train and evaluate; what Trainer and the tools of `report_to` write goes to `scratch`."""
    settings = config.training
    steps = settings.steps or _steps(settings, len(data.train))
    loader = data.held_out_loader(settings.evaluation_batch_size)
    callback = HeldOutCallback(
        lambda step: held_out_loss(model, loader, step=step),
        every=settings.evaluate_every or max(1, steps // 5),
        say=say,
    )
    analysis = _analysis(config, model, steps)
    started = time.perf_counter()
    trainer = SFTTrainer(
        model=model,
        args=_arguments(config, steps, scratch),
        train_dataset=data.train,
        data_collator=data.collator,
        processing_class=tokenizer,
        callbacks=[callback, *filter(None, callbacks), *filter(None, [analysis])],
        optimizers=(_optimizer(model, config), None),
    )
    trainer.remove_callback(PrinterCallback)  # the held-out lines are what a log needs
    if settings.fuse_lora:
        fuse_lora_(model)
    try:
        with out_of_memory_as(ConfigError, _OUT_OF_MEMORY):
            trainer.train()
    finally:
        unfuse_lora_(model)
    seconds = {"evaluate": callback.seconds}
    for each in callbacks:
        if isinstance(each, GradientTracker):
            seconds["track"] = each.seconds
    seconds["train"] = time.perf_counter() - started - sum(seconds.values())
    document = None if analysis is None else _document(analysis, say)
    tokens = int(trainer.state.num_input_tokens_seen)
    return Curves(_train_loss(trainer), callback.curve, tokens, seconds, document)


def check_tools(names: list[str]) -> None:
    """Refuse tools of `report_to` that Trainer would refuse, which is after profiling.

    Raises:
        ConfigError: One is not known or not installed.
    """
    try:
        single = names[0] if names in (["all"], ["none"]) else names
        for tool in get_reporting_integration_callbacks(single):
            tool()
    except (ValueError, RuntimeError, ImportError) as error:
        raise ConfigError(
            f"training.report_to={names}: {error} Install what is missing, or leave it out."
        ) from error


def _train_loss(trainer: SFTTrainer) -> list[TrainLoss]:
    return [
        TrainLoss(step=int(entry["step"]), loss=float(entry["loss"]))
        for entry in trainer.state.log_history
        if "loss" in entry
    ]


def _document(analysis: AnalysisCallback, say: Notify) -> dict[str, Any]:
    """What was recorded of the adapters; how they computed is said too."""
    share = analysis.factorised_share()
    if share is not None:
        say(f"{share:.1%} of LR-LoRA's training passes took the factorised path")
    return analysis.document()


def _analysis(config: RunConfig, model: nn.Module, steps: int) -> AnalysisCallback | None:
    """What is recorded of the adapters: by default only where f makes it worth the while."""
    asked, layers = config.analysis.steps, adapted_layers(model).values()
    if asked is None and not any(isinstance(layer, LrLoraLinear) for layer in layers):
        return None
    at = default_steps(steps) if asked is None else asked
    return AnalysisCallback(model, at, config.analysis.modules) if at else None


def _optimizer(model: nn.Module, config: RunConfig) -> torch.optim.Optimizer | None:
    """LR-LoRA's amplitudes have a learning rate of their own; all else is Trainer's."""
    if not any(isinstance(module, LrLoraLinear) for module in model.modules()):
        return None
    settings, ratio = config.training, config.amplitude_ratio
    groups = lr_lora_param_groups(model, settings.learning_rate, amplitude_ratio=ratio)
    return torch.optim.AdamW(groups, weight_decay=settings.weight_decay)


def _steps(settings: TrainingConfig, rows: int) -> int:
    per_step = settings.batch_size * settings.gradient_accumulation
    return max(1, round(settings.epochs * -(-rows // per_step)))


def _arguments(config: RunConfig, steps: int, scratch: Path) -> SFTConfig:
    settings = config.training
    names = {"cosine": "cosine_with_min_lr", "constant": "constant_with_warmup"}
    scheduler = names.get(settings.scheduler, settings.scheduler)
    checkpointing: dict[str, Any] = {_CHECKPOINTING: settings.gradient_checkpointing}
    arguments = SFTConfig(
        **checkpointing,
        output_dir=str(scratch),
        max_steps=steps,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=scheduler,
        lr_scheduler_kwargs={"min_lr_rate": 0.1} if settings.scheduler == "cosine" else {},
        warmup_steps=round(settings.warmup * steps),
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        bf16=False,
        fp16=False,
        logging_steps=settings.log_every,
        logging_first_step=True,
        include_num_input_tokens_seen="non_padding",
        report_to=list(settings.report_to) or "none",
        save_strategy="no",
        seed=config.seed,
        data_seed=config.seed,
        dataset_kwargs={"skip_prepare_dataset": True},
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=not sys.stderr.isatty(),
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # of several GPUs one, which batch_size is told for
    return arguments
