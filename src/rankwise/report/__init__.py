"""One self-contained page that shows profiles, plans, runs and adapters, and shorter forms."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rankwise.errors import RankwiseError

__all__ = ["write_report"]


def write_report(paths: Sequence[Path], out: Path, *, card: Path | None = None) -> str:
    """Write one HTML page, and beside it a JSON file with every number the page shows.

    The page holds everything it needs, plotly.js included (about 5 MB), and asks the network for
    nothing. The JSON file has the page's name with the ending `.json`.

    Args:
        paths: Saved profiles (folders), plans (JSON), run folders or run records, and adapters
            (folders), in the order in which they are to appear.
        out: The page, `*.html`; replaced if it exists.
        card: Also write a Markdown block for a model card here, `*.md`, with SVGs beside it.

    Returns:
        A summary for the terminal.

    Raises:
        FileError: A path is missing, malformed or of no known kind, or the page cannot be written.
        RankwiseError: Plotly is not installed.
    """
    try:
        from rankwise.report.page import write_page
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("plotly"):
            raise
        raise RankwiseError(
            "a report needs plotly, which is not installed; run pip install 'rankwise[report]'."
        ) from error
    return write_page([Path(path) for path in paths], Path(out), card=card)
