from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, BertForSequenceClassification

from rankwise.errors import ConfigError
from rankwise.experiments import bench as bench_module
from rankwise.experiments.bench import PROFILES, Bench, training_batches
from rankwise.experiments.cells import Cell, make_groups
from rankwise.experiments.config import make_experiment
from rankwise.experiments.peak import PeakMemory
from rankwise.experiments.running import run_cell, train_cell
from rankwise.experiments.tasks import TaskData
from tiny_experiment import write_experiment
from tiny_folder import SENTENCES, save_tiny_llama, write_rows
from tiny_models import bert_config

CPU = torch.device("cpu")


def _cells(document: dict[str, Any]) -> list[Cell]:
    return [cell for group in make_groups(make_experiment(document)) for cell in group.final(1e-2)]


def _classification(folder: Path) -> dict[str, Any]:
    """A tiny encoder without a head, and sentences whose label is which of four they are."""
    save_tiny_llama(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    torch.manual_seed(0)
    BertForSequenceClassification(bert_config(vocab_size=len(tokenizer))).bert.save_pretrained(
        folder / "model"
    )
    rows = [{"sentence": f"{SENTENCES[i % 4]} {i}", "label": i % 4 // 2} for i in range(40)]
    task = {
        "name": "which",
        "kind": "classification",
        "train": str(write_rows(folder / "a.jsonl", rows[:32])),
        "test": str(write_rows(folder / "b.jsonl", rows[32:])),
        "validation_rows": 8,
    }
    changes: dict[str, Any] = {"tasks": [task], "targets": "all-linear"}
    return write_experiment(folder, **changes)


def test_every_pass_holds_every_row_in_an_order_of_the_seed() -> None:
    data = TaskData([{"i": i} for i in range(10)], [], [], lambda rows: rows)  # type: ignore[arg-type,return-value]

    def order(seed: int) -> list[int]:
        batches: Any = islice(training_batches(data, 4, seed), 5)
        return [row["i"] for batch in batches for row in batch]

    assert sorted(order(0)[:10]) == sorted(order(0)[10:]) == list(range(10))
    assert order(0) == order(0) != order(1)
    assert order(0)[:10] != order(0)[10:]


def test_grouped_batches_hold_every_row_too_and_pad_less() -> None:
    lengths = torch.randint(1, 60, (320,), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [{"i": i, "input_ids": [0] * n} for i, n in enumerate(lengths)]
    data = TaskData(rows, [], [], lambda rows: rows)  # type: ignore[arg-type,return-value]

    def batches(grouped: bool) -> list[Any]:
        return list(islice(training_batches(data, 4, 0, grouped=grouped), 80))

    def padded(found: list[Any]) -> int:
        return sum(4 * max(len(row["input_ids"]) for row in batch) for batch in found)

    assert sorted(row["i"] for batch in batches(True) for row in batch) == list(range(320))
    assert padded(batches(True)) < 1.1 * sum(lengths) < 1.4 * sum(lengths) < padded(batches(False))
    longest = [max(len(row["input_ids"]) for row in batch) for batch in batches(True)[:16]]
    assert longest != sorted(longest)


def test_a_profile_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = _cells(write_experiment(tmp_path, methods=["ralora", "water-fill", "gard"]))
    calls = []
    real = bench_module.profile_gradients

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(options["statistics"])
        return real(*arguments, **options)

    monkeypatch.setattr(bench_module, "profile_gradients", counted)
    for bench in (Bench(tmp_path, CPU), Bench(tmp_path, CPU)):
        found = {cell.name: bench.profile(cell) for cell in cells}
    assert sorted(calls) == [("mean",)] * 2 + [("mean", "gram")] * 2
    ralora, water = (found[f"lines--{m}--r2--lr0.01--seed0"] for m in ("ralora", "water-fill"))
    assert ralora is not None and water is not None
    assert ralora.gid == water.gid
    assert len(list((tmp_path / PROFILES).glob("*.lock"))) == 4


def test_seeds_decide_the_head_and_methods_share_it(tmp_path: Path) -> None:
    document = _classification(tmp_path)
    cells = _cells(document | {"methods": ["lora", "full"]})
    bench = Bench(tmp_path / "out", CPU)
    heads = {}
    for cell in cells:
        model = bench.base(cell.task, cell.seed).fresh()
        heads[cell.method.label, cell.seed] = model.classifier.weight.detach()
    assert torch.equal(heads["lora", 0], heads["full", 0])
    assert not torch.equal(heads["lora", 0], heads["lora", 1])


@pytest.mark.filterwarnings("ignore:.*(EVA|eva|svd|redistribution).*")
def test_a_run_leaves_the_base_model_as_it_was(tmp_path: Path) -> None:
    document = _classification(tmp_path)
    methods = ["full", "pissa", "lora-ga", "eva", "ralora", "gard-dynamic", "head-only"]
    bench = Bench(tmp_path / "out", CPU)
    cells = [cell for cell in _cells(document | {"methods": methods}) if cell.seed == 0]
    before = {k: v.clone() for k, v in bench.base(cells[0].task, 0).model.state_dict().items()}
    records = [run_cell(cell, bench) for cell in cells]
    after = bench.base(cells[0].task, 0).model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    head = 16 * 2 + 2
    assert {record.head_parameters for record in records} == {head}
    by_name = {record.method: record for record in records}
    assert by_name["head-only"].trainable_parameters == 0
    assert by_name["full"].size is None
    assert by_name["ralora"].size is not None
    assert by_name["ralora"].trainable_parameters == by_name["ralora"].size.parameters
    assert all(record.test is not None and "accuracy" in record.test for record in records)


@pytest.mark.filterwarnings("ignore:.*(EVA|eva|svd|redistribution).*")
def test_eva_on_too_small_batches_is_an_error_and_no_endless_loop(tmp_path: Path) -> None:
    document = _classification(tmp_path)
    changes: dict[str, Any] = {"methods": ["eva"], "budgets": [8], "seeds": [0], "reference": {}}
    cells = _cells(document | changes)
    with pytest.raises(ConfigError, match=r"pooler\.dense sees 4 rows a batch, fewer than the 16"):
        run_cell(cells[0], Bench(tmp_path / "out", CPU))


def test_a_run_does_not_depend_on_what_ran_before(tmp_path: Path) -> None:
    cells = _cells(write_experiment(tmp_path, methods=["lora", "ralora"]))
    bench = Bench(tmp_path / "one", CPU)
    together = [run_cell(cell, bench) for cell in cells]
    alone = run_cell(cells[-1], Bench(tmp_path / "two", CPU))
    assert together[-1].test == alone.test
    assert together[-1].train_loss == alone.train_loss


def test_peak_memory_is_that_of_the_part_alone() -> None:
    first = torch.zeros(64 * 2**20 // 4)
    first += 1
    del first
    memory = PeakMemory(CPU)
    second = torch.zeros(32 * 2**20 // 4)
    second += 1
    del second
    peak = memory.peak()
    if memory.before is None:  # not Linux
        assert peak is None
    else:
        assert peak is not None
        assert 30 < peak - memory.before < 60


def test_other_data_get_another_profile(tmp_path: Path) -> None:
    cell = _cells(write_experiment(tmp_path, methods=["ralora"]))[0]
    before = Bench(tmp_path, CPU).profile(cell)
    rows = [{"question": f"another {i}", "answer": f"text {i}"} for i in range(30)]
    write_rows(tmp_path / "train.jsonl", rows)
    after = Bench(tmp_path, CPU).profile(cell)
    assert before is not None and after is not None
    assert before.gid != after.gid


def test_adalora_counts_the_triplets_that_are_left(tmp_path: Path) -> None:
    document = write_experiment(tmp_path, methods=["adalora"], training={"steps": 20})
    bench = Bench(tmp_path / "out", CPU)
    cell = _cells(document)[0]
    trained = train_cell(cell, bench)
    layers = dict(trained.adapted.model.get_base_model().named_modules())  # type: ignore[operator]
    left, parameters = {}, 0
    for name, shape in bench.base(cell.task, cell.seed).targets.items():
        left[name] = int(layers[name].lora_E["default"].count_nonzero())
        parameters += left[name] * (shape.d_in + shape.d_out + 1)
    assert trained.size is not None
    assert trained.size.values == left and len(set(left.values())) > 1
    assert trained.size.parameters == parameters


@pytest.mark.filterwarnings("ignore:.*(EVA|eva|svd|redistribution).*")
def test_eva_has_the_ranks_that_it_moved(tmp_path: Path) -> None:
    bench = Bench(tmp_path / "out", CPU)
    cell = _cells(write_experiment(tmp_path, methods=["eva"], budgets=[4], reference={}))[0]
    size = train_cell(cell, bench).size
    assert size is not None
    targets = bench.base(cell.task, cell.seed).targets
    assert len(set(size.values.values())) > 1
    assert size.parameters == sum(rank * targets[n].rank_cost for n, rank in size.values.items())
