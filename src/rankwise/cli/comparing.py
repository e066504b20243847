"""The command that compares methods: compare."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rankwise.cli.app import Overrides, stderr, stdout


def compare(
    experiment: Annotated[
        Path, typer.Argument(help="A YAML file; docs/compare.md lists its keys.")
    ],
    overrides: Overrides = None,
    scale: Annotated[
        str, typer.Option(help="'small' for the values of the file's section 'small'.")
    ] = "full",
    table: Annotated[
        bool, typer.Option("--table", help="Run nothing; show what is finished.")
    ] = False,
) -> None:
    """Compare methods at equal trainable parameters over seeds and tasks, with statistics.

    Every run leaves a record; a finished one is never run twice, so the command may be stopped and
    called again:

        rankwise compare experiment.yaml workers=2
    """
    from rankwise.experiments.board import Board
    from rankwise.experiments.compare import run_experiment
    from rankwise.experiments.config import load_experiment
    from rankwise.experiments.result_tables import markdown, terminal_table
    from rankwise.experiments.results import TABLE_FILE, make_results
    from rankwise.files import write_text

    config = load_experiment(experiment, overrides or (), scale=scale)
    board = Board(config) if table else run_experiment(config, notify=stderr.print)
    results = make_results(board)
    folder = Path(config.output)
    results.save(folder)
    write_text(folder / TABLE_FILE, markdown(results))
    stdout.print(terminal_table(results))
    stderr.print(f"results: {folder / TABLE_FILE}, {folder / 'results.json'}")
    if not table and any(row.failed for row in results.rows):
        raise typer.Exit(1)
