"""The memory estimate: its parts by hand, and how it answers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from rankwise.errors import ProfileError
from rankwise.profiling.memory import MemoryEstimate, available_memory, estimate_memory
from rankwise.targets import find_targets
from tiny_models import tiny_llama

TOKENS = 6


def estimate(model: nn.Module | None = None, **options: Any) -> MemoryEstimate:
    settings: dict[str, Any] = {"batches": 4, "tokens": TOKENS, "engine": "hooks"}
    return estimate_memory(model or tiny_llama(), **(settings | options))


def test_parts_by_hand() -> None:
    model = tiny_llama()
    shapes = find_targets(model).values()
    found = estimate(model)
    weights = sum(s.d_in * s.d_out for s in shapes)
    sides = sum(s.d_in + s.d_out for s in shapes)
    assert found.activations == 4 * TOKENS * sides
    assert found.sums == 4 * weights
    assert found.staged == 4 * sum(
        min(TOKENS * (s.d_in + s.d_out), s.d_in * s.d_out) for s in shapes
    )
    assert found.gram == found.layer_inputs == found.gradients == 0
    assert estimate(model, keep_gradients=True).total == found.total + 4 * weights


def test_gram_grows_with_batches_and_the_sweep_holds_one_layer() -> None:
    model = tiny_llama()
    layers = model.config.num_hidden_layers
    hooks = estimate(model, statistics=["gram"])
    assert estimate(model, statistics=["gram"], batches=8).gram == 2 * hooks.gram
    sweep = estimate(model, statistics=["gram"], engine="auto")
    assert sweep.engine == "sweep"
    assert sweep.gram * layers == hooks.gram
    assert sweep.layer_inputs == 4 * 4 * TOKENS * model.config.hidden_size * (layers + 1)
    assert sweep.sums == hooks.sums == 0


def test_the_sweep_is_compared_on_one_sample() -> None:
    model = tiny_llama()
    one, four = (
        estimate(model, engine="sweep", tokens=40, batches=1, samples=samples) for samples in (1, 4)
    )
    assert one.total == one.activations + one.logits
    assert four.total < one.total
    assert estimate(model, tokens=40, samples=4) == estimate(model, tokens=40)


def test_half_precision_halves_activations_not_sums() -> None:
    wide, half = estimate(), estimate(tiny_llama().to(torch.bfloat16))
    assert half.activations * 2 == wide.activations
    assert half.sums == wide.sums


def test_the_meta_device_is_enough() -> None:
    assert estimate(tiny_llama().to("meta")) == estimate()


def test_warning_names_what_to_change() -> None:
    found = estimate(statistics=["gram"], batches=1000)
    assert found.warning(None) is None
    assert found.warning(found.total) is None
    warning = found.warning(found.total - 1)
    assert warning is not None and "most of it is gram" in warning and "engine='sweep'" in warning
    assert "gram" in str(found) and "hooks" in str(found)
    assert "layer inputs" not in str(found)


def test_available_memory_of_this_machine() -> None:
    available = available_memory(torch.device("cpu"))
    assert available is None or 2**20 < available < 2**50
    assert available_memory(torch.device("meta")) is None


def test_unknown_statistic() -> None:
    with pytest.raises(ProfileError, match="did you mean 'gram'"):
        estimate(statistics=["grams"])
