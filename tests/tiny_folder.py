"""A transformers folder with a tiny Llama and a tokenizer, and small data files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tiny_models import tiny_llama

SENTENCES = [
    "the quick brown fox jumps over the lazy dog",
    "a gradient points uphill and the optimizer walks down",
    "ranks are whole numbers and budgets are hard",
    "every layer gets as much adapter as it needs",
]


def save_tiny_llama(folder: Path, seed: int = 0) -> Path:
    """Save model and tokenizer; returns the folder."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<eos>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    fast.save_pretrained(folder)
    model = tiny_llama(seed, vocab_size=len(fast), eos_token_id=fast.eos_token_id)
    model.save_pretrained(folder)
    return folder


def write_rows(path: Path, rows: Sequence[Mapping[str, object]]) -> Path:
    """Write rows as JSON lines; returns the file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_texts(path: Path, count: int = 24) -> Path:
    """Rows with a `text` column."""
    return write_rows(path, [{"text": SENTENCES[i % 4] + f" {i}"} for i in range(count)])
