from __future__ import annotations

import copy
import itertools
import logging
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rankwise.errors import ProfileError, TargetError
from rankwise.profiling import BatchLoss, GradientProfile, model_loss, profile_gradients
from rankwise.profiling.loss import count_labels
from rankwise.provenance import model_fingerprint
from rankwise.targets import find_targets
from tiny_models import (
    ARCHITECTURES,
    IGNORED,
    Batch,
    class_batch,
    tiny_gpt2,
    tiny_llama,
    token_batch,
)

CHECKPOINTING = [None, {"use_reentrant": True}, {"use_reentrant": False}]
CHECKPOINTING_IDS = ["plain", "reentrant", "non-reentrant"]
ROWS = [[9, 6], [5, 4, 7], [3]]

architectures = pytest.mark.parametrize("architecture", list(ARCHITECTURES))


def labelled(model: nn.Module, batch: Batch) -> int:
    """Labels in the mean loss: causal models never predict a row's first token."""
    shifted = type(model).__name__ in ("LlamaForCausalLM", "GPT2LMHeadModel")
    labels = batch["labels"][:, 1:] if shifted else batch["labels"]
    return int((labels != IGNORED).sum())


def autograd_gradients(model: nn.Module, batches: Sequence[Batch]) -> dict[str, Tensor]:
    """`weight.grad` of the mean loss over all labelled items, every target as (d_out, d_in)."""
    model = copy.deepcopy(model).requires_grad_(True)
    total = sum(labelled(model, batch) for batch in batches)
    gradients = dict.fromkeys(find_targets(model), torch.tensor(0.0))
    for batch in batches:
        model.zero_grad()
        model(**batch).loss.backward()
        for name in gradients:
            module = model.get_submodule(name)
            gradient = module.weight.grad.T if isinstance(module, Conv1D) else module.weight.grad
            gradients[name] = gradients[name] + gradient * (labelled(model, batch) / total)
    return gradients


def assert_gradients(profile: GradientProfile, expected: Mapping[str, Tensor], rel: float) -> None:
    assert profile.gradients is not None
    assert list(profile.gradients) == list(expected)
    for name, reference in expected.items():
        error = torch.linalg.matrix_norm((profile.gradients[name] - reference).double())
        assert float(error) <= rel * float(torch.linalg.matrix_norm(reference.double())), name


def model_and_batches(
    architecture: str, rows: Sequence[Sequence[int]] = ROWS, **options: Any
) -> tuple[PreTrainedModel, list[Batch]]:
    make_model, make_batch = ARCHITECTURES[architecture]
    return make_model(**options), [make_batch(r, seed=i) for i, r in enumerate(rows)]


def measure(model: nn.Module, batches: Sequence[Batch], **options: Any) -> GradientProfile:
    settings: dict[str, Any] = {"batches": len(batches), "keep_gradients": True}
    return profile_gradients(model, batches, **(settings | options))


