from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, BertForMaskedLM

from rankwise.errors import ConfigError, FileError
from rankwise.experiments import compare as compare_module
from rankwise.experiments.board import Board
from rankwise.experiments.cell_records import CellRecord
from rankwise.experiments.compare import Progress, duration, run_experiment
from rankwise.experiments.config import make_experiment
from rankwise.experiments.dry_run import dry_run
from rankwise.experiments.result_tables import markdown, save_results, terminal_table
from rankwise.experiments.results import make_results
from tiny_experiment import write_experiment
from tiny_folder import save_tiny_llama, write_rows
from tiny_models import bert_config


def _run(document: dict[str, Any]) -> Board:
    return run_experiment(make_experiment(document))


def _never(*_: Any) -> CellRecord:
    """In place of `run_cell`; a failure of pytest's is none that a cell may have."""
    pytest.fail("a cell was run")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Board, Path]:
    folder = tmp_path_factory.mktemp("compare")
    methods = ["lora", "ralora", "zero-shot", "mora"]
    document = write_experiment(folder, methods=methods, learning_rates=[1e-3, 1e-2])
    return _run(document), folder


def test_an_experiment_leaves_a_record_for_every_cell(finished: tuple[Board, Path]) -> None:
    board, _ = finished
    records = {record.name: record for record in board.records()}
    # two methods with a search of two rates on one seed and two seeds each, zero-shot with two
    assert len(records) == 2 * (2 + 2) + 2 == board.total()
    lora = next(r for r in records.values() if r.label == "lora" and r.phase == "final")
    assert lora.size is not None and lora.size.matched
    assert lora.trainable_parameters == lora.size.parameters == lora.size.budget
    assert [e.step for e in lora.validation] == [2, 4]
    assert lora.test is not None and lora.test["loss"] > 0
    assert lora.tokens > 0 and lora.seconds["profile"] == 0
    assert next(r for r in records.values() if r.label == "ralora").seconds["profile"] > 0
    search = next(r for r in records.values() if r.phase == "search")
    assert search.test is None
    assert search.seed == 1000


def test_learning_rates_are_chosen_on_the_validation_part(finished: tuple[Board, Path]) -> None:
    board, _ = finished
    for group in board.groups:
        if not group.grid:
            continue
        losses = {
            cell.learning_rate: record.validation[-1].metrics["loss"]
            for cell in group.search
            if (record := board.record(cell))
        }
        assert board.choice(group).rate == min(losses, key=lambda rate: losses[rate])
        assert board.choice(group).at_edge


def test_a_shared_search_is_run_once_and_chooses_for_all(tmp_path: Path) -> None:
    document = write_experiment(tmp_path, methods=["lora"], learning_rates=[1e-3, 1e-2])
    longer = document["tasks"][0] | {"name": "longer", "training": {"steps": 6}}
    document |= {
        "tasks": [*document["tasks"], longer | {"rates_from": "lines"}],
        "budgets": [1, 2],
        "selection": {"budget": 2},
    }
    board = _run(document)
    names = [cell.name for cell in board.cells()]
    assert len(names) == len(set(names)) == board.total() == 2 + 2 * 2 * 2
    assert len(board.records()) == board.total()
    searched = [name for name in names if name.endswith("--search")]
    assert all(name.startswith("lines--lora--r2--") for name in searched)
    assert len({board.choice(group).rate for group in board.groups}) == 1
    page = markdown(make_results(board))
    assert page.count("## Learning rates") == 1
    served = page.partition("## Learning rates on the validation part: lines, r = 2\n")[2]
    assert "The same rates serve lines, r = 1; longer, r = 1; longer, r = 2." in served


def test_a_task_compares_the_methods_that_it_names(tmp_path: Path) -> None:
    document = write_experiment(tmp_path, methods=["lora", "rslora", "dora"], learning_rates=[1e-3])
    named = document["tasks"][0] | {"name": "named", "methods": ["rslora", "lora"]}
    document |= {"tasks": [*document["tasks"], named]}
    board = Board(make_experiment(document))
    compared = [(group.task.name, group.method.label) for group in board.groups]
    assert compared == [
        *(("lines", label) for label in ("lora", "rslora", "dora")),
        *(("named", label) for label in ("lora", "rslora")),
    ]
    results = make_results(board)
    assert [(row.task, row.label) for row in results.rows] == compared
    assert dry_run(make_experiment(document)).cells == board.total() == 5 * 2


