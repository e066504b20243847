"""Several processes on one comparison: who runs which cell."""

from __future__ import annotations

from pathlib import Path

from filelock import FileLock

from rankwise.experiments import compare as compare_module
from rankwise.experiments.board import Board
from rankwise.experiments.config import make_experiment
from tiny_experiment import write_experiment


def test_a_locked_cell_is_left_to_its_owner(tmp_path: Path) -> None:
    board = Board(make_experiment(write_experiment(tmp_path)))
    folder = board.config.runs_folder / compare_module.LOCKS
    folder.mkdir(parents=True)
    cells = list(board.cells())
    locks = [FileLock(folder / f"{cell.file_name}.lock") for cell in cells]
    locks[0].acquire()
    claimed, busy = compare_module._claim(board)
    assert claimed is not None
    assert claimed[0].file_name == cells[1].file_name
    assert busy
    claimed[1].release()
    for lock in locks[1:]:
        lock.acquire()
    assert compare_module._claim(board) == (None, True)
    for lock in locks:
        lock.release()
