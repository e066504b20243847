from __future__ import annotations

import logging
from collections.abc import Sequence

import pytest
from torch import nn

from rankwise.profiling import hooks, model_loss
from rankwise.profiling.batches import Job
from rankwise.profiling.hooks import gram_bytes
from rankwise.targets import find_targets
from sweep_reference import measure, model_and_batches


def test_memory_of_gram_matrices_by_hooks_is_announced(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batches = model_and_batches("llama")
    with caplog.at_level(logging.INFO, logger="rankwise"):
        measure(model, batches, targets=["up_proj"], engine="hooks")
    # 16 x 24 weights, 18 tokens of 40 numbers: two layers, four batches of fp32 gradients
    assert gram_bytes(job_of(model, ["up_proj"], 4), tokens=18) == 4 * 2 * 4 * 16 * 24
    assert gram_bytes(job_of(model, ["up_proj"], 4), tokens=3) == 4 * 2 * 4 * 3 * 40
    assert "keep every layer's gradients of all 4 batches, about 0.0 GB" in caplog.text
    monkeypatch.setattr(hooks, "gram_bytes", lambda *_: 3_200_000_000)
    measure(model, batches, targets=["up_proj"], engine="hooks")
    assert "of all 4 batches, about 3.2 GB" in caplog.text


def job_of(model: nn.Module, targets: Sequence[str], batches: int) -> Job:
    selected = find_targets(model, targets)
    return Job(model, selected, model_loss, frozenset(), batches, train_mode=False, progress=False)