def test_results_are_those_of_the_records(finished: tuple[Board, Path]) -> None:
    board, _ = finished
    results = make_results(board)
    rows = {row.label: row for row in results.rows}
    by_seed = {r.seed: r.value for r in board.records() if r.label == "ralora" and r.test}
    against = {r.seed: r.value for r in board.records() if r.label == "lora" and r.test}
    assert rows["ralora"].values == {str(seed): value for seed, value in by_seed.items()}
    assert rows["ralora"].summary is not None
    assert rows["ralora"].summary.mean == pytest.approx(sum(by_seed.values()) / 2)
    comparison = rows["ralora"].against
    assert comparison is not None
    expected = sum(by_seed[s] - against[s] for s in by_seed) / 2
    assert comparison.difference.mean == pytest.approx(expected)
    assert rows["mora"].status.startswith("not available: no kept library")
    # without training nothing depends on the seed
    assert rows["zero-shot"].summary is not None
    assert rows["zero-shot"].summary.deviation == 0
    assert set(results.mean_ranks["2"]) == {"lora", "ralora", "zero-shot"}


def test_tables_name_every_method(finished: tuple[Board, Path], tmp_path: Path) -> None:
    results = make_results(finished[0])
    for text in (terminal_table(results), markdown(results)):
        for label in ("lora", "ralora", "zero-shot", "mora: not available"):
            assert label in text
        assert "10 of 10 cells finished" in text
    assert "## Learning rates on the validation part: lines, r = 2" in markdown(results)
    results.save(tmp_path)
    document = json.loads((tmp_path / "results.json").read_text())
    assert len(document["rows"]) == 4
    assert document["rows"][0]["against"] is None


