"""The application that the commands register with, its two consoles, and words they share."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

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
stdout = Console(soft_wrap=True, highlight=False, markup=False)
stderr = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)

COLUMN_HELP = (
    "What the table shows: gid, stable, participation or energy (dimensions of the mean gradient), "
    "gard (needs gram), norm, sensitivity, fisher (needs fisher), rows or batches."
)

Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Settings of the file to replace, such as training.learning_rate=1e-3."),
]


def _show_version(wanted: bool) -> None:
    if wanted:
        from rankwise import __version__

        stdout.print(f"rankwise {__version__}")
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
