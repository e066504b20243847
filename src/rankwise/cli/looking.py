"""Commands that show what was saved: inspect, report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rankwise.cli.app import COLUMN_HELP, stdout


def inspect(
    path: Annotated[
        Path, typer.Argument(help="A plan, profile, run or adapter: a file or a folder.")
    ],
    column: Annotated[
        str | None, typer.Option(help=f"Of a profile. {COLUMN_HELP}", show_default=False)
    ] = None,
    compare: Annotated[
        Path | None, typer.Option(help="Of a profile: another one to hold it against.")
    ] = None,
) -> None:
    """Show what a saved plan, profile, run record or adapter contains."""
    from rankwise.inspection import describe, describe_profile

    if column is None and compare is None:
        stdout.print(describe(path))
    else:
        stdout.print(describe_profile(path, column or "gid", compare=compare))


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

    stdout.print(write_report(paths, out, card=card))
    stdout.print(f"report: {out}")
