"""Two processes (gloo, CPU) decide as one, and notice when they no longer train one model."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import two_workers as two
from dynamic_runs import attached, trainer_run
from rankwise.dynamic import DynamicRanks, workers
from rankwise.dynamic.checkpoint import WINDOW_FILE
from rankwise.errors import DynamicError

TESTS = Path(__file__).parent.parent
STATISTICS = ["gard", "water-fill"]  # with Gram matrices, and without


@pytest.fixture(name="folder", scope="module")
def folder_fixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes left after all their runs; the second dies in the last one."""
    folder = tmp_path_factory.mktemp("workers")
    for name in STATISTICS:
        ranks, optimizer = two.start(two.METHODS[name])
        two.train(ranks, optimizer, steps=range(two.SAVED_AT))
        two.save(folder / f"{name}.one.pt", ranks, optimizer)
    path = os.pathsep.join([str(TESTS), str(TESTS.parent / "src")])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    running = [
        subprocess.Popen(
            [sys.executable, str(TESTS / "two_workers.py"), str(folder), str(worker), port],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for worker in (0, 1)
    ]
    errors = [process.communicate(timeout=280)[1] for process in running]
    assert [process.returncode for process in running] == [0, 9], errors
    return folder


def outcomes(folder: Path, scenario: str) -> list[dict[str, Any]]:
    return [json.loads((folder / f"{scenario}.{worker}.json").read_text()) for worker in (0, 1)]


def assert_close(mine: list[torch.Tensor], file: Path) -> None:
    theirs = torch.load(file, weights_only=True)
    assert all((a - b).abs().max() < 1e-5 for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("name", two.METHODS)
def test_two_workers_are_one_process_on_the_joined_batch(folder: Path, name: str) -> None:
    one, other = outcomes(folder, "every_method")
    ranks, optimizer = two.start(two.METHODS[name])
    expected = two.train(ranks, optimizer)
    assert one[name] == other[name] == expected
    assert len(set(expected["ranks"].values())) > 1 and {e[0] for e in expected["events"]} == {4, 8}
    for worker in (0, 1):
        assert_close(two.weights(ranks), folder / f"{name}.{worker}.pt")


@pytest.mark.parametrize("kind", two.OUR_ADAPTERS)
def test_our_adapters_train_under_ddp_as_on_the_joined_batch(folder: Path, kind: str) -> None:
    expected = two.our_adapter(kind, None)
    assert any(weight.abs().max() > 1e-3 for weight in expected)
    for worker in (0, 1):
        assert_close(expected, folder / f"{kind}.{worker}.pt")


@pytest.mark.parametrize("name", STATISTICS)
def test_a_part_that_is_not_finite_drops_the_batch_on_every_worker(folder: Path, name: str) -> None:
    one, other = outcomes(folder, "faults")
    ranks, optimizer = two.start(two.METHODS[name])
    expected = two.train(ranks, optimizer, disturb=two.nan_for(None))
    assert one[f"nan {name}"] == other[f"nan {name}"] == expected
    assert {tuple(event[1:3]) for event in expected["events"] if event[0] == 8} == {(2, 1)}


@pytest.mark.parametrize(
    ("fault", "what", "events"), [("plan", "plan or option", []), ("data", "adapter", [4])]
)
def test_a_worker_that_went_astray_is_named_on_all_at_the_next_event(
    folder: Path, fault: str, what: str, events: list[int]
) -> None:
    for outcome in outcomes(folder, "faults"):
        assert f"worker 1 has another {what} than worker 0" in outcome[fault]["error"]
        assert sorted({event[0] for event in outcome[fault]["events"]}) == events


@pytest.mark.parametrize("name", STATISTICS)
def test_a_run_goes_on_with_another_number_of_workers(folder: Path, name: str) -> None:
    """Both ways, from the middle of a window, which must be all workers'."""
    ranks, optimizer = two.start(two.METHODS[name])
    expected = two.train(ranks, optimizer)
    for outcome in outcomes(folder, "resumed"):
        assert outcome[name] == expected
        assert "each worker holds its part" in outcome[f"{name} not joined"]
    ranks, optimizer = two.start(two.METHODS[name])
    two.load(folder / f"{name}.two.pt", ranks, optimizer)
    assert ranks.window.batches == 1
    assert two.train(ranks, optimizer, steps=range(two.SAVED_AT, two.STEPS)) == expected


def test_trainers_workers_save_once_and_resume(folder: Path, tmp_path: Path) -> None:
    one, other = outcomes(folder, "trainer")
    assert one.pop("written") == ["checkpoint-2", "checkpoint-4", "checkpoint-6", "checkpoint-6"]
    assert other.pop("written") == [] and one == other
    assert (folder / "trainer" / "checkpoint-4" / WINDOW_FILE).is_file()
    for worker in (0, 1):
        assert_equal(*(folder / f"trainer.{name}.{worker}.pt" for name in ("whole", "resumed")))
    alone, callback = trainer_run(tmp_path, **two.trainer_settings(4))
    alone.train()
    assert callback.ranks.state.ranks == one["whole"] == one["resumed"]
    assert len(set(one["whole"].values())) > 1
    assert_close(two.weights(callback.ranks), folder / "trainer.whole.0.pt")
    checkpoint = folder / "trainer" / "checkpoint-4"
    again, callback = trainer_run(
        tmp_path / "again", resume_from=checkpoint, **two.trainer_settings(4)
    )
    again.train(resume_from_checkpoint=str(checkpoint))
    assert callback.ranks.state.ranks == one["whole"]
    assert_close(two.weights(callback.ranks), folder / "trainer.whole.0.pt")


def assert_equal(*files: Path) -> None:
    one, other = (torch.load(file, weights_only=True) for file in files)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_fsdp2_is_refused(folder: Path) -> None:
    for outcome in outcomes(folder, "sharded"):
        assert "q_proj: FSDP2 has sharded the adapter" in outcome["error"]
        assert "train with DDP" in outcome["error"]


def test_a_worker_that_ends_ends_the_others_with_an_error(folder: Path) -> None:
    outcome = json.loads((folder / "widowed.0.json").read_text())
    assert "the connection to another worker broke" in outcome["error"]
    assert not (folder / "widowed.1.json").exists()


def test_resizing_is_refused_with_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "count", lambda: 2)
    model, plan = attached()
    with pytest.raises(DynamicError, match="with 2 processes use mode='masked'"):
        DynamicRanks(model, plan, mode="resize")
