"""Several stacks are swept; what is no plain stack is measured by hooks, with a message."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AlbertConfig, AlbertForMaskedLM

import rankwise.profiling.sweep.check as check_module
from rankwise.profiling import BatchLoss
from sweep_reference import Stack, assert_falls_back, assert_same, measure, model_and_batches
from tiny_models import PAD, VOCABULARY, build, masked_batch, tiny_llama, tiny_t5


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

    def test_layers_that_share_their_weights(self, caplog: pytest.LogCaptureFixture) -> None:
        config = AlbertConfig(
            vocab_size=VOCABULARY,
            embedding_size=8,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=3,
            num_attention_heads=4,
            initializer_range=0.3,
            pad_token_id=PAD,
        )
        model = build(AlbertForMaskedLM, config, 0)
        batches = [masked_batch([9, 6]), masked_batch([5, 4, 7], seed=1)]
        assert_falls_back(model, batches, "not called once each", caplog)
        name = "albert.encoder.albert_layer_groups.0.albert_layers.0.ffn"
        profile = measure(model, batches, engine="hooks", statistics=())
        assert profile.modules[name].rows == 3 * (2 * 9 + 3 * 7)

    def test_layer_never_called(self, caplog: pytest.LogCaptureFixture) -> None:
        model, batches = tiny_llama(), model_and_batches("llama")[1]
        model.config.num_hidden_layers = 1  # the second layer stays, unused
        reason = "not called once each"
        assert_falls_back(model, batches, reason, caplog)
        profile = measure(model, batches, engine="hooks")
        assert not profile.modules["model.layers.1.mlp.up_proj"].has_gradient


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.own, self.cross = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, h: Tensor, memory: Tensor | None = None) -> Tensor:
        return torch.tanh(self.own(h) + (0 if memory is None else self.cross(memory)))


class TwoStacks(nn.Module):
    """An encoder and a decoder, joined in the ways that a flag asks for."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.decoder = nn.ModuleList(Layer() for _ in range(3))  # called last
        self.encoder = nn.ModuleList(Layer() for _ in range(2))
        self.between = nn.Linear(6, 6)
        self.between.weight.requires_grad_(False)

    def forward(self, x: Tensor, labels: Tensor) -> Any:
        memory = x
        for layer in self.encoder:
            memory = layer(memory)
        memory = self.between(memory)
        h = x + memory if self.way == "input" else x
        for i, layer in enumerate(self.decoder):
            if self.way == "in the middle" and i == 1:
                h = h + memory
            h = layer(h, None if self.way in ("input", "apart") else memory)
        if self.way in ("loss", "apart"):
            h = h + memory.sin()
        return type("Output", (), {"loss": F.cross_entropy(h, labels)})


def two_stack_batches() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(5)
    return [{"x": torch.randn(5, 6, generator=generator), "labels": labels} for _ in range(3)]


class TestSeveralStacks:
    @pytest.mark.parametrize("way", ["cross", "input", "apart"])
    def test_joined_in_any_way(self, way: str) -> None:
        model, batches = TwoStacks(way), two_stack_batches()
        options = {"targets": r"(en|de)coder.*own|decoder.*cross" if way == "cross" else r".*own"}
        found = measure(model, batches, **options)
        assert found.provenance.engine == "sweep"
        assert_same(found, measure(model, batches, engine="hooks", **options), 1e-5)

    @pytest.mark.parametrize(
        ("way", "targets", "reason"),
        [
            ("cross", r"(en|de)coder.*own|between", "between lies before a stack of layers"),
            ("in the middle", r".*own", "something comes between two calls of Layer"),
            # the loss takes the graph between the stacks with it
            ("loss", r".*own", "backward through the graph a second time"),
        ],
    )
    def test_what_is_not_swept(
        self, way: str, targets: str, reason: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        assert_falls_back(TwoStacks(way), two_stack_batches(), reason, caplog, targets=targets)

    @pytest.mark.parametrize(
        "targets",
        [r"encoder.*SelfAttention\.q", r"decoder.*\.v", r"encoder.*\.q|decoder\.block\.1.*\.wi"],
        ids=["encoder", "decoder", "some of both"],
    )
    def test_some_targets_of_t5(self, targets: str) -> None:
        batches = model_and_batches("t5")[1]
        found = measure(tiny_t5(), batches, targets=targets)
        assert found.provenance.engine == "sweep"
        assert_same(found, measure(tiny_t5(), batches, targets=targets, engine="hooks"), 1e-5)
