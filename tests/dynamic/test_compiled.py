"""Compiled models: measured all the same, and compiled again only where ranks change shapes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import rankwise as rw
from dynamic_runs import WATER, adamw, attached
from rankwise.dynamic import DynamicRanks
from tiny_models import token_batch

STEPS, OPTIONS = 10, rw.DynamicOptions(interval=4, window=2)
"""Steps 3, 4, 7 and 8 are measured, and run as written."""


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def run(mode: Any, *, compiled: bool) -> tuple[list[dict[str, int]], list[float], list[int]]:
    """Ranks and losses after every step, and how much had been compiled by then."""
    model, plan = attached()
    counter = CompileCounter()
    forward = torch.compile(model, backend=counter) if compiled else model
    optimizer = adamw(model)
    ranks = DynamicRanks(model, plan, WATER, OPTIONS, optimizer=optimizer, mode=mode)
    seen, losses, counts = [], [], []
    for step in range(STEPS):
        with ranks.observe():
            loss = forward(**token_batch([9, 6], seed=step)).loss
            loss.backward()
        optimizer.step()
        ranks.step()
        optimizer.zero_grad()
        seen.append(dict(ranks.state.ranks))
        losses.append(float(loss.detach()))
        counts.append(counter.frame_count)
    assert [event.batches for event in ranks.events] == [2, 2]
    return seen, losses, counts


@pytest.mark.parametrize("mode", ["masked", "resize"])
def test_compiled_training_is_measured_and_recompiles_only_after_events(mode: str) -> None:
    expected, losses, _ = run(mode, compiled=False)
    seen, found, counts = run(mode, compiled=True)
    assert seen == expected and any(now != seen[0] for now in seen)
    assert found == pytest.approx(losses, abs=1e-5)
    assert counts[0] > 0
    grew = {i + 1 for i in range(1, STEPS) if counts[i] > counts[i - 1]}
    assert grew <= {5, 9} and bool(grew) == (mode == "resize")
