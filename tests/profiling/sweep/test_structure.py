"""Models that are no plain stack are measured by hooks, with a message."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn

import rankwise.profiling.sweep.check as check_module
from rankwise.profiling import BatchLoss
from sweep_reference import Stack, assert_falls_back, measure, model_and_batches


class TestFallback:
    @pytest.mark.parametrize(
        ("way", "reason"),
        [
            ("twice", "not called once each"),
            ("from the middle", "its gradient of layers.0.0 is not the one that hooks see"),
            ("between", "its gradient of layers.1.0 is not"),
            ("target before", "before lies before a stack of layers"),
        ],
    )
    def test_models_that_are_no_plain_stack(
        self, way: str, reason: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        batches = [
            {"x": torch.randn(5, 4, generator=generator), "labels": torch.arange(5)}
            for _ in range(3)
        ]
        targets = "all-linear" if way == "target before" else r"layers.*"
        assert_falls_back(Stack(way), batches, reason, caplog, targets=targets)
        profile = measure(Stack("plain"), batches, targets=r"layers.*")
        assert profile.provenance.engine == "sweep"

    def test_no_stack(self, caplog: pytest.LogCaptureFixture) -> None:
        def loss_fn(model: nn.Module, batch: Mapping[str, Any]) -> BatchLoss:
            return BatchLoss(model(batch["x"]).square().mean(), 3)

        model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
        batches = [{"x": torch.randn(3, 4)}]
        assert_falls_back(model, batches, "no target lies in a stack", caplog, loss_fn=loss_fn)

    def test_error_while_comparing(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        def broken(*_args: object) -> None:
            raise RuntimeError("out of order")

        model, batches = model_and_batches("llama")
        monkeypatch.setattr(check_module, "run_top", broken)
        assert_falls_back(model, batches, "RuntimeError: out of order", caplog)
