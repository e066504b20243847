from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rankwise.errors import ConfigError, FileError
from rankwise.experiments import check as check_module
from rankwise.experiments.bench import Bench
from rankwise.experiments.board import Board
from rankwise.experiments.cell_records import CellRecord
from rankwise.experiments.cells import Cell
from rankwise.experiments.check import (
    Check,
    against_table,
    check_cell,
    compare_records,
    have_same_outcome,
    prediction_interval,
)
from rankwise.experiments.compare import run_experiment
from rankwise.experiments.config import make_experiment
from tiny_experiment import write_experiment


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Board]:
    document = write_experiment(tmp_path_factory.mktemp("check"))
    return document, run_experiment(make_experiment(document))


def test_a_cell_reproduces_exactly(finished: tuple[dict[str, Any], Board]) -> None:
    board = finished[1]
    found = check_cell(board, "lines--ralora--r2--lr0.01--seed1")
    assert found.exact and found.reproduced
    assert "reproduced exactly" in str(found)
    with pytest.raises(ConfigError, match="did you mean 'lines--ralora--r2--lr0"):
        check_cell(board, "lines--ralora--r2--lr0.01--seed11")


def test_a_changed_record_does_not_reproduce(
    finished: tuple[dict[str, Any], Board], tmp_path: Path
) -> None:
    document = finished[0] | {"output": str(tmp_path)}
    board = Board(make_experiment(document))
    board.folder.mkdir()
    for cell in board.cells():
        text = finished[1].path(cell).read_text()
        board.path(cell).write_text(text)
    cell = next(iter(board.cells()))
    changed = json.loads(board.path(cell).read_text())
    changed["test"]["loss"] += 1e-4
    board.path(cell).write_text(json.dumps(changed))
    found = check_cell(board, cell.file_name)
    assert not found.exact
    assert found.recorded is not None and found.found is not None
    assert found.recorded - found.found == pytest.approx(1e-4)
    values = [r.value for r in board.records() if r.label == cell.method.label]
    assert found.interval == prediction_interval([v for v in values if v is not None])


def test_metrics_that_one_version_did_not_measure_are_left_out(
    finished: tuple[dict[str, Any], Board],
) -> None:
    record = next(r for r in finished[1].records() if r.phase == "final")
    assert record.test is not None
    older = replace(
        record,
        test={"loss": record.test["loss"]},
        validation=[
            replace(e, metrics={"loss": e.metrics["loss"], "gone": 1.0}) for e in record.validation
        ],
    )
    assert have_same_outcome(record, older) and have_same_outcome(older, record)
    assert not have_same_outcome(record, replace(older, test={"loss": record.test["loss"] + 1e-9}))
    assert not have_same_outcome(record, replace(record, test=None))
    assert not have_same_outcome(record, replace(record, validation=record.validation[1:]))
    last = record.validation[-1]
    moved = replace(last, metrics=last.metrics | {"loss": last.metrics["loss"] + 1e-9})
    assert not have_same_outcome(
        record, replace(record, validation=[*record.validation[:-1], moved])
    )


def test_verdicts() -> None:
    within = Check("x", "loss", 1.0, 1.1, False, (0.9, 1.2))
    assert within.reproduced and "reproduced within the interval" in str(within)
    outside = Check("x", "loss", 1.0, 1.3, False, (0.9, 1.2))
    assert not outside.reproduced and "NOT reproduced" in str(outside)
    assert not Check("x", "loss", 1.0, 1.1, False, None).reproduced
    assert not Check("x", "loss", 1.0, None, False, (0.9, 1.2)).reproduced


def test_a_prediction_interval_holds_the_next_value_in_95_of_100_cases() -> None:
    generator = np.random.default_rng(0)
    held = 0
    for _ in range(2000):
        *sample, following = generator.normal(size=6).tolist()
        interval = prediction_interval(sample)
        assert interval is not None
        held += interval[0] <= following <= interval[1]
    assert 0.935 < held / 2000 < 0.965
    assert prediction_interval([1.0]) is None


