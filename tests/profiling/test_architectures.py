"""Every statistic of every architecture against autograd in fp64, by both engines."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from batch_reference import exact_gram, gradient_of
from gradient_reference import CAUSAL, CHECKPOINTING, CHECKPOINTING_IDS, architectures, labelled
from rankwise.profiling import profile_gradients
from rankwise.targets import find_targets, linear_weight
from sweep_reference import precisions
from tiny_models import ARCHITECTURES, IGNORED, Batch

ROWS = [[9, 6], [5, 4, 7], [4]]
Gradients = dict[str, Tensor]


@dataclass
class Reference:
    """What autograd says about one module, from whole batches and from single samples."""

    mean: Tensor
    gram: Tensor
    fisher: float
    sensitivity: float
    rows: int


def exact_causal_loss(logits: Tensor, labels: Tensor, vocab_size: int, **_: Any) -> Tensor:
    """transformers' causal loss in the model's dtype; its own is in fp32, whatever the model."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def model_and_batches(architecture: str, dtype: torch.dtype) -> tuple[PreTrainedModel, list[Batch]]:
    make_model, make_batch = ARCHITECTURES[architecture]
    model = make_model().to(dtype)
    if dtype == torch.float64 and type(model).__name__ in CAUSAL:
        model.loss_function = exact_causal_loss
    return model, [make_batch(rows, seed=i) for i, rows in enumerate(ROWS)]


@contextmanager
def no_rounding_inside(dtype: torch.dtype) -> Iterator[None]:
    """Let an fp64 model be one: norms of transformers round to fp32 whatever the model's dtype.

    Single samples are else rounded otherwise than in their batch, which shows in the Fisher
    information.
    """
    with pytest.MonkeyPatch.context() as patch:
        if dtype == torch.float64:
            patch.setattr(torch, "float32", torch.float64)
            patch.setattr(Tensor, "float", Tensor.double)
        yield


def weight_gradients(model: nn.Module, batch: Batch) -> Gradients:
    model.zero_grad()
    with no_rounding_inside(model.dtype):
        model(**batch).loss.backward()
    return {name: gradient_of(model.get_submodule(name)) for name in find_targets(model)}


def row_counter(rows: dict[str, int], name: str) -> Callable[[nn.Module, Any], None]:
    def count(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        rows[name] += inputs[0][..., 0].numel()

    return count


def only_row(batch: Batch, row: int) -> Batch:
    labels = torch.full_like(batch["labels"], IGNORED)
    labels[row] = batch["labels"][row]
    return batch | {"labels": labels}


@functools.cache
def reference(architecture: str) -> dict[str, Reference]:
    model, batches = model_and_batches(architecture, torch.float64)
    rows = dict.fromkeys(find_targets(model), 0)
    handles = [model.get_submodule(n).register_forward_pre_hook(row_counter(rows, n)) for n in rows]
    whole = [weight_gradients(model, batch) for batch in batches]
    for handle in handles:
        handle.remove()
    items = [labelled(model, batch) for batch in batches]
    # in the company of its batch: some models round to fp32 inside, as the company has it
    samples = [only_row(batch, i) for batch in batches for i in range(len(batch["labels"]))]
    single = [(labelled(model, sample), weight_gradients(model, sample)) for sample in samples]
    found = {}
    for name in rows:
        gradients = [gradients[name] for gradients in whole]
        mean = sum(g * (n / sum(items)) for g, n in zip(gradients, items, strict=True))
        # of the loss summed over the sample's items
        squares = [float((gradients[name] * n).square().mean()) for n, gradients in single]
        weight = linear_weight(model.get_submodule(name))
        found[name] = Reference(
            mean,
            exact_gram(gradients),
            sum(squares) / len(squares),
            float((weight * mean).abs().mean()),
            rows[name],
        )
    return found


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("engine", ["hooks", "sweep"])
@pytest.mark.parametrize("checkpointing", CHECKPOINTING, ids=CHECKPOINTING_IDS)
@precisions
@architectures
def test_every_statistic(
    architecture: str,
    dtype: torch.dtype,
    rel: float,
    checkpointing: dict[str, bool] | None,
    engine: str,
) -> None:
    model, batches = model_and_batches(architecture, dtype)
    expected = reference(architecture)
    calls = dict.fromkeys(expected, 0)
    if checkpointing is not None:
        # transformers checkpoints in training mode only; the models have no dropout
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
        for name in calls:
            model.get_submodule(name).register_forward_pre_hook(counting_hook(calls, name))
    switches = [getattr(m, "gradient_checkpointing", None) for m in model.modules()]
    with no_rounding_inside(dtype):
        profile = profile_gradients(
            model,
            batches,
            batches=len(batches),
            statistics=("gram", "fisher"),
            keep_gradients=True,
            engine=engine,
            train_mode=checkpointing is not None,
        )
    assert profile.provenance.engine == engine
    assert list(profile.modules) == list(expected)
    assert profile.gram is not None and profile.gradients is not None
    for name, truth in expected.items():
        entry = profile.modules[name]
        norm = float(truth.mean.norm())
        assert float((profile.gradients[name] - truth.mean).norm()) <= rel * norm
        assert float((profile.gram[name] - truth.gram).norm()) <= rel * float(truth.gram.norm())
        assert entry.gradient_norm == pytest.approx(norm, rel=rel)
        assert entry.fisher == pytest.approx(truth.fisher, rel=rel)
        assert entry.sensitivity == pytest.approx(truth.sensitivity, rel=rel)
        assert (entry.rows, entry.batches, entry.zero_batches) == (truth.rows, len(batches), 0)
    assert [getattr(m, "gradient_checkpointing", None) for m in model.modules()] == switches
    if checkpointing is not None and engine == "hooks":
        recomputed = [name for name, count in calls.items() if count == 2 * len(batches)]
        assert len(recomputed) >= len(calls) - 1  # BERT's pooler is outside the layers


def counting_hook(calls: dict[str, int], name: str) -> Callable[[nn.Module, object], None]:
    def count(_module: nn.Module, _inputs: object) -> None:
        calls[name] += 1

    return count
