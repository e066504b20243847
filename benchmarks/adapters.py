"""Adapters: the fused layer alone, and whole training steps of SmolLM2-135M, time and memory."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import rankwise as rw
from benchmarks.timing import Row, at_most, interleaved
from rankwise.profiling import GradientProfile

TOKENS, RANK = 1024, 8
Batch = Mapping[str, Tensor]
Step = Callable[[], None]


def measure(*, quick: bool) -> list[Row]:
    """One layer: block-diagonal adapters against the fused LoRA of the same rank."""
    sizes = (576, 2048) if quick else (576, 1536, 2048)
    blocks = (8, 32) if quick else (2, 8, 32, 64)
    rows = []
    for d in sizes:
        layers = {"peft": _lora(d), "lora": _lora(d)}
        rw.fuse_lora_(layers["lora"])
        for n in blocks:
            config = rw.RaLoraConfig(r=RANK, blocks=n, target_modules=["0"])
            layers[f"n{n}"] = get_peft_model(_base(d), config)
        x, upstream = torch.randn(TOKENS, d), torch.randn(TOKENS, d)
        steps = {name: layer_step(layer, x, upstream) for name, layer in layers.items()}
        seconds = interleaved(5 if quick else 15, **steps)
        name = f"layer {d} x {d}, r = {RANK}, {TOKENS} tokens"
        rows.append(Row(f"{name}, fused LoRA", seconds["lora"] / seconds["peft"], "of PEFT's LoRA"))
        for n in blocks:
            ratio = seconds[f"n{n}"] / seconds["lora"]
            promised = d == 2048 and n <= 32
            title, unit = f"{name}, n = {n}", "of the fused LoRA"
            rows.append(at_most(title, ratio, 1.1, unit) if promised else Row(title, ratio, unit))
    return rows


def measure_steps(
    base: nn.Module, profile: GradientProfile, batch: Batch, *, runs: int
) -> list[Row]:
    """Forward and backward with adapters; the optimizer is the same for all and left out.

    Args:
        base: A frozen language model.
        profile: Of this model, for RaLoRA-Pro's own plan.
        batch: What a step computes.
        runs: How often.
    """
    lora = rw.Lora(r=RANK).plan(profile)
    models = {
        "peft": rw.attach(copy.deepcopy(base), lora),
        "fused": rw.attach(copy.deepcopy(base), lora),
        "ralora": rw.attach(copy.deepcopy(base), rw.RaLora(r=RANK).plan(profile)),
        "pro": rw.attach(copy.deepcopy(base), rw.RaLoraPro(r=RANK).plan(profile)),
    }
    rw.fuse_lora_(models["fused"])
    steps = {name: _model_step(model, batch) for name, model in models.items()}
    seconds = interleaved(runs, **steps)
    memory = {name: peak_extra_bytes(step) for name, step in steps.items()}
    tokens = f"{batch['input_ids'].numel()} tokens"
    rows = []
    limits = (("fused", "fused LoRA", 0.92), ("ralora", "RaLoRA", 1.0), ("pro", "RaLoRA-Pro", 1.0))
    for key, label, limit in limits:
        title = f"SmolLM2 {label} step, {tokens}"
        rows.append(
            at_most(f"{title}, time", seconds[key] / seconds["peft"], limit, "of PEFT's LoRA step")
        )
        rows.append(
            at_most(
                f"{title}, peak memory", memory[key] / memory["peft"], limit, "of PEFT's LoRA step"
            )
        )
    rows.append(Row(f"SmolLM2 step with PEFT's LoRA, {tokens}", seconds["peft"], "s"))
    rows.append(
        Row(f"SmolLM2 step with PEFT's LoRA, {tokens}, extra", memory["peft"] / 2**20, "MiB")
    )
    return [*rows, *_usual_steps(base, batch, runs), _merged(base, models["pro"], batch, runs)]


def _usual_steps(base: nn.Module, batch: Batch, runs: int) -> list[Row]:
    """Fused LoRA where PEFT keeps copies of inputs: with dropout, and on a bf16 model."""
    few = {key: value[:2] for key, value in batch.items()}
    tokens, unit = few["input_ids"].numel(), "of PEFT's LoRA step"
    rows = []
    for title, dtype, dropout in (
        ("dropout 0.05", torch.float32, 0.05),
        ("bf16 model", torch.bfloat16, 0.0),
        ("bf16 model, dropout 0.05", torch.bfloat16, 0.05),
    ):
        config = LoraConfig(r=RANK, lora_dropout=dropout, target_modules="all-linear")
        models = {
            name: get_peft_model(copy.deepcopy(base).to(dtype), config)
            for name in ("peft", "fused")
        }
        rw.fuse_lora_(models["fused"])
        steps = {name: _model_step(model, few) for name, model in models.items()}
        memory = {name: peak_extra_bytes(step) for name, step in steps.items()}
        name = f"SmolLM2 fused LoRA step, {tokens} tokens, {title}"
        rows.append(at_most(f"{name}, peak memory", memory["fused"] / memory["peft"], 0.92, unit))
        if dtype == torch.float32:  # this says nothing of bf16 where the processor has none
            seconds = interleaved(runs, **steps)
            rows.append(at_most(f"{name}, time", seconds["fused"] / seconds["peft"], 0.92, unit))
    return rows


def _merged(base: nn.Module, model: nn.Module, batch: Batch, runs: int) -> Row:
    merged = copy.deepcopy(model).merge_and_unload()

    def inference(network: nn.Module) -> Step:
        def run() -> None:
            with torch.no_grad():
                network(**batch, use_cache=False)

        return run

    # The same products twice: only more runs than a step gets tell 2 % from noise.
    seconds = interleaved(3 * runs, base=inference(base), merged=inference(merged))
    ratio = seconds["merged"] / seconds["base"]
    return at_most("SmolLM2 inference, RaLoRA-Pro merged", ratio, 1.02, "of the base model's time")


def peak_extra_bytes(step: Step) -> float:
    """Most that is allocated during a step beyond what was there before, by torch's allocator."""
    step()
    activity = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activity, profile_memory=True) as profiler:
        step()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events))


def _base(d: int) -> nn.Module:
    return nn.Sequential(nn.Linear(d, d, bias=False))


def _lora(d: int) -> nn.Module:
    return get_peft_model(_base(d), LoraConfig(r=RANK, target_modules=["0"]))


def layer_step(layer: nn.Module, x: Tensor, upstream: Tensor) -> Step:
    """Forward and backward of one layer with its adapter."""
    x = x.clone().requires_grad_()

    def step() -> None:
        layer(x).backward(upstream)
        layer.zero_grad()
        x.grad = None

    return step


def _model_step(model: nn.Module, batch: Batch) -> Step:
    model.train()

    def step() -> None:
        model(**batch, use_cache=False).loss.backward()
        model.zero_grad()

    return step
