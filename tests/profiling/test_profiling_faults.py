from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from rankwise.errors import ProfileError
from rankwise.profiling import BatchLoss, GradientProfile, model_loss, profile_gradients
from tiny_models import (
    IGNORED,
    Batch,
    tiny_llama,
    token_batch,
)


def refuse() -> Iterator[Batch]:
    raise AssertionError("a batch too many was asked for")
    yield


class TestBadInput:
    @pytest.mark.parametrize("batches", [0, -1])
    def test_no_batch_asked_for(self, tiny_llama: PreTrainedModel, batches: int) -> None:
        with pytest.raises(ProfileError, match=f"batches={batches}"):
            profile_gradients(tiny_llama, [token_batch([5])], batches=batches)

    def test_the_name_of_a_model(self) -> None:
        with pytest.raises(ProfileError, match=r"as from_pretrained\(\) loads it, not a str"):
            profile_gradients("HuggingFaceTB/SmolLM2-135M", [token_batch([5])], batches=1)

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

    @pytest.mark.parametrize(
        "items", [torch.tensor(4), torch.tensor([4.0]), np.int64(4), np.float32(4), 4.0]
    )
    def test_items_of_another_type_become_a_whole_number(
        self, tiny_llama: PreTrainedModel, tmp_path: Path, items: Any
    ) -> None:
        def loss_fn(model: nn.Module, batch: Mapping[str, Any]) -> BatchLoss:
            return BatchLoss(model_loss(model, batch).loss, items)

        profile = profile_gradients(tiny_llama, [token_batch([5])], loss_fn=loss_fn, batches=1)
        profile.save(tmp_path / "profile")
        assert GradientProfile.load(tmp_path / "profile").provenance.batch_items == [4]

    @pytest.mark.parametrize(
        "items", [-1, 2.5, math.nan, torch.tensor(math.inf), torch.tensor([1, 2]), None, 10**400]
    )
    def test_items_that_are_no_count(self, tiny_llama: PreTrainedModel, items: Any) -> None:
        def loss_fn(model: nn.Module, batch: Mapping[str, Any]) -> BatchLoss:
            return BatchLoss(model_loss(model, batch).loss, items)

        with pytest.raises(ProfileError, match=r"batch 0: .*items=.*whole number of labelled"):
            profile_gradients(tiny_llama, [token_batch([5])], loss_fn=loss_fn)

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


def test_data_parallel_is_refused_with_the_way_out() -> None:
    with pytest.raises(ProfileError, match=r"model\.module.*torchrun"):
        profile_gradients(nn.DataParallel(tiny_llama()), [token_batch([4])])


@pytest.mark.parametrize(
    ("offload", "named"),
    [
        (lambda model: cpu_offload(model, "cpu"), r"embed_tokens\.weight"),
        (lambda model: model.to("meta"), r"embed_tokens\.weight"),
        (
            lambda model: cpu_offload(model.model.layers[1], "cpu"),
            r"layers\.1\.self_attn\.q_proj\.weight",
        ),
    ],
    ids=["all", "empty", "a target"],
)
def test_offloaded_weights_are_refused_before_the_first_batch(offload: Any, named: str) -> None:
    model = tiny_llama()
    offload(model)
    with pytest.raises(ProfileError, match=rf"{named} is on the meta device.*load the model whole"):
        profile_gradients(model, refuse())


@pytest.mark.filterwarnings("ignore")
def test_offloaded_layers_that_are_no_targets_are_measured_through(tmp_path: Path) -> None:
    targets = r"model\.layers\.0\..*_proj"
    places: dict[str, Any] = dict.fromkeys(["model.embed_tokens", "model.layers.0"], "cpu")
    places |= dict.fromkeys(["model.norm", "model.rotary_emb", "lm_head"], "cpu")
    places["model.layers.1"] = "disk"
    whole = profile_gradients(tiny_llama(), [token_batch([5])], targets, batches=1)
    model = dispatch_model(tiny_llama(), places, "cpu", offload_dir=tmp_path, force_hooks=True)
    found = profile_gradients(model, [token_batch([5])], targets, batches=1)
    assert found.modules == whole.modules
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
    ],
    ids=["python", "cuda", "cpu"],
)
def test_too_little_memory_names_what_needs_less(error: Exception) -> None:
    model = tiny_llama()
    before = [parameter.requires_grad for parameter in model.parameters()]

    def hungry(model: nn.Module, batch: Mapping[str, Any]) -> BatchLoss:
        model(**batch)
        raise error

    with pytest.raises(ProfileError, match=r"out of memory.*smaller batch.*engine='sweep'"):
        profile_gradients(model, [token_batch([4])], loss_fn=hungry)
    assert [parameter.requires_grad for parameter in model.parameters()] == before
    assert not any(module._forward_hooks for module in model.modules())


def test_another_runtime_error_stays_itself() -> None:
    def broken(model: nn.Module, batch: Mapping[str, Any]) -> BatchLoss:
        raise RuntimeError("a bug of the user's")

    with pytest.raises(RuntimeError, match="a bug of the user's"):
        profile_gradients(tiny_llama(), [token_batch([4])], loss_fn=broken)
