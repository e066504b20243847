"""SIGKILL at random moments: the run goes on and ends bit-equal to one that was never stopped."""

from __future__ import annotations

import multiprocessing
import os
import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from killed_run import child, run

KILLS = int(os.environ.get("RANKWISE_KILLS", "3"))
"""How often the run is killed; RANKWISE_KILLS=40 is the long version."""
TESTS = Path(__file__).parent.parent


@pytest.mark.timeout(60 * max(KILLS, 5))
def test_killed_runs_end_as_if_they_had_not_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    began = time.perf_counter()
    expected = run(tmp_path / "whole")
    seconds = time.perf_counter() - began
    assert expected["events"].count("RankEvent(") == 3

    path = os.pathsep.join([str(TESTS), str(TESTS.parent / "src")])
    monkeypatch.setenv("PYTHONPATH", path)
    context = multiprocessing.get_context("forkserver")  # imports once, forks before any training
    context.set_forkserver_preload(["killed_run"])
    moments = random.Random(0)
    kills = again = 0
    while kills < KILLS:
        again += 1
        folder = tmp_path / f"killed{again}"
        for attempt in range(3 * KILLS + 10):
            started = folder.with_suffix(f".started{attempt}")
            process = context.Process(target=child, args=(str(folder), str(started)))
            process.start()
            while not started.exists() and process.is_alive():
                time.sleep(0.01)
            if kills < KILLS:
                process.join(moments.uniform(0, 0.15 * seconds * (1 + attempt % 4)))
                if process.is_alive():
                    process.kill()
                    kills += 1
            process.join()
            if Path(f"{folder}.done").exists():
                break
        assert_same(torch.load(f"{folder}.done", weights_only=True), expected)


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for part in ("weights", "optimizer"):
        assert found[part].keys() == expected[part].keys()
        assert all(torch.equal(tensor, found[part][k]) for k, tensor in expected[part].items())
    assert found["events"] == expected["events"]
    assert found["losses"] == expected["losses"]
