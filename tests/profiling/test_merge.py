"""Profiles of shards, merged, are the profile of all of the data."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from rankwise.errors import ProfileError
from rankwise.profiling import GradientProfile, profile_gradients
from tiny_models import ARCHITECTURES, Batch, tiny_llama, token_batch

ROWS = [[9, 6], [5, 4, 7], [3], [8, 8], [2, 6, 6]]


def measure(model: Any, batches: Sequence[Batch], **options: Any) -> GradientProfile:
    settings = {"batches": len(batches), "statistics": ("fisher",), "keep_gradients": True}
    return profile_gradients(model, batches, **(settings | options))


@pytest.mark.parametrize("engine", ["hooks", "sweep"])
@pytest.mark.parametrize("cuts", [(0, 5), (0, 2, 5), (0, 1, 4, 5)])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert-classifier"])
def test_equals_one_big_profile(
    architecture: str, cuts: Sequence[int], engine: str, tmp_path: Path
) -> None:
    make_model, make_batch = ARCHITECTURES[architecture]
    model, batches = make_model(), [make_batch(rows, seed=i) for i, rows in enumerate(ROWS)]
    whole = measure(model, batches, engine=engine)
    shards = []
    for i, (start, end) in enumerate(pairwise(cuts)):
        measure(model, batches[start:end], engine=engine).save(tmp_path / str(i))
        shards.append(GradientProfile.load(tmp_path / str(i)))
    merged = GradientProfile.merge(shards, model)
    assert list(merged.modules) == list(whole.modules)
    assert merged.gradients is not None and whole.gradients is not None
    for name, entry in whole.modules.items():
        found = merged.modules[name]
        for key in ("gradient_norm", "sensitivity", "fisher"):
            assert getattr(found, key) == pytest.approx(getattr(entry, key), rel=1e-5)
        for key in ("d_in", "d_out", "batches", "rows", "zero_batches"):
            assert getattr(found, key) == getattr(entry, key)
        assert merged.gid[name] == pytest.approx(whole.gid[name], rel=1e-4)
        error = (merged.gradients[name] - whole.gradients[name]).norm()
        assert float(error) <= 1e-5 * float(whole.gradients[name].norm())
    for key in ("batches", "batch_sizes", "batch_items", "tokens", "model_fingerprint", "engine"):
        assert getattr(merged.provenance, key) == getattr(whole.provenance, key)
    merged.save(tmp_path / "merged")
    assert GradientProfile.load(tmp_path / "merged").modules == merged.modules


def test_dropped_and_unlabelled_batches_keep_their_places() -> None:
    model = tiny_llama()
    profile = measure(model, [token_batch([5]), token_batch([4])])
    first = replace(
        profile, provenance=replace(profile.provenance, dropped_batches=[1], unlabelled_batches=[3])
    )
    merged = GradientProfile.merge([first, first], model)
    assert merged.provenance.dropped_batches == [1, 5]
    assert merged.provenance.unlabelled_batches == [3, 7]


def test_what_cannot_be_merged_is_said(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_llama()
    shards = [measure(model, [token_batch([5], seed=i)], statistics=("gram",)) for i in range(2)]
    with caplog.at_level(logging.WARNING):
        merged = GradientProfile.merge(shards, model)
    assert "leaves out Gram matrices" in caplog.text
    assert merged.gram is None and merged.convergence is None
    assert {entry.fisher for entry in merged.modules.values()} == {None}


def test_refusals() -> None:
    model = tiny_llama()
    good = measure(model, [token_batch([5])])
    with pytest.raises(ProfileError, match="no profile was given"):
        GradientProfile.merge([], model)
    with pytest.raises(ProfileError, match="profile 1 holds no gradients"):
        GradientProfile.merge([good, replace(good, gradients=None)], model)
    with pytest.raises(ProfileError, match="profile 1 has other modules than profile 0"):
        GradientProfile.merge([good, measure(model, [token_batch([5])], targets=["k_proj"])], model)
    with pytest.raises(ProfileError, match="profile 1 has train_mode True, profile 0 False"):
        GradientProfile.merge([good, measure(model, [token_batch([5])], train_mode=True)], model)
    with pytest.raises(ProfileError, match="profile 1 has model_fingerprint"):
        GradientProfile.merge([good, measure(tiny_llama(seed=1), [token_batch([5])])], model)
    with pytest.raises(ProfileError, match="pass the model they were measured on"):
        GradientProfile.merge([good, good], tiny_llama(seed=1))
    assert torch.is_grad_enabled()
