"""The `rankwise` command. Every command reads and writes files; the work is done elsewhere."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence

from rankwise.cli.app import app, stderr
from rankwise.cli.comparing import compare
from rankwise.cli.looking import inspect, landscape, report
from rankwise.cli.measuring import diff, plan, profile
from rankwise.cli.running import demo, export, train
from rankwise.errors import RankwiseError

__all__ = ["main"]

_EXTRAS = {
    **dict.fromkeys(("datasets", "trl", "accelerate"), "train"),
    **dict.fromkeys(("scipy", "filelock", "PIL"), "compare"),
}
"""Packages that commands import, and the extra that brings them."""

# in the order in which the help lists them
for _command in (profile, plan, diff, train, compare, export, inspect, landscape, report, demo):
    app.command()(_command)


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
        stderr.print(f"error: {' '.join(str(error).split())}")
        raise SystemExit(1) from None
    except ModuleNotFoundError as error:
        extra = _EXTRAS.get((error.name or "").partition(".")[0])
        if debug or extra is None:
            raise
        stderr.print(
            f"error: this command needs {error.name}, which is not installed; run pip install "
            f"'rankwise[{extra}]'."
        )
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        stderr.print("interrupted")
        raise SystemExit(130) from None
