"""Results of a metric of which more is better: every choice turns round."""

from __future__ import annotations

from pathlib import Path

from made_up_records import GAIN, NOISE, made_up_board, row_of
from rankwise.experiments.cells import Cell
from rankwise.experiments.result_tables import markdown
from rankwise.experiments.results import make_results


def _accuracy(cell: Cell) -> float:
    """More with every rank; the best rate is 1e-2; water-fill is ahead at every seed."""
    if cell.phase == "search":
        return {1e-3: 0.6, 1e-2: 0.8, 1e-1: 0.7}[cell.learning_rate or 0]
    gain = GAIN[cell.seed] / 10 if cell.method.name == "water-fill" else 0.0
    return 0.5 + (cell.rank or 0) / 100 + NOISE[cell.seed] / 100 + gain


def test_where_more_is_better_the_largest_is_best(tmp_path: Path) -> None:
    task = {"kind": "classification", "name": "one", "train": "a", "test": "b", "model": "m"}
    board = made_up_board(tmp_path, _accuracy, tasks=[task], methods=["lora", "water-fill"])
    results = make_results(board)
    row, lora = row_of(results, "water-fill"), row_of(results, "lora")
    assert (row.metric, row.learning_rate, row.at_edge) == ("accuracy", 1e-2, False)
    assert row.against is not None and row.against.wins == 5
    assert results.mean_ranks["8"] == {"water-fill": 1.0, "lora": 2.0}
    # as good as LoRA r = 8 at the smallest size already
    assert results.trades[0].needed == 4000
    section = markdown(results).split("## Seed by seed: one, r = 8\n")[1]
    cells = next(line for line in section.splitlines() if line.startswith("| lora |")).split(" | ")
    assert cells[2] == f"{min(lora.values.values()):.4f}"
