"""SIGKILL in steps, events and saves: the run goes on and ends bit-equal to one never stopped."""

from __future__ import annotations

import multiprocessing
import os
import random
import select
import time
from collections import Counter
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any

import pytest
import torch

from killed_run import PHASES, child, run

KILLS = int(os.environ.get("RANKWISE_KILLS", "6"))
"""How often the run is killed; RANKWISE_KILLS=40 is the long version, of 60 steps."""
STEPS = 60 if KILLS >= 40 else 30
TESTS = Path(__file__).parent.parent


class Attempt:
    """One process that trains on, and what it says about where it is."""

    def __init__(self, folder: Path) -> None:
        context = multiprocessing.get_context("forkserver")  # imports once, forks before training
        context.set_forkserver_preload(["killed_run"])
        self._pipe, theirs = os.pipe()
        self._process = context.Process(target=_child, args=(str(folder), DupFd(theirs)))
        self._process.start()
        os.close(theirs)
        self.said = ""

    def until(self, marker: str, count: int) -> bool:
        """Wait until it has said so, so many times; False if it ends first."""
        while self.said.count(marker) < count:
            if not self._hear():
                return False
        return True

    def kill(self) -> str | None:
        """Kill it; returns the phase it was in, or None if it had ended by itself."""
        self._process.kill()
        killed = self.finish() < 0
        last = self.said[-1:]
        return PHASES.get(last, "between") if killed else None

    def finish(self) -> int:
        """Wait for its end; returns its exit code."""
        while self._hear():
            pass
        self._process.join()
        os.close(self._pipe)
        assert self._process.exitcode is not None
        return self._process.exitcode

    def _hear(self) -> bool:
        ready, *_ = select.select([self._pipe], [], [], 120)
        assert ready, "the run has said nothing for two minutes"
        heard = os.read(self._pipe, 4096).decode()
        self.said += heard
        return bool(heard)


def _child(folder: str, pipe: Any) -> None:
    child(folder, STEPS, pipe.detach())


@pytest.mark.timeout(300 + 10 * KILLS)
def test_killed_runs_end_as_if_they_had_not_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times: list[tuple[str, float]] = []
    expected = run(tmp_path / "whole", STEPS, lambda m: times.append((m, time.perf_counter())))
    assert expected["events"].count("RankEvent(") == (STEPS - 1) // 10
    path = os.pathsep.join([str(TESTS), str(TESTS.parent / "src")])
    monkeypatch.setenv("PYTHONPATH", path)
    moments = random.Random(0)
    hits: Counter[str] = Counter()
    runs = attempts = 0
    while sum(hits.values()) < KILLS or missed(hits):
        runs += 1
        folder = tmp_path / f"killed{runs}"
        while not Path(f"{folder}.done").exists():
            attempt, attempts = Attempt(folder), attempts + 1
            assert attempts < 5 * KILLS + 50, hits
            if sum(hits.values()) < KILLS or missed(hits):
                marker = [*missed(hits), *PHASES][attempts % 3]
                if attempt.until(marker, moments.randint(1, 1 if marker == "e" else 3)):
                    # every other time at once, because a phase is short where others compute too
                    share = moments.uniform(0, 0.8) * (attempts % 2)
                    time.sleep(share * seconds(times, marker))
                    hits.update(filter(None, [attempt.kill()]))
                    continue
            assert attempt.finish() == 0
        assert_same(torch.load(f"{folder}.done", weights_only=True), expected)
    print(f"killed {sum(hits.values())} times in {runs} runs of {STEPS} steps: {dict(hits)}")


def missed(hits: Counter[str]) -> list[str]:
    """Markers of the phases in which no process was killed yet."""
    return [marker for marker, phase in PHASES.items() if not hits[phase]]


def seconds(times: list[tuple[str, float]], marker: str) -> float:
    """How long a phase lasts, by the median of the run that nobody stopped."""
    ends = {m: [when for said, when in times if said == m] for m in (marker, marker.upper())}
    lasted = sorted(e - b for b, e in zip(ends[marker], ends[marker.upper()], strict=True))
    return lasted[len(lasted) // 2]


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for part in ("weights", "optimizer"):
        assert found[part].keys() == expected[part].keys()
        assert all(torch.equal(tensor, found[part][k]) for k, tensor in expected[part].items())
    assert found["events"] == expected["events"]
    assert found["losses"] == expected["losses"]
