"""Mean gradients the slow way, and a profile to hold against them."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rankwise.profiling import GradientProfile, profile_gradients
from rankwise.targets import find_targets
from tiny_models import (
    ARCHITECTURES,
    IGNORED,
    Batch,
)

CHECKPOINTING = [None, {"use_reentrant": True}, {"use_reentrant": False}]
CHECKPOINTING_IDS = ["plain", "reentrant", "non-reentrant"]
ROWS = [[9, 6], [5, 4, 7], [3]]

CAUSAL = (
    "GPT2LMHeadModel", "LlamaForCausalLM", "MambaForCausalLM", "Phi3ForCausalLM",
    "Qwen3ForCausalLM",
)  # fmt: skip

architectures = pytest.mark.parametrize("architecture", list(ARCHITECTURES))


def labelled(model: nn.Module, batch: Batch) -> int:
    """Labels in the mean loss: causal models never predict a row's first token."""
    labels = batch["labels"][:, 1:] if type(model).__name__ in CAUSAL else batch["labels"]
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
