from __future__ import annotations

import copy
import logging
import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.loss.loss_utils import LOSS_MAPPING, ForSequenceClassificationLoss

from gradient_reference import (
    architectures,
    assert_gradients,
    autograd_gradients,
    measure,
    model_and_batches,
)
from rankwise.errors import TargetError
from rankwise.profiling import BatchLoss, model_loss, profile_gradients
from rankwise.profiling.loss import count_labels
from rankwise.targets import find_targets
from tiny_models import (
    ARCHITECTURES,
    IGNORED,
    tiny_vit,
    token_batch,
)


class TestAgainstAutograd:
    """Every target's mean gradient is the `weight.grad` of the same loss."""

    @architectures
    def test_one_batch_reaches_every_module(self, architecture: str) -> None:
        model, batches = model_and_batches(architecture)
        profile = measure(model, batches[:1])
        assert_gradients(profile, autograd_gradients(model, batches[:1]), 1e-5)
        for name, entry in profile.modules.items():
            assert entry.batches == 1, name
            assert entry.gradient_norm > 0, name

    @architectures
    def test_shapes_and_singular_values(self, architecture: str) -> None:
        model, batches = model_and_batches(architecture)
        profile = measure(model, batches)
        for name, gradient in autograd_gradients(model, batches).items():
            entry = profile.modules[name]
            assert (entry.d_out, entry.d_in) == tuple(gradient.shape)
            values = torch.linalg.svdvals(gradient.double())
            torch.testing.assert_close(
                profile.singular_values[name], values, rtol=0, atol=1e-5 * float(values[0])
            )

    def test_gid_is_that_of_the_mean_gradient(self, tiny_llama: PreTrainedModel) -> None:
        batches = [token_batch([9, 6], seed=i) for i in range(3)]
        profile = measure(tiny_llama, batches)
        for name, gradient in autograd_gradients(tiny_llama, batches).items():
            p = torch.linalg.svdvals(gradient.double())
            p = p / p.sum()
            assert profile.gid[name] == pytest.approx(
                math.exp(-float((p * p.log()).sum())), rel=1e-4
            )


