"""Batches that are dropped, and modules without a gradient."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from batch_reference import (
    ALL,
    measure,
)
from rankwise.errors import ProfileError
from rankwise.profiling import BatchLoss, model_loss, profile_gradients
from tiny_models import tiny_llama, token_batch


def poisoned_loss(bad_batch: int, value: float, module: str) -> Callable[..., BatchLoss]:
    """The model's loss, with a NaN or an infinity in one module's output gradient on one batch."""
    seen = -1

    def poison(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        spoil = torch.ones_like(output)
        spoil[..., 0] = value
        output.register_hook(lambda gradient: gradient * spoil)
        return output

    def loss_fn(model: nn.Module, batch: Mapping[str, Any]) -> BatchLoss:
        nonlocal seen
        seen += 1
        if seen != bad_batch:
            return model_loss(model, batch)
        handle = model.get_submodule(module).register_forward_hook(poison)
        result = model_loss(model, batch)
        result.loss.register_hook(lambda _: handle.remove())
        return result

    return loss_fn


class TestDroppedBatches:
    @pytest.mark.parametrize("value", [math.nan, math.inf])
    @pytest.mark.parametrize("statistics", [("mean",), ALL])
    @pytest.mark.parametrize("bad", [0, 5, 11])
    def test_batch_is_dropped_for_every_module(
        self, bad: int, statistics: Sequence[str], value: float, caplog: pytest.LogCaptureFixture
    ) -> None:
        model = tiny_llama()
        batches = [token_batch([9, 3 + i % 4], seed=i) for i in range(12)]
        module = "model.layers.0.mlp.up_proj"  # layer 1 is done when it is reached
        with caplog.at_level(logging.WARNING):
            profile = measure(
                model,
                batches,
                statistics=statistics,
                loss_fn=poisoned_loss(bad, value, module),
                keep_gradients=True,
            )
        good = batches[:bad] + batches[bad + 1 :]
        expected = measure(model, good, statistics=statistics, keep_gradients=True)
        assert f"batch {bad} is dropped: non-finite gradient in module {module}" in caplog.text
        assert profile.modules == expected.modules
        assert profile.gid == expected.gid
        for attribute in ("gram", "convergence", "gradients"):
            arrays, same = getattr(profile, attribute), getattr(expected, attribute)
            for name in arrays or ():
                assert torch.equal(arrays[name], same[name])
        provenance = profile.provenance
        assert provenance.dropped_batches == [bad]
        assert provenance.batches == 11
        assert provenance.batch_items == expected.provenance.batch_items
        assert provenance.data_fingerprint == expected.provenance.data_fingerprint
        assert "1 batches dropped" in str(profile)

    def test_more_than_a_tenth_is_an_error(self) -> None:
        batches = [token_batch([5], seed=i) for i in range(9)]
        loss_fn = poisoned_loss(3, math.nan, "model.layers.1.mlp.up_proj")
        with pytest.raises(ProfileError, match=r"module model\.layers\.1\.mlp\.up_proj, batch 3:"):
            measure(tiny_llama(), batches, loss_fn=loss_fn)

    def test_more_than_a_tenth_of_a_short_loader_is_an_error(self) -> None:
        batches = [token_batch([5], seed=i) for i in range(5)]
        loss_fn = poisoned_loss(3, math.nan, "model.layers.1.mlp.up_proj")
        with pytest.raises(ProfileError, match="more than 10% of the batches"):
            profile_gradients(tiny_llama(), batches, loss_fn=loss_fn, batches=64)

    def test_infinite_loss_with_a_finite_gradient(self) -> None:
        calls = iter(range(20))

        def loss_fn(model: nn.Module, batch: Mapping[str, Any]) -> BatchLoss:
            loss, items = model_loss(model, batch)
            return BatchLoss(loss + (math.inf if next(calls) == 4 else 0), items)

        batches = [token_batch([5], seed=i) for i in range(10)]
        profile = measure(tiny_llama(), batches, loss_fn=loss_fn)
        assert profile.provenance.dropped_batches == [4]

    def test_product_beyond_fp32(self) -> None:
        model = nn.Sequential(nn.Linear(4, 3, bias=False))
        scales = iter([1.0] * 9 + [1e25])

        def loss_fn(model: nn.Module, batch: Mapping[str, Any]) -> BatchLoss:
            scale = next(scales)
            return BatchLoss((model(batch["x"] * scale) * scale).mean(), 2)

        batches = [{"x": torch.randn(2, 4)} for _ in range(10)]
        profile = measure(model, batches, loss_fn=loss_fn)
        assert profile.provenance.dropped_batches == [9]

    def test_unlabelled_batches_are_listed(self) -> None:
        empty = token_batch([6])
        empty["labels"] = torch.full_like(empty["labels"], -100)
        profile = measure(tiny_llama(), [token_batch([6]), empty, token_batch([4])])
        assert profile.provenance.unlabelled_batches == [1]
        assert profile.provenance.dropped_batches == []
        assert profile.provenance.batch_items == [5, 3]


class TestZeroGradients:
    def test_flagged(self, caplog: pytest.LogCaptureFixture) -> None:
        class Gated(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first, self.gated, self.unused = (nn.Linear(4, 4) for _ in range(3))

            def forward(self, x: Tensor, labels: Tensor, gate: float) -> Any:
                h = self.first(x)
                h = h + gate * self.gated(h)
                return type("Output", (), {"loss": F.cross_entropy(h, labels)})

        generator = torch.Generator().manual_seed(0)
        batches = [
            {"x": torch.randn(3, 4, generator=generator), "labels": torch.arange(3), "gate": gate}
            for gate in (0.0, 1.0, 0.0)
        ]
        profile = measure(Gated(), batches)
        entries = profile.modules
        assert [entries[n].zero_batches for n in entries] == [0, 2, 0]
        assert [entries[n].batches for n in entries] == [3, 3, 0]
        assert [entries[n].has_gradient for n in entries] == [True, True, False]
        assert "unused: its gradient is zero on every batch" in caplog.text
        assert "1 modules without gradient" in str(profile)
        assert profile.gram is not None and profile.convergence is not None
        assert float(profile.gram["unused"].abs().max()) == 0
        assert profile.gram["gated"].count_nonzero() == 1
        assert profile.energy_ranks()["unused"] == 0
        assert entries["unused"].fisher == 0
        assert profile.convergence["unused"].tolist() == [0, 0, 0]
        assert profile.convergence["gated"][0] == 0
