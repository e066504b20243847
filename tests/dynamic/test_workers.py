"""Two processes (gloo, CPU) decide as one, and notice when they no longer train one model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import rankwise as rw
from dynamic_runs import WATER, adamw, attached
from rankwise.dynamic import DynamicRanks, workers
from rankwise.errors import DynamicError
from tiny_models import token_batch

TESTS = Path(__file__).parent.parent


@pytest.fixture(name="folder", scope="module")
def folder_fixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes left after three runs: as it should be, and with two faults."""
    folder = tmp_path_factory.mktemp("workers")
    path = os.pathsep.join([str(TESTS), str(TESTS.parent / "src")])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    script = str(TESTS / "two_workers.py")
    running = [
        subprocess.Popen(
            [sys.executable, script, str(folder), str(worker)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for worker in (0, 1)
    ]
    for process in running:
        _, errors = process.communicate(timeout=280)
        assert process.returncode == 0, errors
    return folder


def outcomes(folder: Path, fault: str) -> list[dict[str, Any]]:
    return [json.loads((folder / f"{worker}.json").read_text())[fault] for worker in (0, 1)]


def test_two_workers_are_one_process_on_the_joined_batch(folder: Path) -> None:
    one, two = outcomes(folder, "none")
    assert one == two and "error" not in one and one["events"]
    model, plan = attached(dtype=torch.float64)
    optimizer = adamw(model)
    options = rw.DynamicOptions(interval=3, window=2)
    ranks = DynamicRanks(model, plan, WATER, options, optimizer=optimizer)
    for step in range(6):
        halves = [token_batch([9, 6], seed=2 * step + worker) for worker in (0, 1)]
        with ranks.observe():
            model(**{k: torch.cat([half[k] for half in halves]) for k in halves[0]}).loss.backward()
        optimizer.step()
        ranks.step()
        optimizer.zero_grad()
    assert one["ranks"] == ranks.state.ranks
    assert one["events"] == [[e.step, m.module, m.after] for e in ranks.events for m in e.moves]
    assert len(set(one["ranks"].values())) > 1
    mine = [p.detach() for p in model.parameters() if p.requires_grad]
    for worker in (0, 1):
        theirs = torch.load(folder / f"{worker}.pt", weights_only=True)
        assert all((a - b).abs().max() < 1e-5 for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize(
    ("fault", "what", "events"), [("plan", "plan or option", []), ("data", "adapter", [3])]
)
def test_a_worker_that_went_astray_is_named_on_all_at_the_next_event(
    folder: Path, fault: str, what: str, events: list[int]
) -> None:
    for outcome in outcomes(folder, fault):
        assert f"worker 1 has another {what} than worker 0" in outcome["error"]
        assert sorted({event[0] for event in outcome["events"]}) == events


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": WATER, "mode": "resize"}, "with 2 processes use mode='masked'"),
        ({"method": rw.Gard(r=4, r_max=8)}, "spread over 2 processes; use water-fill"),
    ],
)
def test_what_several_processes_cannot_do_is_refused(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(workers, "count", lambda: 2)
    model, plan = attached()
    with pytest.raises(DynamicError, match=message):
        DynamicRanks(model, plan, **settings)
