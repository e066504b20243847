"""The command that compares methods: compare."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar

from rankwise.cli.app import Overrides, stderr, stdout

if TYPE_CHECKING:
    from rankwise.experiments.compare import Progress


def compare(
    experiment: Annotated[
        Path, typer.Argument(help="A YAML file; docs/compare.md lists its keys.")
    ],
    overrides: Overrides = None,
    scale: Annotated[
        str, typer.Option(help="'small' for the values of the file's section 'small'.")
    ] = "full",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Run nothing; show what each method would cost.")
    ] = False,
    table: Annotated[
        bool, typer.Option("--table", help="Run nothing; show what is finished.")
    ] = False,
    check: Annotated[
        str | None, typer.Option(help="Run this finished cell again: does it reproduce?")
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(help="Run nothing; hold the records against those of another output folder."),
    ] = None,
) -> None:
    """Compare methods at equal trainable parameters over seeds and tasks, with statistics.

    Every run leaves a record; a finished one is never run twice, so the command may be stopped and
    called again. Typical use: see what it costs, run it, look in between:

        rankwise compare experiment.yaml --dry-run

        rankwise compare experiment.yaml workers=2

        rankwise compare experiment.yaml --table
    """
    from rankwise.experiments.board import Board
    from rankwise.experiments.check import against_table, check_cell, compare_records
    from rankwise.experiments.compare import run_experiment
    from rankwise.experiments.config import load_experiment
    from rankwise.experiments.dry_run import dry_run as run_dry
    from rankwise.experiments.result_tables import save_results, terminal_table
    from rankwise.experiments.results import make_results

    config = load_experiment(experiment, overrides or (), scale=scale)
    if dry_run:
        stdout.print(str(run_dry(config)))
        return
    if check is not None:
        found = check_cell(Board(config), check)
        stdout.print(str(found))
        raise typer.Exit(0 if found.reproduced else 1)
    if against is not None:
        stdout.print(against_table(*compare_records(Board(config), against)))
        return
    if table:
        board = Board(config)
    else:
        with _progress() as (notify, show):
            board = run_experiment(config, notify=notify, show=show)
    results = make_results(board)
    stdout.print(terminal_table(results))
    stderr.print(f"results: {', '.join(map(str, save_results(results, Path(config.output))))}")
    if not table and results.finished < results.cells:
        raise typer.Exit(1)


@contextmanager
def _progress() -> Iterator[tuple[Callable[[str], None], Callable[[Progress], None] | None]]:
    """A bar below the lines on a terminal; in a log file the lines alone, which say the same."""
    if not stderr.is_terminal:
        yield stderr.print, None
        return
    with Bar(BarColumn(), TextColumn("{task.description}", markup=False), console=stderr) as bar:
        shown = bar.add_task("starting")

        def show(progress: Progress) -> None:
            bar.update(
                shown,
                total=progress.cells,
                completed=progress.done + progress.failed,
                description=str(progress),
            )

        yield bar.console.print, show
