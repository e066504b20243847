"""Commands that look at what was saved: inspect, report, landscape."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rankwise.cli.app import COLUMN_HELP, stderr, stdout


def inspect(
    path: Annotated[
        Path,
        typer.Argument(help="A plan, profile, run, adapter or comparison: a file or a folder."),
    ],
    column: Annotated[
        str | None, typer.Option(help=f"Of a profile. {COLUMN_HELP}", show_default=False)
    ] = None,
    compare: Annotated[
        Path | None, typer.Option(help="Of a profile: another one to hold it against.")
    ] = None,
) -> None:
    """Show what a saved plan, profile, run record, adapter or comparison contains."""
    from rankwise.inspection import describe, describe_profile

    if column is None and compare is None:
        stdout.print(describe(path))
    else:
        stdout.print(describe_profile(path, column or "gid", compare=compare))


def report(
    paths: Annotated[
        list[Path],
        typer.Argument(help="Profiles, plans, runs, adapters and comparisons to show."),
    ],
    out: Annotated[Path, typer.Option(help="The HTML page.")] = Path("report.html"),
    card: Annotated[
        Path | None,
        typer.Option(help="Also a Markdown block for a model card here, with SVGs beside it."),
    ] = None,
) -> None:
    """Make one self-contained HTML page of saved profiles, plans, runs, adapters, comparisons.

    Beside report.html, report.json holds every number that the page shows.
    """
    from rankwise.report import write_report

    stdout.print(write_report(paths, out, card=card))
    stdout.print(f"report: {out}")


def landscape(
    run: Annotated[Path, typer.Argument(help="A folder that `rankwise train` wrote.")],
    out: Annotated[
        Path | None, typer.Option(help="Another file than landscape.json in that folder.")
    ] = None,
    points: Annotated[
        int, typer.Option(help="Points along each direction; odd. The cost is its square.")
    ] = 11,
    span: Annotated[
        float, typer.Option(help="How far to go, in lengths of the trained parameters.")
    ] = 1.0,
    normalise: Annotated[
        str,
        typer.Option(
            help="norm: a direction is as long as all trained parameters; filter: each of its rows "
            "is as long as theirs."
        ),
    ] = "norm",
    batches: Annotated[int, typer.Option(help="Held-out batches behind every point.")] = 1,
    batch_size: Annotated[int, typer.Option(help="Sequences in a batch.")] = 8,
    seed: Annotated[int, typer.Option(help="Seed of the two directions.")] = 0,
) -> None:
    """Measure the held-out loss on a plane of two random directions through a run's solution.

    Says first how many forward passes that takes. `rankwise report RUN` draws the result.
    """
    from rankwise.training.landscape import LandscapeSettings, run_landscape

    settings = LandscapeSettings(
        points=points,
        span=span,
        normalisation=normalise,  # type: ignore[arg-type]
        batches=batches,
        batch_size=batch_size,
        seed=seed,
    )
    found = run_landscape(run, settings, out=out, notify=stderr.print)
    middle = found.loss[points // 2][points // 2]
    known = [loss for row in found.loss for loss in row if loss is not None]
    stdout.print(
        f"loss {middle:.4f} at the solution, {min(known):.4f} to {max(known):.4f} on the plane "
        f"({found.tokens:,} tokens, {found.seconds:.0f} s)"
    )