def test_a_finished_record_is_never_run_twice(
    finished: tuple[Board, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    board, _ = finished
    monkeypatch.setattr(compare_module, "run_cell", _never)
    again = run_experiment(board.config)
    assert [r.name for r in again.records()] == [r.name for r in board.records()]


def test_experiments_of_one_workspace_share_their_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = write_experiment(tmp_path, methods=["lora", "rslora"], learning_rates=[1e-3])
    document["workspace"] = str(tmp_path / "runs")
    first = _run(document)
    assert len(first.records()) == first.total()
    monkeypatch.setattr(compare_module, "run_cell", _never)
    second = _run(document | {"output": str(tmp_path / "view"), "methods": ["rslora"]})
    assert [r.name for r in second.records()] == [
        r.name for r in first.records() if r.label == "rslora"
    ]
    save_results(make_results(second), tmp_path / "view")
    here = {path.name for path in (tmp_path / "view").iterdir()}
    assert here == {"experiment.json", "results.json", "results.md"}


def test_changed_settings_are_run_anew_and_never_mixed(tmp_path: Path) -> None:
    document = write_experiment(tmp_path, methods=["lora"], seeds=[0])
    before = _run(document).records()
    changed = document | {"training": document["training"] | {"steps": 3}}
    board = Board(make_experiment(changed))
    assert board.records() == []
    after = run_experiment(board.config).records()
    assert [r.config_hash for r in after] != [r.config_hash for r in before]
    assert Board(make_experiment(document)).records() == before
    assert len(list(board.folder.glob("*.json"))) == 2


def test_a_killed_cell_starts_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    document = write_experiment(tmp_path, methods=["lora"])
    real = compare_module.run_cell
    calls = []

    def killed_at_the_second(*arguments: Any) -> CellRecord:
        calls.append(arguments[0].name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(compare_module, "run_cell", killed_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        _run(document)
    board = _run(document)
    assert len(board.records()) == 2
    assert calls == [calls[0], calls[1], calls[1]]


def test_a_failure_is_recorded_and_retried_and_does_not_stop_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = write_experiment(tmp_path)
    real = compare_module.run_cell

    def broken(cell: Any, bench: Any, written: tuple[Path, ...]) -> CellRecord:
        assert set(written) == {Path(document["output"])}
        if cell.method.name == "lora" and cell.seed == 0:
            raise RuntimeError("out of luck")
        return real(cell, bench, written)

    monkeypatch.setattr(compare_module, "run_cell", broken)
    said: list[str] = []
    board = run_experiment(make_experiment(document), notify=said.append)
    assert len(board.records()) == 3
    assert any("failed: RuntimeError: out of luck" in line for line in said)
    row = make_results(board).rows[0]
    assert row.failed == {"seed 0": "RuntimeError: out of luck"}
    assert row.status == "failed"
    assert "seed 0 failed" in terminal_table(make_results(board))
    monkeypatch.setattr(compare_module, "run_cell", real)
    board = _run(document)
    assert len(board.records()) == 4
    assert not make_results(board).rows[0].failed


def test_a_rate_at_which_training_diverges_is_not_chosen(tmp_path: Path) -> None:
    document = write_experiment(tmp_path, methods=["lora"], learning_rates=[1e-2, 1e25])
    board = _run(document)
    choice = board.choice(board.groups[0])
    assert choice.rate == 1e-2
    assert math.isnan(choice.scores[1e25])
    diverged = [r for r in board.records() if r.diverged_at is not None]
    assert [r.learning_rate for r in diverged] == [1e25]


def test_bf16_trains_and_evaluates_every_kind_of_adapter_near_fp32(tmp_path: Path) -> None:
    free = {"name": "lr-lora", "constant": False, "amplitude_ratio": 1.0}
    methods = ["lora", "ralora", "gard-dynamic", free, "adalora", "dora", "zero-shot"]
    tested, first = {}, {}
    for precision in ("fp32", "bf16"):
        document = write_experiment(tmp_path, methods=methods, seeds=[0])
        document["training"]["precision"] = precision
        board = _run(document | {"output": str(tmp_path / precision)})
        finals = [r for r in board.records() if r.phase == "final"]
        tested[precision] = {r.label: r.test["loss"] for r in finals if r.test is not None}
        first[precision] = {r.label: r.train_loss[0][1] for r in finals if r.train_loss}
    # zero-shot only evaluates, and before the first step all weights are those of fp32
    for losses, count in ((tested, len(methods)), (first, len(methods) - 1)):
        assert losses["fp32"].keys() == losses["bf16"].keys()
        assert len(losses["bf16"]) == count
        for label, loss in losses["fp32"].items():
            assert losses["bf16"][label] != loss
            assert losses["bf16"][label] == pytest.approx(loss, rel=0.01)


def test_workers_share_the_cells_and_give_the_same_records(
    finished: tuple[Board, Path],
) -> None:
    board, folder = finished
    config = make_experiment(
        board.config.model_dump(mode="json") | {"output": str(folder / "two"), "workers": 2}
    )
    twice = run_experiment(config)
    metrics = {r.name: (r.validation, r.test) for r in board.records()}
    assert {r.name: (r.validation, r.test) for r in twice.records()} == metrics


def test_looking_walks_the_cells_only_where_files_came_or_went(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = write_experiment(tmp_path, methods=["lora"], learning_rates=[1e-3])
    record, *_ = _run(document).folder.glob("*seed0*.json")
    content = record.read_text()
    record.unlink()
    said: list[str] = []
    shown: list[Progress] = []
    board = Board(make_experiment(document))
    watch = compare_module._Watch(board, said.append, shown.append)
    assert said == ["1 of 2 cells are finished already"]
    walks, cells = [], board.cells
    monkeypatch.setattr(board, "cells", lambda: walks.append(1) or cells())
    watch.look()
    watch.look()
    assert not walks
    record.write_text(content)
    watch.look()
    watch.look()
    assert len(walks) == 1
    assert [progress.done for progress in shown] == [1, 1, 2, 2]
    assert len(said) == 2 and "lines--lora--r2--lr0.001--seed0: " in said[1]


def test_durations() -> None:
    assert duration(12.4) == "12 s"
    assert duration(600) == "10 min"
    assert duration(7270) == "2 h 1 min"


def test_a_failure_is_that_of_its_settings_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = [1e-3, 1e-2]
    document = write_experiment(tmp_path, methods=["lora"], seeds=[0], learning_rates=rates)
    document["workspace"] = str(tmp_path / "runs")
    real = compare_module.run_cell

    def broken(cell: Any, *arguments: Any) -> CellRecord:
        if cell.learning_rate == 1e-2:
            raise RuntimeError("out of luck")
        return real(cell, *arguments)

    monkeypatch.setattr(compare_module, "run_cell", broken)
    first = _run(document)
    monkeypatch.setattr(compare_module, "run_cell", real)
    failed = list(first.folder.glob("*.failed.json"))
    assert [p.name for p in failed] == [
        cell.file_name.replace(".json", ".failed.json")
        for cell in first.cells()
        if cell.learning_rate == 1e-2
    ]
    longer = document | {"training": document["training"] | {"steps": 5}}
    other = _run(longer | {"output": str(tmp_path / "longer")})
    assert len(other.records()) == other.total() == 3
    assert set(other.choice(other.groups[0]).scores) == set(rates)
    assert list(first.folder.glob("*.failed.json")) == failed


def test_changed_data_stop_the_command_before_the_first_cell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = write_experiment(tmp_path, methods=["lora"], seeds=[0])
    _run(document)
    rows = [{"question": f"another {i}", "answer": f"text {i}"} for i in range(30)]
    write_rows(tmp_path / "train.jsonl", rows)
    monkeypatch.setattr(compare_module, "run_cell", _never)
    with pytest.raises(ConfigError, match="task lines: its data changed since its finished"):
        _run(document | {"seeds": [0, 1]})


def test_a_changed_base_stops_the_command_before_the_next_cell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = write_experiment(tmp_path, methods=["lora"], seeds=[0])
    _run(document)
    save_tiny_llama(Path(document["model"]), seed=7)
    monkeypatch.setattr(compare_module, "run_cell", _never)
    with pytest.raises(ConfigError, match="task lines: its base model changed since its finished"):
        _run(document | {"seeds": [0, 1]})


def test_a_failure_of_an_earlier_call_is_tried_again_once_its_search_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the search is over, the call does not know the cell that failed."""
    document = write_experiment(tmp_path, methods=["lora"], seeds=[0], learning_rates=[1e-3, 1e-2])
    real = compare_module.run_cell

    def broken(cell: Any, *arguments: Any) -> CellRecord:
        if cell.phase == "final":
            raise RuntimeError("out of luck")
        return real(cell, *arguments)

    monkeypatch.setattr(compare_module, "run_cell", broken)
    first = _run(document)
    monkeypatch.setattr(compare_module, "run_cell", real)
    assert len(list(first.folder.glob("*.failed.json"))) == 1
    search = first.search(first.groups[0])[0]
    first.path(search).unlink()
    board = _run(document)
    assert len(board.records()) == board.total() == 3
    assert not list(first.folder.glob("*.failed.json"))


def test_a_place_that_cannot_be_written_is_an_error_of_ours(tmp_path: Path) -> None:
    document = write_experiment(tmp_path, methods=["lora"], seeds=[0])
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="cannot be written"):
        _run(document | {"output": str(tmp_path / "file" / "out")})


def test_a_base_with_weights_that_the_seed_draws_is_not_a_changed_one(tmp_path: Path) -> None:
    """A masked language model has no pooler; a classifier's is drawn, inside the encoder."""
    document = write_experiment(tmp_path, methods=["head-only"], seeds=[0, 1])
    tokenizer = AutoTokenizer.from_pretrained(document["model"])
    tokenizer.save_pretrained(tmp_path / "bert")
    config = bert_config(vocab_size=len(tokenizer))
    BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    rows = [{"sentence": f"it is {i}", "label": i % 2} for i in range(24)]
    path = str(write_rows(tmp_path / "rows.jsonl", rows))
    task = {"name": "two", "kind": "classification", "train": path, "test": path}
    document |= {"model": str(tmp_path / "bert"), "tasks": [task | {"validation_rows": 6}]}
    first = _run(document)
    assert len({r.model_fingerprint for r in first.records()}) == 2
    assert make_results(first).rows[0].status == "finished"
    first.path(first.finals(first.groups[0])[1]).unlink()
    assert len(_run(document).records()) == 2
