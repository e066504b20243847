"""GIDs of SmolLM2-135M in 4 and 8 bit against fp32, on the same batches, as Markdown.

    python scripts/quantised_gid.py [N]

Needs the extras `demo` and `quant`. The text is Python's standard library.
"""

from __future__ import annotations

import copy
import logging
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import bitsandbytes as bnb
import numpy as np
import torch
from torch import Tensor, nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers import AutoModelForCausalLM, AutoTokenizer

import rankwise as rw
from rankwise.experiments.smollm2 import smollm2_folder
from rankwise.experiments.stdlib_text import write_stdlib_text
from rankwise.targets import find_targets, linear_weight
from rankwise.training.config import DataConfig
from rankwise.training.data import load_token_data

ROWS, LENGTH = 2, 128


def stdlib_batches(folder: Path, count: int) -> list[Mapping[str, Tensor]]:
    """Packed batches of the standard library's source."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with tempfile.TemporaryDirectory() as scratch:
        files = write_stdlib_text(Path(scratch), max_bytes=1_000_000)
        config = DataConfig(
            train=str(files.train), held_out=str(files.held_out), max_length=LENGTH, packing=True
        )
        loader = load_token_data(config, tokenizer, seed=0).loader(ROWS, seed=0)
        return [batch for batch, _ in zip(loader, range(count), strict=False)]


def four_bit(layer: nn.Linear) -> nn.Module:
    """A bitsandbytes nf4 layer with blocks of 64 weights, computing in fp32."""
    return bnb.nn.Linear4bit(
        layer.in_features,
        layer.out_features,
        bias=layer.bias is not None,
        compute_dtype=torch.float32,
        quant_type="nf4",
    )


def eight_bit(layer: nn.Linear) -> nn.Module:
    """A bitsandbytes 8-bit layer: weights by row, activations by token (LLM.int8, threshold 6)."""
    return bnb.nn.Linear8bitLt(
        layer.in_features,
        layer.out_features,
        bias=layer.bias is not None,
        has_fp16_weights=False,
        threshold=6.0,
    )


def with_layers(model: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    """A copy whose target layers are replaced by quantised ones."""
    model = copy.deepcopy(model)
    for name in find_targets(model):
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        quantised = make(layer)
        quantised.load_state_dict(layer.state_dict())
        model.set_submodule(name, quantised.to("cpu"))  # the move is what quantises
    return model


def with_torchao(model: nn.Module) -> nn.Module:
    """A copy whose target layers hold torchao's int8 weights."""
    model = copy.deepcopy(model)
    targets = set(find_targets(model))
    quantize_(model, Int8WeightOnlyConfig(), filter_fn=lambda _, name: name in targets)
    return model


def dequantised(model: nn.Module, base: nn.Module) -> nn.Module:
    """The fp32 model with the weights a quantised one holds, but plain arithmetic."""
    plain = copy.deepcopy(base)
    for name in find_targets(base):
        weight = linear_weight(model.get_submodule(name))
        plain.get_submodule(name).weight.data.copy_(weight)
    return plain


def differences(found: rw.GradientProfile, exact: rw.GradientProfile) -> list[str]:
    """Median, 95th percentile and maximum of the relative difference of GID, and the module."""
    relative = {name: abs(found.gid[name] / gid - 1) for name, gid in exact.gid.items()}
    values = np.array(list(relative.values()))
    worst = max(relative, key=relative.__getitem__)
    shares = [np.median(values), np.quantile(values, 0.95), values.max(), (values > 0.05).mean()]
    return [*(f"{share:.1%}" for share in shares), f"`{worst}`"]


def row(cells: Sequence[object]) -> str:
    """A Markdown table row."""
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def main(count: int = 8) -> None:
    """Print the comparison."""
    logging.disable(logging.WARNING)
    folder = smollm2_folder()
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    batches = stdlib_batches(folder, count)

    def profiled(model: nn.Module) -> tuple[rw.GradientProfile, float]:
        started = time.perf_counter()
        profile = rw.profile_gradients(model, batches, batches=count, progress=False)
        return profile, time.perf_counter() - started

    makers: dict[str, Callable[[], nn.Module]] = {
        "bitsandbytes nf4": lambda: with_layers(base, four_bit),
        "bitsandbytes 8 bit": lambda: with_layers(base, eight_bit),
        "torchao int8 weights": lambda: with_torchao(base),
    }
    exact, seconds = profiled(base)
    p = exact.provenance
    print(
        f"{p.model}, N = {p.batches} batches of {ROWS} x {LENGTH} tokens; fp32 in {seconds:.0f} s"
    )
    print(f"GID in fp32: {min(exact.gid.values()):.1f} to {max(exact.gid.values()):.1f}\n")
    print(row(["against fp32", "median", "p95", "max", "over 5 %", "largest at", "s"]), flush=True)
    print(row(["---"] * 7))
    for label, make in makers.items():
        model = make()
        profile, seconds = profiled(model)
        print(row([label, *differences(profile, exact), f"{seconds:.0f}"]), flush=True)
        if "bits" in label:
            plain, seconds = profiled(dequantised(model, base))
            cells = differences(plain, exact)
            print(row([f"{label}, its weights in fp32", *cells, f"{seconds:.0f}"]), flush=True)
            cells = differences(profile, plain)
            print(row([f"{label} against its weights in fp32", *cells, ""]), flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
