"""Batch gradients and Gram matrices the slow way, and a profile to hold against them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rankwise.profiling import GradientProfile, profile_gradients
from rankwise.targets import find_targets
from tiny_models import ARCHITECTURES, Batch

ALL = ("mean", "gram", "fisher", "convergence")
ROWS = [[9, 6], [5, 4, 7], [3], [8, 8], [2, 6, 6]]


def gradient_of(module: nn.Module) -> Tensor:
    gradient = module.weight.grad
    return (gradient.T if isinstance(module, Conv1D) else gradient).clone()


def batch_gradients(model: nn.Module, batches: Sequence[Batch]) -> dict[str, list[Tensor]]:
    """Every target's `weight.grad` of each batch's own loss, in fp64."""
    model = copy.deepcopy(model).double().requires_grad_(True)
    found: dict[str, list[Tensor]] = {name: [] for name in find_targets(model)}
    for batch in batches:
        model.zero_grad()
        model(**batch).loss.backward()
        for name, gradients in found.items():
            gradients.append(gradient_of(model.get_submodule(name)))
    return found


def exact_gram(gradients: Sequence[Tensor]) -> Tensor:
    flat = torch.stack([gradient.flatten() for gradient in gradients])
    return flat @ flat.T / len(gradients)


def model_and_batches(architecture: str) -> tuple[PreTrainedModel, list[Batch]]:
    make_model, make_batch = ARCHITECTURES[architecture]
    return make_model(), [make_batch(rows, seed=i) for i, rows in enumerate(ROWS)]


def measure(model: nn.Module, batches: Sequence[Batch], **options: Any) -> GradientProfile:
    settings: dict[str, Any] = {"batches": len(batches), "statistics": ALL, "engine": "hooks"}
    return profile_gradients(model, batches, **(settings | options))


def assert_close(found: Tensor, expected: Tensor, rel: float) -> None:
    assert float((found - expected).norm()) <= rel * float(expected.norm())