def test_records_against_those_of_another_folder(
    finished: tuple[dict[str, Any], Board], tmp_path: Path
) -> None:
    document, board = finished
    assert isinstance(document["training"], dict)
    changed = document | {
        "output": str(tmp_path / "other"),
        "seeds": [0, 2],
        "methods": ["lora", {"name": "ralora", "n_max": 2, "label": "ralora"}],
    }
    other = run_experiment(make_experiment(changed))
    pairs, others = compare_records(board, Path(other.config.output))
    assert [(pair.label, pair.pairs, pair.exact) for pair in pairs] == [("lora", 1, 1)]
    assert pairs[0].difference is not None and pairs[0].difference.mean == 0
    assert others == ["lines--ralora--r2--lr0.01--seed0"]
    text = against_table(pairs, others)
    assert "+0.000000" in text and "other settings there: lines--ralora" in text
    with pytest.raises(FileError, match="holds no records"):
        compare_records(board, tmp_path)


def test_differences_are_here_less_there(
    finished: tuple[dict[str, Any], Board], tmp_path: Path
) -> None:
    board = finished[1]
    for record in board.records():
        assert record.test is not None
        worse = record.test | {"loss": record.test["loss"] + 0.5}
        seconds = record.seconds | {"train": 2 * record.seconds["train"]}
        replace(record, test=worse, seconds=seconds).save(tmp_path / f"{record.name}.json")
    pairs, others = compare_records(board, tmp_path)
    assert [(pair.label, pair.pairs, pair.exact) for pair in pairs] == [
        ("lora", 2, 0),
        ("ralora", 2, 0),
    ]
    assert others == []
    for pair in pairs:
        assert pair.difference is not None and pair.difference.mean == pytest.approx(-0.5)
        assert pair.time == pytest.approx(0.5)


def test_a_cell_is_checked_with_the_threads_of_its_record(
    finished: tuple[dict[str, Any], Board], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "lines--lora--r2--lr0.01--seed0"
    now = torch.get_num_threads()
    seen = []
    real = check_module.run_cell

    def run(cell: Cell, bench: Bench) -> CellRecord:
        seen.append(torch.get_num_threads())
        return real(cell, bench)

    board = finished[1]
    cell = board.find(name)
    assert cell is not None
    record = board.record(cell)
    assert record is not None
    monkeypatch.setattr(check_module, "run_cell", run)
    recorded = replace(record, hardware=record.hardware | {"torch_threads": now + 1})
    monkeypatch.setattr(board, "record", lambda _: recorded)
    check_cell(board, name)
    assert seen == [now + 1] and torch.get_num_threads() == now


def test_a_record_of_other_data_is_not_checked(
    finished: tuple[dict[str, Any], Board], monkeypatch: pytest.MonkeyPatch
) -> None:
    board, name = finished[1], "lines--lora--r2--lr0.01--seed0"
    cell = board.find(name)
    assert cell is not None
    record = board.record(cell)
    assert record is not None
    monkeypatch.setattr(board, "record", lambda _: replace(record, data_fingerprint="other"))
    with pytest.raises(ConfigError, match="the task's data changed since its record"):
        check_cell(board, name)
    monkeypatch.setattr(board, "record", lambda _: replace(record, model_fingerprint="other"))
    with pytest.raises(ConfigError, match="the task's base model changed since its record"):
        check_cell(board, name)


def test_one_that_diverged_does_not_reproduce_one_that_did_not() -> None:
    interval = (0.9, 1.1)
    assert Check("a", "loss", 1.0, 1.05, exact=False, interval=interval).reproduced
    assert not Check("a", "loss", None, 1.0, exact=False, interval=interval).reproduced
    assert not Check("a", "loss", 1.0, None, exact=False, interval=interval).reproduced
    assert Check("a", "loss", None, None, exact=True, interval=interval).reproduced
