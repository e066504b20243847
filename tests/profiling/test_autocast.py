"""A caller's autocasting changes what the model computes, not what is made of it."""

from __future__ import annotations

from collections import defaultdict

import pytest
import torch
from torch import Tensor

from dynamic_runs import attached
from gradient_reference import measure
from rankwise.dynamic.window import Window
from rankwise.profiling import GradientProfile, Statistic
from rankwise.profiling.statistics import StreamingStatistics
from tiny_models import Batch, tiny_llama, token_batch

BATCHES = [token_batch([9, 6], seed=1), token_batch([5, 4, 6], seed=2)]
FEW_TOKENS = [token_batch([3], seed=1), token_batch([4], seed=2)]

autocast = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
Products = dict[str, list[Tensor]]


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> Products:
    """Name -> `g' x` in fp64 of each batch, of what the statistics were given."""
    found: Products = defaultdict(list)
    plain = StreamingStatistics.consume

    def noted(self: StreamingStatistics, name: str, x: Tensor, g: Tensor) -> None:
        with torch.autocast("cpu", enabled=False):
            found[name].append(g.flatten(0, -2).double().T @ x.flatten(0, -2).double())
        plain(self, name, x, g)

    monkeypatch.setattr(StreamingStatistics, "consume", noted)
    return found


def assert_exact(profile: GradientProfile, products: Products) -> None:
    assert profile.gradients is not None
    items = profile.provenance.batch_items
    for name, gradient in profile.gradients.items():
        parts = products[name]
        assert len(parts) == len(items)
        mean = sum(n * part for n, part in zip(items, parts, strict=True)) / sum(items)
        scale = float(mean.norm())
        assert gradient.dtype == torch.float32
        assert float((gradient - mean).norm()) <= 1e-6 * scale, name
        spectrum = torch.linalg.svdvals(mean)
        assert float((profile.singular_values[name] - spectrum).norm()) <= 1e-6 * scale, name
        if profile.gram is not None:
            rows = torch.stack(parts).flatten(1)
            gram = rows @ rows.T / len(items)
            assert float((profile.gram[name] - gram).norm()) <= 1e-6 * float(gram.norm()), name


@autocast
@pytest.mark.parametrize("engine", ["hooks", "sweep"])
@pytest.mark.parametrize("statistics", [("mean",), ("mean", "gram")])
@pytest.mark.parametrize("batches", [BATCHES, FEW_TOKENS], ids=["sum", "tokens"])
def test_statistics_are_those_of_fp64(
    products: Products,
    batches: list[Batch],
    statistics: tuple[str, ...],
    engine: str,
    dtype: torch.dtype,
) -> None:
    with torch.autocast("cpu", dtype):
        profile = measure(tiny_llama(), batches, statistics=statistics, engine=engine)
    assert profile.provenance.engine == engine
    assert_exact(profile, products)


def test_fisher_information_is_that_without() -> None:
    model = tiny_llama().bfloat16()  # which autocasting leaves alone
    plain = measure(model, BATCHES, statistics=("mean", "fisher"))
    with torch.autocast("cpu", torch.bfloat16):
        cast = measure(model, BATCHES, statistics=("mean", "fisher"))
    for name, entry in plain.modules.items():
        assert cast.modules[name].fisher == pytest.approx(entry.fisher, rel=1e-6), name
        assert cast.modules[name].sensitivity == pytest.approx(entry.sensitivity, rel=1e-6), name


@pytest.mark.parametrize("wanted", [("mean",), ("mean", "gram")])
@pytest.mark.parametrize("batches", [BATCHES, FEW_TOKENS], ids=["sum", "tokens"])
def test_the_window_of_a_training_too(
    products: Products, batches: list[Batch], wanted: tuple[Statistic, ...]
) -> None:
    model, plan = attached()
    shapes = {name: module.shape for name, module in plan.modules.items()}
    window = Window(model.get_base_model(), shapes, wanted)
    with torch.autocast("cpu", torch.bfloat16):
        for batch in batches:
            window.begin_batch()
            model(**batch).loss.backward()
            window.end_batch()
        window.close()
        profile = window.finish("tiny")
    assert profile is not None
    assert_exact(profile, products)
