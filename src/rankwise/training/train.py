"""One run: profile, plan, attach, train, evaluate, record."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from rankwise.adapters import attach
from rankwise.dynamic import RankCallback
from rankwise.errors import ConfigError, reason_of
from rankwise.plan import BlockOptions, RankPlan
from rankwise.profiling import GradientProfile, profile_gradients
from rankwise.profiling.measure import model_name
from rankwise.provenance import (
    git_commit,
    hardware,
    model_fingerprint,
    versions,
)
from rankwise.records import RunRecord
from rankwise.targets import find_targets
from rankwise.training.config import RunConfig
from rankwise.training.data import TokenData, load_token_data
from rankwise.training.fit import Curves, check_tools, fit
from rankwise.training.options import FULL
from rankwise.training.run_folder import TrainingRun, check_output, save_or_rescue
from rankwise.training.tracking import GradientTracker, tracked_modules

logger = logging.getLogger(__name__)

Notify = Callable[[str], None]


def load_model(source: str, dtype: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model, on the GPU if there is one, and its tokenizer.

    Args:
        source: A local folder, or a hub id.
        dtype: Of the weights.

    Raises:
        ConfigError: There is no such folder, the hub cannot be reached or lacks the id, or the
            GPU is too small.
    """
    device = own_device()
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, dtype))
    except (OSError, ValueError, ImportError) as error:  # of ImportError: quantised bases
        raise ConfigError(
            f"model={source!r} cannot be loaded ({reason_of(error)}). Name a local transformers "
            "folder, or a hub id on a machine with a network; a gated or private one needs `hf "
            "auth login`."
        ) from error
    try:
        return model.to(device), tokenizer  # type: ignore[arg-type]  # a decorator hides self
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"model={source!r} does not fit into the memory of {device}; take dtype=bfloat16, or "
            "set CUDA_VISIBLE_DEVICES= for the CPU."
        ) from error


def own_device() -> torch.device:
    """The GPU of this process, under torchrun its own; the CPU where there is none.

    Raises:
        ConfigError: torchrun started more processes than there are GPUs.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    own, count = int(os.environ.get("LOCAL_RANK") or 0), torch.cuda.device_count()
    if own >= count:
        raise ConfigError(
            f"LOCAL_RANK={own}: there are {count} GPUs; start at most as many processes, or set "
            "CUDA_VISIBLE_DEVICES= for the CPU."
        )
    torch.cuda.set_device(own)  # where NCCL looks
    return torch.device("cuda", own)


def train(
    config: RunConfig, *, profile: GradientProfile | None = None, notify: Notify | None = None
) -> TrainingRun:
    """Carry out one run and write adapter, plan, profile and record to `config.output`.

    Args:
        config: What to do.
        profile: A profile of this model on this data, to be used instead of making one.
        notify: Called with a line of text when a stage begins.

    Raises:
        RankwiseError: Any bad input; it is found before anything is written.
    """
    say = notify or logger.info
    output = Path(config.output)
    _check_alone()
    check_output(output, config.model)
    check_tools(config.training.report_to)
    set_seed(config.seed)
    model, tokenizer = load_model(config.model, config.dtype)
    data = load_token_data(config.data, tokenizer, seed=config.seed)
    name, fingerprint = model_name(model), model_fingerprint(model)  # of the base
    plan, used = _planned(config, model, data, profile, say)
    tracker = _tracker(config, model)
    set_seed(config.seed)  # the adapters' draw must not depend on whether a profile was made
    adapted = _trainable(model, plan, config)
    trainable = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    method = _method_name(config, plan)
    if config.dtype == "float16":
        say(
            "warning: dtype=float16: gradients of a mean over many tokens underflow in fp16, and "
            "training has no loss scaler; bfloat16 and float32 lose nothing"
        )
    say(f"training {trainable:,} parameters with {method}")
    dynamic = None if plan is None else _dynamic(config, plan)
    # Trainer wants a folder of its own and makes it at once; ours appears only when all is well
    with tempfile.TemporaryDirectory(prefix="rankwise-") as scratch:
        curves = fit(config, adapted, tokenizer, data, say, Path(scratch), dynamic, tracker)
        if dynamic is not None:
            plan = dynamic.ranks.plan
            trainable = plan.parameters
        # a profile that was given cost this run nothing
        profiled = used.provenance.seconds if used is not None and used is not profile else 0.0
        modules = {} if plan is None else plan.modules
        record = RunRecord(
            method=method,
            model=name,
            model_fingerprint=fingerprint,
            trainable_parameters=trainable,
            ranks={module: m.rank for module, m in modules.items()},
            blocks={module: m.blocks for module, m in modules.items()},
            **_measured(curves, profiled),
            **_circumstances(config, data),
        )
        events = dynamic.ranks.events if dynamic is not None else None
        tracking = None if tracker is None else tracker.tracking
        run = TrainingRun(record, plan, used, adapted, events, tracking, curves.analysis)
        save_or_rescue(run, tokenizer, output, Path(scratch))
    return run


def _check_alone() -> None:
    workers = os.environ.get("WORLD_SIZE") or "1"
    if workers != "1":
        raise ConfigError(
            f"WORLD_SIZE={workers}: rankwise train runs in one process; start it without torchrun. "
            "Several devices train through transformers' Trainer on rankwise.attach(model, plan), "
            "with rankwise.RankCallback for ranks that move."
        )


def _planned(
    config: RunConfig,
    model: nn.Module,
    data: TokenData,
    profile: GradientProfile | None,
    say: Notify,
) -> tuple[RankPlan | None, GradientProfile | None]:
    """Plan, of the configured adapter, and profile; neither where all weights are trained."""
    if config.is_full:
        return None, None
    plan, used = make_plan(config, model, data, profile, say)
    kind = config.adapter.get("kind")
    if not kind:
        return plan, used
    if kind != "ralora":
        return replace(plan, adapter=kind, block_options=BlockOptions()), used
    named = {field.name for field in fields(BlockOptions)}
    own = {key: value for key, value in config.adapter_options().items() if key in named}
    blocks = replace(plan.block_options, **own)
    return replace(plan, adapter=kind, block_options=blocks), used


def _method_name(config: RunConfig, plan: RankPlan | None) -> str:
    name = FULL if plan is None else plan.method
    kind = config.adapter.get("kind")
    return f"{name}, {kind}" if kind else name


def _measured(curves: Curves, profiled: float) -> dict[str, Any]:
    """The record's fields that training leaves."""
    seconds = {"profile": profiled} | curves.seconds
    return {
        "train_loss": curves.train_loss,
        "held_out": curves.held_out,
        "seconds": {key: round(value, 3) for key, value in seconds.items()},
        "peak_memory_mib": peak_memory_mib(),
        "train_tokens": curves.tokens,
    }


