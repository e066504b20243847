"""An experiment small enough for a unit test: a tiny Llama and a few sentences to complete."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiny_folder import SENTENCES, save_tiny_llama, write_rows


def write_experiment(folder: Path, **changes: Any) -> dict[str, Any]:
    """Model and data in a folder; returns the experiment, with some keys replaced."""
    if not (folder / "model").is_dir():
        save_tiny_llama(folder / "model")
        rows = [
            {"question": f"{SENTENCES[i % 4][:20]} {i}", "answer": SENTENCES[i % 4][20:]}
            for i in range(40)
        ]
        write_rows(folder / "train.jsonl", rows[:30])
        write_rows(folder / "test.jsonl", rows[30:])
    task = {
        "name": "lines",
        "kind": "completion",
        "train": str(folder / "train.jsonl"),
        "test": str(folder / "test.jsonl"),
        "validation_rows": 6,
        "max_length": 48,
    }
    document = {
        "output": str(folder / "out"),
        "model": str(folder / "model"),
        "tasks": [task],
        "methods": ["lora", "ralora"],
        "budgets": [2],
        "seeds": [0, 1],
        "learning_rates": [1e-2],
        "training": {"steps": 4, "batch_size": 4, "evaluations": 2},
        "profile": {"batches": 2},
        "reference": {"rank": 2},
    }
    return document | changes
