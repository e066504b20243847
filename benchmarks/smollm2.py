"""Profiling and training steps of SmolLM2-135M on the standard library's source text."""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import rankwise as rw
from benchmarks.timing import Row, at_most, interleaved
from rankwise.experiments.smollm2 import smollm2_folder
from rankwise.experiments.stdlib_text import write_stdlib_text
from rankwise.profiling import GradientProfile
from rankwise.profiling.capture import capture_gradients
from rankwise.training.config import DataConfig
from rankwise.training.data import load_token_data

LENGTH = 128
Batch = Mapping[str, Tensor]


def measure(*, quick: bool) -> list[Row]:
    """The profile against frozen passes, and RaLoRA's training step against PEFT's LoRA step."""
    folder = smollm2_folder()
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    count, size, runs = (2, 4, 3) if quick else (8, 8, 7)
    batches = _batches(folder, count, size)
    profile, rows = _profile(base, batches)
    return rows + _steps(base, profile, batches[0], runs)


def _batches(folder: Path, count: int, size: int) -> list[Batch]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with tempfile.TemporaryDirectory() as scratch:
        files = write_stdlib_text(Path(scratch), max_bytes=1_000_000)
        config = DataConfig(
            train=str(files.train), held_out=str(files.held_out), max_length=LENGTH, packing=True
        )
        loader = load_token_data(config, tokenizer, seed=0).loader(size, seed=0)
        return [batch for batch, _ in zip(loader, range(count), strict=False)]


def _profile(base: nn.Module, batches: list[Batch]) -> tuple[GradientProfile, list[Row]]:
    """Whole profile against the bare forward and backward of the same batches."""

    def frozen_pass() -> None:
        with capture_gradients(base, [], lambda *_: None):
            for batch in batches:
                base(**batch, use_cache=False).loss.backward()

    for parameter in base.parameters():
        parameter.requires_grad_(False)
    frozen_pass()
    started = time.perf_counter()
    frozen_pass()
    frozen = time.perf_counter() - started
    started = time.perf_counter()
    profile = rw.profile_gradients(base, batches, batches=len(batches), progress=False)
    total = time.perf_counter() - started
    shape = f"{len(batches)} x ({batches[0]['input_ids'].shape[0]} x {LENGTH})"
    return profile, [
        at_most(f"SmolLM2 profile with GIDs, {shape}", total / frozen, 1.45, "of frozen passes"),
        Row(f"SmolLM2 frozen passes, {shape}", frozen, "s"),
    ]


def _steps(base: nn.Module, profile: GradientProfile, batch: Batch, runs: int) -> list[Row]:
    """Forward and backward with adapters; the optimizer is the same for all and left out."""

    def step_of(method: rw.Lora | rw.RaLora) -> Callable[[], None]:
        model = rw.attach(copy.deepcopy(base), method.plan(profile))
        model.train()

        def step() -> None:
            model(**batch, use_cache=False).loss.backward()
            model.zero_grad()

        return step

    methods = {"LoRA": rw.Lora(), "RaLoRA": rw.RaLora(), "RaLoRA-Pro": rw.RaLoraPro()}
    seconds = interleaved(runs, **{name: step_of(method) for name, method in methods.items()})
    tokens = f"{batch['input_ids'].numel()} tokens"
    lora = seconds.pop("LoRA")
    rows = [
        at_most(f"SmolLM2 {name} step, {tokens}", value / lora, 1.0, "of PEFT's LoRA step")
        for name, value in seconds.items()
    ]
    return [*rows, Row(f"SmolLM2 step with PEFT's LoRA, {tokens}", lora, "s")]