def _circumstances(config: RunConfig, data: TokenData) -> dict[str, Any]:
    """The record's fields that say what was run, on what, and when."""
    return {
        "seed": config.seed,
        "data": data.description(),
        "config": config.model_dump(mode="json"),
        "versions": versions(),
        "hardware": hardware(),
        "commit": git_commit([Path(config.output)]),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _trainable(
    model: PreTrainedModel, plan: RankPlan | None, config: RunConfig
) -> PeftModel | PreTrainedModel:
    """The model with the plan's adapters; without a plan, the model with every weight to train."""
    if plan is None:
        return model.requires_grad_(True)
    return attach(
        model,
        plan,
        allow_other_base=config.allow_other_base,
        dropout=config.training.dropout,
        **config.adapter_options(),
    )


def _tracker(config: RunConfig, model: nn.Module) -> GradientTracker | None:
    """What follows gradients while training, if that was asked for."""
    if config.track is None:
        return None
    shapes = tracked_modules(model, config.targets, config.track.modules)
    return GradientTracker(model, shapes, config.track.every)


def make_plan(
    config: RunConfig,
    model: nn.Module,
    data: TokenData,
    profile: GradientProfile | None,
    say: Notify,
) -> tuple[RankPlan, GradientProfile | None]:
    """The configured plan, profiling first if the method needs it and no profile was given."""
    if config.plan is not None:
        plan = RankPlan.load(config.plan)
        plan.check_fits(model, allow_other_base=config.allow_other_base)
        return plan, None
    method = config.make_method()
    if not method.needs_profile:
        return method.plan(find_targets(model, config.targets)), None  # type: ignore[arg-type]
    if profile is None:
        settings = config.profile
        size = settings.batch_size or config.training.batch_size
        batches = settings.batches or method.profile_batches
        say(f"measuring gradients over {batches} batches of {size}")
        profile = profile_gradients(
            model,
            data.loader(size, seed=config.seed),
            config.targets,
            batches=batches,
            train_mode=settings.train_mode,
            statistics=method.statistics,
        )
    return method.plan(profile), profile


def _dynamic(config: RunConfig, plan: RankPlan) -> RankCallback | None:
    """What moves ranks while training, if that was asked for."""
    options = config.make_dynamic()
    return None if options is None else RankCallback(plan, config.make_method(), options)


def peak_memory_mib() -> float | None:
    """Peak GPU memory where CUDA is used, else this process's peak resident memory, in MiB.

    None where the system does not tell (Windows).
    """
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return round(torch.cuda.max_memory_allocated() / 2**20, 1)
    try:
        import resource
    except ModuleNotFoundError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10), 1)