class TestAgainstAutograd:
    """Every target's mean gradient is the `weight.grad` of the same loss."""

    @pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
    @pytest.mark.parametrize("checkpointing", CHECKPOINTING, ids=CHECKPOINTING_IDS)
    @pytest.mark.parametrize(
        ("dtype", "rel"), [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=["fp32", "fp64"]
    )
    @architectures
    def test_mean_gradient(
        self,
        architecture: str,
        dtype: torch.dtype,
        rel: float,
        checkpointing: dict[str, bool] | None,
    ) -> None:
        model, batches = model_and_batches(architecture)
        model = model.to(dtype)
        expected = autograd_gradients(model, batches)
        calls = dict.fromkeys(expected, 0)
        if checkpointing is not None:
            # transformers checkpoints in training mode only; the models have no dropout
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
            for name in calls:
                model.get_submodule(name).register_forward_pre_hook(counting_hook(calls, name))
        profile = measure(model, batches, train_mode=checkpointing is not None)
        assert_gradients(profile, expected, rel)
        assert {entry.batches for entry in profile.modules.values()} == {len(batches)}
        if checkpointing is not None:
            recomputed = [name for name, count in calls.items() if count == 2 * len(batches)]
            assert len(recomputed) >= len(calls) - 1  # BERT's pooler is outside the layers

    @architectures
    def test_one_batch_reaches_every_module(self, architecture: str) -> None:
        model, batches = model_and_batches(architecture)
        profile = measure(model, batches[:1])
        assert_gradients(profile, autograd_gradients(model, batches[:1]), 1e-5)
        for name, entry in profile.modules.items():
            assert entry.batches == 1, name
            assert entry.gradient_norm > 0, name

    @architectures
    def test_sensitivity_and_norm(self, architecture: str) -> None:
        model, batches = model_and_batches(architecture)
        profile = measure(model, batches)
        for name, gradient in autograd_gradients(model, batches).items():
            module = model.get_submodule(name)
            weight = module.weight.detach()
            weight = weight.T if isinstance(module, Conv1D) else weight
            entry = profile.modules[name]
            expected = float((weight * gradient).abs().mean())
            assert entry.sensitivity == pytest.approx(expected, rel=1e-5)
            assert entry.gradient_norm == pytest.approx(float(gradient.norm()), rel=1e-5)
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


def counting_hook(calls: dict[str, int], name: str) -> Callable[[nn.Module, object], None]:
    def count(_module: nn.Module, _inputs: object) -> None:
        calls[name] += 1

    return count


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


class TestBadInput:
    @pytest.mark.parametrize("batches", [0, -1])
    def test_no_batch_asked_for(self, tiny_llama: PreTrainedModel, batches: int) -> None:
        with pytest.raises(ProfileError, match=f"batches={batches}"):
            profile_gradients(tiny_llama, [token_batch([5])], batches=batches)

    def test_empty_loader(self, tiny_llama: PreTrainedModel) -> None:
        with pytest.raises(ProfileError, match="no batch"):
            profile_gradients(tiny_llama, [])

    def test_nothing_labelled(self, tiny_llama: PreTrainedModel) -> None:
        batch = token_batch([5])
        batch["labels"] = torch.full_like(batch["labels"], IGNORED)
        with pytest.raises(ProfileError, match="none of the 2 batches has a labelled item"):
            profile_gradients(tiny_llama, [batch, batch])

    def test_only_first_tokens_labelled(self, tiny_llama: PreTrainedModel) -> None:
        batch = token_batch([5])
        batch["labels"][:, 1:] = IGNORED  # causal models predict from the second token on
        with pytest.raises(ProfileError, match="none of the 1 batches"):
            profile_gradients(tiny_llama, [batch])

    def test_no_labels(self, tiny_llama: PreTrainedModel) -> None:
        with pytest.raises(ProfileError, match="no 'labels' tensor"):
            profile_gradients(tiny_llama, [{"input_ids": torch.ones(1, 4, dtype=torch.long)}])

    def test_model_that_returns_no_loss(self) -> None:
        class Plain(nn.Linear):
            def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
                return super().forward(x)

        batch = {"x": torch.ones(2, 3), "labels": torch.ones(2)}
        model = nn.Module()
        model.layer = Plain(3, 3)
        model.forward = lambda x, labels: model.layer(x)
        with pytest.raises(ProfileError, match="returned no loss"):
            profile_gradients(model, [batch])

    def test_zero_loss(self, tiny_llama: PreTrainedModel) -> None:
        def zero(model: nn.Module, batch: Mapping[str, Any]) -> BatchLoss:
            loss, count = model_loss(model, batch)
            return BatchLoss(loss * 0, count)

        with pytest.raises(ProfileError, match="gradient of every target is zero"):
            profile_gradients(tiny_llama, [token_batch([5])], loss_fn=zero)

    def test_loss_without_gradient(self, tiny_llama: PreTrainedModel) -> None:
        def detached(model: nn.Module, batch: Mapping[str, Any]) -> BatchLoss:
            loss, count = model_loss(model, batch)
            return BatchLoss(loss.detach(), count)

        with pytest.raises(ProfileError, match="loss of batch 0 depends on none of the targets"):
            profile_gradients(tiny_llama, [token_batch([5])], loss_fn=detached)

    def test_batch_that_is_no_mapping(self, tiny_llama: PreTrainedModel) -> None:
        with pytest.raises(ProfileError, match=r"batch 1 is a tuple"):
            profile_gradients(tiny_llama, [token_batch([5]), (torch.ones(1, 2), 3)])  # type: ignore[list-item]

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_non_finite_gradient_names_module_and_batch(
        self, tiny_llama: PreTrainedModel, bad: float
    ) -> None:
        def poison(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            output.register_hook(lambda gradient: torch.full_like(gradient, bad))

        def loss_fn(model: nn.Module, batch: Mapping[str, Any]) -> BatchLoss:
            if batch["input_ids"].shape[0] == 3:
                model.get_submodule("model.layers.0").register_forward_hook(poison)
            return model_loss(model, batch)

        batches = [token_batch([5]), token_batch([1]), token_batch([4, 4, 4])]  # 1: no label
        with pytest.raises(
            ProfileError, match=r"non-finite .* model\.layers\.0\.mlp\.down_proj, batch 2\b"
        ):
            profile_gradients(tiny_llama, batches, loss_fn=loss_fn)

    def test_nan_weight_is_found(self, tiny_llama: PreTrainedModel) -> None:
        module = tiny_llama.get_submodule("model.layers.1.mlp.up_proj")
        module.weight.data[0, 0] = math.nan
        with pytest.raises(ProfileError, match=r"non-finite gradient in module .*, batch 0"):
            profile_gradients(tiny_llama, [token_batch([5])])

    def test_fewer_batches_than_asked_for(
        self, tiny_llama: PreTrainedModel, caplog: pytest.LogCaptureFixture
    ) -> None:
        with caplog.at_level(logging.WARNING):
            profile = profile_gradients(tiny_llama, [token_batch([5])] * 2, batches=4)
        assert "gave 2 batches of the 4 asked for" in caplog.text
        assert profile.provenance.batches == 2

    def test_no_more_batches_are_taken_than_asked_for(self, tiny_llama: PreTrainedModel) -> None:
        loader = itertools.repeat(token_batch([5]))
        taken = iter([next(loader), next(loader)])
        profile = profile_gradients(tiny_llama, itertools.chain(taken, refuse()), batches=2)
        assert profile.provenance.batches == 2


def refuse() -> Iterator[Batch]:
    raise AssertionError("a batch too many was asked for")
    yield


def hooks(model: nn.Module) -> list[tuple[int, ...]]:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [tuple(len(getattr(module, kind)) for kind in kinds) for module in model.modules()]


class Snapshot:
    """Everything about a model and the process that profiling must give back."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.weights = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.requires_grad = [p.requires_grad for p in model.parameters()]
        self.modes = [module.training for module in model.modules()]
        self.hooks = hooks(model)
        self.random = torch.get_rng_state()
        self.python_random = random.getstate()

    def assert_unchanged(self) -> None:
        model = self.model
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, self.weights[name]), name
            assert parameter.grad is None, name
        assert [p.requires_grad for p in model.parameters()] == self.requires_grad
        assert [module.training for module in model.modules()] == self.modes
        assert hooks(model) == self.hooks
        assert torch.equal(torch.get_rng_state(), self.random)
        assert random.getstate() == self.python_random


@pytest.fixture
def uneven_model() -> PreTrainedModel:
    """A model in a state that no blanket reset would restore."""
    model = tiny_gpt2(resid_pdrop=0.2)
    model.train()
    model.transformer.h[0].mlp.eval()
    model.transformer.wte.weight.requires_grad_(False)
    model.transformer.h[1].attn.c_attn.weight.requires_grad_(False)
    model.transformer.h[1].register_forward_hook(lambda *_: None)
    return model


class TestEverythingIsGivenBack:
    @pytest.mark.parametrize("train_mode", [False, True])
    def test_after_success(self, uneven_model: PreTrainedModel, train_mode: bool) -> None:
        before = Snapshot(uneven_model)
        profile = profile_gradients(uneven_model, [token_batch([6])] * 2, train_mode=train_mode)
        before.assert_unchanged()
        assert profile.provenance.train_mode is train_mode

    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, MemoryError])
    def test_after_an_error_in_the_loader(
        self, uneven_model: PreTrainedModel, error: type[BaseException]
    ) -> None:
        def loader() -> Iterator[Batch]:
            yield token_batch([6])
            torch.rand(3)
            raise error("from the loader")

        before = Snapshot(uneven_model)
        with pytest.raises(error, match="from the loader"):
            profile_gradients(uneven_model, loader(), train_mode=True)
        before.assert_unchanged()

    @pytest.mark.parametrize("when", ["before", "after"])
    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, MemoryError])
    def test_after_an_error_in_the_loss(
        self, uneven_model: PreTrainedModel, error: type[BaseException], when: str
    ) -> None:
        def loss_fn(model: nn.Module, batch: Mapping[str, Any]) -> BatchLoss:
            if when == "after":
                model_loss(model, batch)
            raise error("from the loss")

        before = Snapshot(uneven_model)
        with pytest.raises(error, match="from the loss"):
            profile_gradients(uneven_model, [token_batch([6])], loss_fn=loss_fn, train_mode=True)
        before.assert_unchanged()

    def test_after_an_interrupt_in_the_backward_pass(self, uneven_model: PreTrainedModel) -> None:
        def stop(_gradient: Tensor) -> None:
            raise KeyboardInterrupt

        def loss_fn(model: nn.Module, batch: Mapping[str, Any]) -> BatchLoss:
            loss, count = model_loss(model, batch)
            loss.register_hook(stop)
            return BatchLoss(loss, count)

        before = Snapshot(uneven_model)
        with pytest.raises(KeyboardInterrupt):
            profile_gradients(uneven_model, [token_batch([6])], loss_fn=loss_fn)
        before.assert_unchanged()

    def test_progress_bar_stops_with_the_error(
        self,
        tiny_llama: PreTrainedModel,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes it for a terminal
        hide_cursor, show_cursor = "\x1b[?25l", "\x1b[?25h"

        def loss_fn(model: nn.Module, batch: Mapping[str, Any]) -> BatchLoss:
            raise ValueError("from the loss")

        with pytest.raises(ValueError, match="from the loss") as info:
            profile_gradients(tiny_llama, [token_batch([6])], loss_fn=loss_fn)
        shown = capsys.readouterr().err
        assert hide_cursor in shown, "the bar was shown"
        assert show_cursor in shown.rpartition(hide_cursor)[2]
        assert info.tb is not None, "still held, and with it every frame"

    def test_after_our_own_errors(self, uneven_model: PreTrainedModel) -> None:
        before = Snapshot(uneven_model)
        with pytest.raises(ProfileError):
            profile_gradients(uneven_model, [])
        with pytest.raises(TargetError):
            profile_gradients(uneven_model, [token_batch([6])], ["lm_head"])
        before.assert_unchanged()

    def test_an_earlier_gradient_is_left_alone(self, tiny_llama: PreTrainedModel) -> None:
        weight = tiny_llama.model.layers[0].mlp.up_proj.weight
        weight.grad = torch.ones_like(weight)
        profile_gradients(tiny_llama, [token_batch([6])])
        assert torch.equal(weight.grad, torch.ones_like(weight))


class TestModes:
    def test_dropout_is_off_by_default(self) -> None:
        model = tiny_gpt2(resid_pdrop=0.5).train()
        batches = [token_batch([6])]
        expected = autograd_gradients(model.eval(), batches)
        model.train()
        assert_gradients(measure(model, batches), expected, 1e-5)

    def test_dropout_can_be_on(self) -> None:
        model, batches = tiny_gpt2(resid_pdrop=0.5).eval(), [token_batch([6])]
        off, on = measure(model, batches), measure(model, batches, train_mode=True)
        assert off.gradients is not None and on.gradients is not None
        assert any(not torch.allclose(off.gradients[n], on.gradients[n]) for n in off.gradients)

    def test_same_call_same_numbers(self, tiny_llama: PreTrainedModel) -> None:
        batches = [token_batch([6, 4], seed=i) for i in range(2)]
        first, second = measure(tiny_llama, batches), measure(tiny_llama, batches)
        assert first.modules == second.modules
        assert first.gid == second.gid

    def test_works_where_gradients_are_switched_off(self, tiny_llama: PreTrainedModel) -> None:
        batches = [token_batch([6])]
        expected = autograd_gradients(tiny_llama, batches)
        with torch.no_grad():
            assert_gradients(measure(tiny_llama, batches), expected, 1e-5)


class TestHalfPrecision:
    def test_bf16_model_gives_fp32_statistics(self) -> None:
        model, batches = tiny_llama().to(torch.bfloat16), [token_batch([9, 6])]
        profile = measure(model, batches)
        assert profile.provenance.dtype == "bfloat16"
        assert profile.gradients is not None
        for name, gradient in profile.gradients.items():
            assert gradient.dtype == torch.float32
            # more digits than bf16 holds: the sums were not rounded on the way
            assert not torch.equal(gradient, gradient.to(torch.bfloat16).float()), name
            assert profile.singular_values[name].dtype == torch.float64

    def test_bf16_gid_is_close_to_fp32(self) -> None:
        model = tiny_llama(initializer_range=0.1).to(torch.bfloat16)
        batches = [token_batch([12, 12, 12, 12], seed=i) for i in range(4)]
        half, full = measure(model, batches), measure(model.float(), batches)
        for name, gid in full.gid.items():
            assert half.gid[name] == pytest.approx(gid, rel=0.05), name


class TestProvenance:
    def test_says_what_was_measured(self, llama_batches: list[Batch]) -> None:
        model = tiny_llama()
        profile = profile_gradients(model, llama_batches, batches=3)
        provenance = profile.provenance
        assert provenance.model == "LlamaForCausalLM"
        assert provenance.model_fingerprint == model_fingerprint(model)
        assert provenance.batches == 3
        assert provenance.batch_sizes == [2, 3, 1]
        assert provenance.tokens == 34 - 6
        assert provenance.dtype == "float32"
        assert provenance.train_mode is False
        assert provenance.seconds > 0
        assert {"python", "torch", "transformers"} <= set(provenance.versions)
        assert {entry.rows for entry in profile.modules.values()} == {2 * 9 + 3 * 7 + 3}
        assert profile.gradients is None

    def test_data_fingerprint_tells_data_apart(self, tiny_llama: PreTrainedModel) -> None:
        def fingerprint(*seeds: int) -> str:
            batches = [token_batch([5], seed=seed) for seed in seeds]
            return measure(tiny_llama, batches).provenance.data_fingerprint

        assert fingerprint(1, 2) == fingerprint(1, 2)
        assert len({fingerprint(1, 2), fingerprint(2, 1), fingerprint(1), fingerprint(1, 3)}) == 4

    @pytest.mark.parametrize(
        ("path", "name"),
        [("org/model-1B", "org/model-1B"), ("/home/someone/models/mine", "mine")],
    )
    def test_model_name_is_no_local_path(
        self, tiny_llama: PreTrainedModel, path: str, name: str
    ) -> None:
        tiny_llama.config._name_or_path = path
        assert measure(tiny_llama, [token_batch([5])]).provenance.model == name

    def test_text_shows_n_and_tokens(self, llama_batches: list[Batch]) -> None:
        text = str(profile_gradients(tiny_llama(), llama_batches, batches=3))
        assert "N = 3 batches, 28 tokens, float32" in text
        assert "self_attn.q_proj" in text


def test_classifier_batches_carry_classes() -> None:
    assert class_batch([3, 4])["labels"].shape == (2,)
