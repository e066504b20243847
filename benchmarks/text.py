"""SmolLM2-135M and batches of the standard library's source text."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from rankwise.experiments.smollm2 import smollm2_folder
from rankwise.experiments.stdlib_text import write_stdlib_text
from rankwise.training.config import DataConfig
from rankwise.training.data import load_token_data

LENGTH = 128
"""Tokens of a sequence."""
Batch = Mapping[str, Tensor]


def frozen_model() -> nn.Module:
    """The model in fp32, every weight frozen."""
    model = AutoModelForCausalLM.from_pretrained(smollm2_folder(), dtype=torch.float32)
    return model.eval().requires_grad_(False)


def text_batches(count: int, size: int) -> list[Batch]:
    """`count` batches of `size` sequences, the same at every call."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder())
    with tempfile.TemporaryDirectory() as scratch:
        files = write_stdlib_text(Path(scratch), max_bytes=1_000_000)
        config = DataConfig(
            train=str(files.train), held_out=str(files.held_out), max_length=LENGTH, packing=True
        )
        loader = load_token_data(config, tokenizer, seed=0).loader(size, seed=0)
        return [batch for batch, _ in zip(loader, range(count), strict=False)]