class TestWeighting:
    def test_unequal_padded_batches_equal_one_big_batch(self, tiny_llama: PreTrainedModel) -> None:
        big = token_batch([9, 6, 5, 4, 7, 3], seed=5)
        parts = [{k: v[rows] for k, v in big.items()} for rows in (slice(0, 2), slice(2, 5), [5])]
        # each batch is cut to its own longest row, as a padding collator does
        longest = [int(part["attention_mask"].sum(1).max()) for part in parts]
        parts = [{k: v[:, :n] for k, v in p.items()} for p, n in zip(parts, longest, strict=True)]
        whole, split = measure(tiny_llama, [big]), measure(tiny_llama, parts)
        assert split.gradients is not None
        assert_gradients(whole, split.gradients, 1e-5)
        assert whole.provenance.tokens == split.provenance.tokens == 9 + 6 + 5 + 4 + 7 + 3 - 6

    def test_plain_averaging_would_be_wrong(self, tiny_llama: PreTrainedModel) -> None:
        batches = [token_batch([12], seed=1), token_batch([2], seed=2)]
        profile = measure(tiny_llama, batches)
        each = [autograd_gradients(tiny_llama, [batch]) for batch in batches]
        name = "model.layers.0.mlp.up_proj"
        assert profile.gradients is not None
        torch.testing.assert_close(
            profile.gradients[name], (11 * each[0][name] + 1 * each[1][name]) / 12
        )
        plain = (each[0][name] + each[1][name]) / 2
        assert float((profile.gradients[name] - plain).norm() / plain.norm()) > 0.05

    @pytest.mark.parametrize("engine", ["hooks", "sweep"])
    @pytest.mark.parametrize("scale", [1e-6, 3.0, 1e6])
    def test_scale_of_the_loss_leaves_gid_alone(
        self, tiny_llama: PreTrainedModel, scale: float, engine: str
    ) -> None:
        def scaled(model: nn.Module, batch: Mapping[str, Any]) -> BatchLoss:
            loss, items = model_loss(model, batch)
            return BatchLoss(loss * scale, items)

        batches = [token_batch([9, 6], seed=1), token_batch([5, 4, 7], seed=2)]
        plain = measure(tiny_llama, batches, engine=engine)
        other = measure(tiny_llama, batches, engine=engine, loss_fn=scaled)
        assert other.provenance.engine == engine
        assert other.gid == pytest.approx(plain.gid, rel=1e-5)
        for name, entry in other.modules.items():
            expected = scale * plain.modules[name].gradient_norm
            assert entry.gradient_norm == pytest.approx(expected, rel=1e-5)

    def test_classifier_counts_rows(self) -> None:
        model, batches = model_and_batches("bert-classifier")
        assert measure(model, batches).provenance.tokens == 6

    @pytest.mark.parametrize(
        ("architecture", "tokens"),
        [("llama", 28), ("gpt2", 28), ("bert-mlm", 5 + 7 + 1), ("t5", 11 + 10 + 1)],
    )
    def test_tokens_are_the_labels_in_the_loss(self, architecture: str, tokens: int) -> None:
        model, batches = model_and_batches(architecture)
        assert measure(model, batches).provenance.tokens == tokens

    def test_multi_label_classes_are_not_shifted(self) -> None:
        model = ARCHITECTURES["bert-classifier"][0](problem_type="multi_label_classification")
        assert count_labels(model, torch.ones(4, 3)) == 12

    @pytest.mark.parametrize(
        "kind", [k for k, loss in LOSS_MAPPING.items() if loss is ForSequenceClassificationLoss]
    )
    def test_classes_of_pictures_and_sounds_are_not_shifted(self, kind: str) -> None:
        model = tiny_vit()
        model.loss_type = kind
        assert count_labels(model, torch.ones(4, 3)) == 12

    def test_batch_without_labels_to_predict_counts_nothing(
        self, tiny_llama: PreTrainedModel, caplog: pytest.LogCaptureFixture
    ) -> None:
        batches = [token_batch([6], seed=1), token_batch([6], seed=2)]
        batches[1]["labels"] = torch.full_like(batches[1]["labels"], IGNORED)
        with caplog.at_level(logging.WARNING):
            profile = measure(tiny_llama, batches)
        assert "batch 1 has no labelled item" in caplog.text
        assert_gradients(profile, autograd_gradients(tiny_llama, batches[:1]), 1e-6)
        assert profile.provenance.batches == 1
        assert {entry.batches for entry in profile.modules.values()} == {1}


