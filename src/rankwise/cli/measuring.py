"""Commands that measure and decide: profile, plan, diff."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rankwise.cli.app import COLUMN_HELP, stderr, stdout

if TYPE_CHECKING:
    from rankwise.training.config import RunConfig

Targets = Annotated[
    str,
    typer.Option(
        help="'all-linear', a regular expression, or names separated by commas (q_proj,v_proj)."
    ),
]
Statistics = Annotated[
    str,
    typer.Option(
        help="More to measure, separated by commas: gram (for gard), fisher, convergence."
    ),
]
Engine = Annotated[
    str,
    typer.Option(
        help="hooks, sweep (layer by layer: less memory, more time) or auto, which chooses."
    ),
]
KeepGradients = Annotated[
    bool,
    typer.Option(
        "--keep-gradients",
        help="Save the mean gradients as well, 4 bytes a weight; merging profiles needs them.",
    ),
]
Earlier = Annotated[
    Path | None,
    typer.Option(help="An earlier profile of the same modules, to hold the new one against."),
]


def profile(
    model: Annotated[str, typer.Argument(help="A local transformers folder, or a hub id.")],
    data: Annotated[
        str, typer.Argument(help="A .jsonl, .json, .csv or .parquet file, or a hub data set id.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the profile.")],
    more: Annotated[
        list[str] | None,
        typer.Argument(
            help="More about the data, with the keys of a run file's data: subset=main "
            "prompt_column=question completion_column=answer."
        ),
    ] = None,
    targets: Targets = "all-linear",
    batches: Annotated[int, typer.Option(help="Batches to average.", min=1)] = 8,
    batch_size: Annotated[int, typer.Option(help="Sequences in a batch.", min=1)] = 8,
    max_length: Annotated[int, typer.Option(help="Tokens in a sequence.", min=2)] = 512,
    packing: Annotated[
        bool, typer.Option(help="Join texts and cut them into full sequences.")
    ] = False,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    seed: Annotated[int, typer.Option(help="Seed of the order of the data.")] = 0,
    statistics: Statistics = "",
    engine: Engine = "auto",
    keep_gradients: KeepGradients = False,
    column: Annotated[str, typer.Option(help=COLUMN_HELP)] = "gid",
    compare: Earlier = None,
) -> None:
    """Measure the gradients of every layer on your data, without training.

    Says how much memory that will take, prints one number of each layer, by default its gradient
    intrinsic dimensionality (GID), and saves the profile, from which any number of plans can be
    made. To divide the batches among processes:

        torchrun --nproc-per-node=2 -m rankwise.cli profile ...
    """
    from rankwise.profile_tables import check_column
    from rankwise.training.profile_run import ProfileSettings, run_profile
    from rankwise.training.yaml_text import parse_assignment

    check_column(column)
    told = dict(map(parse_assignment, more or ()))
    read = {"train": data, "max_length": max_length, "packing": packing} | {
        key.removeprefix("data."): value for key, value in told.items()
    }
    config = _run_config(model, out, read, targets=targets, dtype=dtype, seed=seed)
    settings = ProfileSettings(
        batches=batches,
        batch_size=batch_size,
        statistics=tuple(filter(None, statistics.split(","))),  # type: ignore[arg-type]
        engine=engine,  # type: ignore[arg-type]
        keep_gradients=keep_gradients,
        column=column,
        compare=compare,
    )
    shown = run_profile(config, settings, notify=stderr.print)
    if shown is not None:
        stdout.print(shown)
        stderr.print(f"profile saved to {out}; next: rankwise plan {out}")


def _run_config(
    model: str, out: Path, data: dict[str, Any], *, targets: str, dtype: str, seed: int
) -> RunConfig:
    """The settings as a run file would say them, so that they are checked in one place."""
    from rankwise.training.config import validate

    document = {
        "model": model,
        "output": str(out),
        "targets": _targets(targets),
        "dtype": dtype,
        "seed": seed,
        "data": data,
    }
    return validate(document, "profile")


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
        str | None,
        typer.Option(
            help="lora, lora-gid, ls-lora, gard, water-fill, ralora, ralora-pro, ralora-threshold "
            "or compose; default: ralora-pro."
        ),
    ] = None,
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
    from rankwise.errors import ConfigError
    from rankwise.profiling import GradientProfile
    from rankwise.training.options import make_method
    from rankwise.training.yaml_text import parse_assignment

    if (curve or recommend) and (out is not None or markdown or options or method):
        raise ConfigError(
            "--curve and --recommend make no plan; leave --method, --out, --markdown and options "
            "out."
        )
    chosen = make_method(
        method or "ralora-pro", dict(parse_assignment(option) for option in options or ())
    )
    measured = GradientProfile.load(profile)
    if curve or recommend:
        budgets = budget_curve(measured)
        if curve:
            stdout.print(str(budgets))
        if recommend:
            stdout.print(budgets.recommendation())
        return
    made = chosen.plan(measured)
    if out is not None:
        made.save(out)
    stdout.print(made.to_markdown() if markdown else str(made))
    if out is not None:
        stderr.print(f"plan saved to {out}")


def diff(
    before: Annotated[Path, typer.Argument(help="A plan.")],
    after: Annotated[Path, typer.Argument(help="Another plan for the same model.")],
) -> None:
    """Show which modules two plans treat differently, and the parameters of both."""
    from rankwise.plan import RankPlan

    stdout.print(RankPlan.load(before).diff(RankPlan.load(after)))


def _targets(text: str) -> str | list[str]:
    """Names, one or several, as a list; `all-linear` and regular expressions as they are."""
    from rankwise.targets import ALL_LINEAR

    if text == ALL_LINEAR or not re.fullmatch(r"[\w.]+(\s*,\s*[\w.]+)*", text):
        return text
    return [part.strip() for part in text.split(",")]
