"""Records that were made up, so that every number of a comparison is known."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rankwise.experiments.board import Board
from rankwise.experiments.cell_records import CellRecord, EvaluationRecord, SizeRecord
from rankwise.experiments.cells import Cell
from rankwise.experiments.config import make_experiment
from rankwise.experiments.results import Results

SEEDS = list(range(5))
NOISE = [0.3, -0.1, 0.2, -0.3, 0.1]
GAIN = [0.52, 0.48, 0.53, 0.47, 0.5]
"""How much better than LoRA the method called water-fill is, seed by seed."""

Value = Callable[[Cell], float | None]


def experiment_document(folder: Path, **changes: Any) -> dict[str, Any]:
    task = {"kind": "completion", "train": "a.jsonl", "test": "b.jsonl", "model": "m"}
    return {
        "output": str(folder),
        "tasks": [task | {"name": "one"}, task | {"name": "two", "max_length": 64}],
        "methods": ["lora", "water-fill", "ia3", "nola"],
        "budgets": [4, 8, 16],
        "seeds": SEEDS,
        "learning_rates": [1e-3, 1e-2, 1e-1],
    } | changes


def falling_loss(cell: Cell) -> float | None:
    """LoRA: 10, 8, 6 at its three budgets; everyone's best rate is 1e-2."""
    if cell.phase == "search":
        return {1e-3: 3.0, 1e-2: 2.0, 1e-1: None}[cell.learning_rate or 0]
    assert cell.rank is not None
    loss = {4: 10.0, 8: 8.0, 16: 6.0}[cell.rank] + NOISE[cell.seed]
    if cell.method.name == "water-fill":
        return loss - GAIN[cell.seed]
    return loss + 1 + 0.1 * cell.seed if cell.method.name == "ia3" else loss


def made_up_record(cell: Cell, value: float | None) -> CellRecord:
    task = cell.task.task
    final = cell.phase == "final"
    rank = cell.rank or 1
    off = 5 if cell.method.name == "ia3" else 1
    return CellRecord(
        name=cell.name,
        phase=cell.phase,
        task=cell.task.name,
        method=cell.method.name,
        label=cell.method.label,
        budget_rank=cell.rank,
        seed=cell.seed,
        learning_rate=cell.learning_rate,
        steps=cell.steps,
        config_hash=cell.config_hash,
        settings=cell.settings,
        metric=task.metric,
        lower_is_better=task.lower_is_better,
        size=SizeRecord(1000 * rank, 1000 * rank // off, off == 1, rank, rank),
        trainable_parameters=1000 * rank // off,
        head_parameters=0,
        ranks={"x": rank},
        validation=[] if value is None else [EvaluationRecord(cell.steps, {task.metric: value})],
        test={task.metric: value, "perplexity": math.exp(value)} if final and value else None,
        train_loss=[(cell.steps, 1.0)],
        diverged_at=3 if value is None else None,
        tokens=100,
        seconds={"load": 1.0, "profile": 2.0, "prepare": 3.0, "train": 4.0, "evaluate": 5.0},
        peak_memory_mib=100.0 + cell.seed,
        memory_before_mib=50.0,
        model="m",
        model_fingerprint="f" * 16,
        data_fingerprint=f"data of {cell.task.name}",
        rows={"train": 1, "validation": 1, "test": 1},
        notes=[],
        commit="abc",
        versions={},
        hardware={"processor": "a fast one"},
        finished="2026-01-01T00:00:00+00:00",
    )


def distance_to(best: float) -> Value:
    """A search scores its rate's distance to the best one; rates over 5 diverge."""

    def value(cell: Cell) -> float | None:
        assert cell.learning_rate is not None
        if cell.phase == "final":
            return 1.0
        return None if cell.learning_rate > 5 else abs(math.log(cell.learning_rate / best))

    return value


def made_up_board(folder: Path, value: Value = falling_loss, **changes: Any) -> Board:
    """A board whose records are written until no further cell comes up."""
    board = Board(make_experiment(experiment_document(folder, **changes)))
    board.folder.mkdir(parents=True)
    while missing := [cell for cell in board.cells() if not board.path(cell).is_file()]:
        for cell in missing:
            board.path(cell).write_text(json.dumps(asdict(made_up_record(cell, value(cell)))))
    return board


def row_of(results: Results, label: str, rank: int = 8, task: str = "one") -> Any:
    return next(r for r in results.rows if (r.task, r.label, r.rank) == (task, label, rank))