class Shared(nn.Module):
    """One layer used twice, one never, one only where a batch asks for it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Linear(4, 6)
        self.twice = nn.Linear(6, 6)
        self.never = nn.Linear(6, 6)
        self.sometimes = nn.Linear(6, 6)

    def forward(self, x: Tensor, labels: Tensor, ask: bool = False) -> Any:
        h = torch.tanh(self.embedding(x))
        h = torch.tanh(self.twice(self.twice(h)))
        if ask:
            h = self.sometimes(h)
        return type("Output", (), {"loss": F.cross_entropy(h, labels)})


def shared_batch(seed: int, ask: bool = False) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(5, 4, generator=generator)
    return {"x": x, "labels": torch.randint(0, 6, (5,), generator=generator), "ask": ask}


class TestOddUses:
    def test_module_called_twice_in_a_forward(self) -> None:
        model, batch = Shared(), shared_batch(0)
        profile = profile_gradients(model, [batch], ["twice"], batches=1, keep_gradients=True)
        model(**batch).loss.backward()
        assert_gradients(profile, {"twice": model.twice.weight.grad}, 1e-6)
        assert profile.modules["twice"].batches == 1
        assert profile.modules["twice"].rows == 10

    def test_module_never_called_is_flagged(self, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.WARNING):
            profile = profile_gradients(
                Shared(), [shared_batch(0)], ["twice", "never"], batches=1, keep_gradients=True
            )
        assert "never: its gradient is zero" in caplog.text
        assert "twice: its gradient is zero" not in caplog.text
        entry = profile.modules["never"]
        assert (entry.gradient_norm, entry.sensitivity, entry.batches, entry.rows) == (0, 0, 0, 0)
        assert profile.gid["never"] == 0
        assert profile.singular_values["never"].tolist() == [0.0] * 6
        assert profile.gradients is not None
        assert profile.gradients["never"].shape == (6, 6)

    def test_tied_layers_count_once(self) -> None:
        model = Shared()
        model.sometimes.weight = model.twice.weight
        found = find_targets(model)
        assert set(found) == {"embedding", "twice", "never"}
        assert found.left_out["sometimes"] == "tied: it shares its weight with twice"
        profile = measure(model, [shared_batch(0, ask=True)])
        assert profile.modules["twice"].rows == 10  # not the use under another name

    def test_module_of_some_batches_is_averaged_over_all_items(self) -> None:
        model = Shared()
        batches = [shared_batch(0), shared_batch(1, ask=True), shared_batch(2)]
        profile = measure(model, batches)
        (model(**batches[1]).loss / 3).backward()
        assert profile.gradients is not None
        torch.testing.assert_close(profile.gradients["sometimes"], model.sometimes.weight.grad)
        assert profile.modules["sometimes"].batches == 1
        assert profile.modules["twice"].batches == 3

    def test_layer_followed_by_a_change_in_place(self) -> None:
        model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 3))
        x = torch.randn(5, 4)

        def loss_fn(model: nn.Module, batch: Mapping[str, Any]) -> BatchLoss:
            return BatchLoss(model(batch["x"]).square().mean(), 5)

        profile = profile_gradients(
            model, [{"x": x}], batches=1, loss_fn=loss_fn, keep_gradients=True
        )
        model(x).square().mean().backward()
        grads = {"0": model[0].weight.grad, "2": model[2].weight.grad}
        assert_gradients(profile, grads, 1e-6)

    def test_torch_encoder_layer_keeps_off_its_fast_path(self) -> None:
        model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
        x = torch.randn(2, 5, 8)

        def loss_fn(model: nn.Module, batch: Mapping[str, Any]) -> BatchLoss:
            return BatchLoss((model(batch["x"]) ** 3).mean(), 10)

        profile = profile_gradients(
            model, [{"x": x}], batches=1, loss_fn=loss_fn, keep_gradients=True
        )
        (model(x) ** 3).mean().backward()
        grads = {"linear1": model.linear1.weight.grad, "linear2": model.linear2.weight.grad}
        assert_gradients(profile, grads, 1e-5)

    def test_own_loss(self, tiny_llama: PreTrainedModel) -> None:
        batch = token_batch([6, 6], seed=3)

        def first_logit(model: nn.Module, batch: Mapping[str, Any]) -> BatchLoss:
            logits = model(input_ids=batch["input_ids"]).logits
            return BatchLoss(logits[:, -1, 0].mean(), 2)

        profile = measure(tiny_llama, [batch], loss_fn=first_logit)
        reference = copy.deepcopy(tiny_llama).requires_grad_(True)
        first_logit(reference, batch).loss.backward()
        grads = {n: reference.get_submodule(n).weight.grad for n in find_targets(reference)}
        assert_gradients(profile, grads, 1e-5)
        assert profile.provenance.tokens == 2

    def test_targets_can_be_chosen(self, tiny_llama: PreTrainedModel) -> None:
        profile = measure(tiny_llama, [token_batch([5])], targets=["q_proj"])
        assert list(profile.modules) == [
            "model.layers.0.self_attn.q_proj",
            "model.layers.1.self_attn.q_proj",
        ]
        with pytest.raises(TargetError, match="matches no linear layer"):
            measure(tiny_llama, [token_batch([5])], targets=["nothing"])
