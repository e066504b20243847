"""Profiles by the sweep, held against those by hooks."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from rankwise.profiling import GradientProfile, profile_gradients
from tiny_models import ARCHITECTURES, Batch

ALL = ("mean", "gram", "fisher", "convergence")
ROWS = [[9, 6], [5, 4, 7], [3], [8, 8]]

precisions = pytest.mark.parametrize(
    ("dtype", "rel"), [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=["fp32", "fp64"]
)


def model_and_batches(architecture: str, **options: Any) -> tuple[PreTrainedModel, list[Batch]]:
    make_model, make_batch = ARCHITECTURES[architecture]
    return make_model(**options), [make_batch(rows, seed=i) for i, rows in enumerate(ROWS)]


def measure(model: nn.Module, batches: Sequence[Any], **options: Any) -> GradientProfile:
    settings: dict[str, Any] = {
        "batches": len(batches),
        "statistics": ALL,
        "engine": "sweep",
        "keep_gradients": True,
    }
    return profile_gradients(model, batches, **(settings | options))


def assert_same(found: GradientProfile, expected: GradientProfile, rel: float) -> None:
    assert list(found.modules) == list(expected.modules)
    for name, entry in found.modules.items():
        other = expected.modules[name]
        assert entry.gradient_norm == pytest.approx(other.gradient_norm, rel=rel)
        assert entry.sensitivity == pytest.approx(other.sensitivity, rel=rel)
        if entry.fisher is not None:
            assert entry.fisher == pytest.approx(other.fisher, rel=rel)
        for count in ("rows", "batches", "zero_batches"):
            assert getattr(entry, count) == getattr(other, count)
    for attribute in ("singular_values", "gradients", "gram", "convergence"):
        arrays, others = getattr(found, attribute), getattr(expected, attribute)
        assert (arrays is None) == (others is None)
        for name in arrays or ():
            error = float((arrays[name] - others[name]).norm())
            assert error <= rel * float(others[name].norm()), (attribute, name)
    for key in ("batches", "batch_sizes", "batch_items", "tokens", "data_fingerprint",
                "dropped_batches", "unlabelled_batches"):  # fmt: skip
        assert getattr(found.provenance, key) == getattr(expected.provenance, key)


def assert_falls_back(
    model: nn.Module, batches: Sequence[Any], reason: str, caplog: Any, **options: Any
) -> None:
    for engine, level in (("auto", "INFO"), ("sweep", "WARNING")):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            found = measure(model, batches, engine=engine, **options)
        messages = [r for r in caplog.records if "the layer sweep does not fit" in r.message]
        assert [record.levelname for record in messages] == [level]
        assert reason in messages[0].message
        assert found.provenance.engine == "hooks"
        assert_same(found, measure(model, batches, engine="hooks", **options), 1e-5)


class Stack(nn.Module):
    """Linear layers in a row, with the ways out of the row that a flag asks for."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.before = nn.Linear(4, 6)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(3))
        self.gate = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, labels: Tensor) -> Any:
        h = F.pad(x, (0, 2)) if self.way != "target before" else self.before(x)
        seen = []
        for layer in self.layers:
            h = layer(h)
            seen.append(h)
            if self.way == "between":
                h = torch.sin(h)
        if self.way == "twice":
            h = self.layers[0](h)
        if self.way == "from the middle":
            h = h + 0.01 * seen[0]
        return type("Output", (), {"loss": F.cross_entropy(h, labels)})
