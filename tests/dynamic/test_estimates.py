"""A dynamic rule without a past and with a wide box plans what the static method plans."""

from __future__ import annotations

import pytest

from batch_reference import measure, model_and_batches
from rankwise import Compose, Gard, Lora, LoraGid, LsLora, RaLora, WaterFill
from rankwise.dynamic import DynamicOptions, RankController, estimate, rule_of
from rankwise.errors import PlanError
from rankwise.methods import Method

METHODS = [
    Gard(r=4, r_max=8),
    Gard(r=4, r_min=0, r_max=8, per_cost=True, energy=0.7),
    WaterFill(r=4, r_min=1, r_max=8),
    LsLora(r=4),
    LoraGid(r=4, r_max=8, budget="exact"),
    Compose(r=4, r_max=8),
    Compose(r=4, r_max=8, estimator="gradient-norm"),
    Compose(r=4, r_max=8, statistic="gram", estimator="stable-rank"),
    Compose(r=4, r_max=8, rule="uniform"),
    Compose(r=4, r_max=8, rule="smoothed", estimator="sensitivity"),
    Compose(r=4, r_max=8, rule="water-fill"),
]


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_dynamic_ranks_without_a_past_are_the_static_ones(method: Method) -> None:
    model, batches = model_and_batches("llama")
    profile = measure(model, batches, statistics=("mean", "gram"))
    static = method.plan(profile)
    start = Lora(r=4).plan(profile)
    shapes = {name: m.shape for name, m in start.modules.items()}
    options = DynamicOptions(beta=0.0, delta_max=100)
    control = RankController(rule_of(method), shapes, start.parameters, options)
    ranks = control.decide(control.start(start), estimate(method, profile)).state.ranks
    assert {n: r for n, r in ranks.items() if r} == {n: m.rank for n, m in static.modules.items()}
    assert len(set(ranks.values())) > 1 or method == Compose(r=4, r_max=8, rule="uniform")


@pytest.mark.parametrize("method", [Lora(r=4), RaLora(r=4), Compose(r=4, adapter="ralora")])
def test_methods_without_ranks_to_move_are_refused(method: Method) -> None:
    with pytest.raises(PlanError, match="cannot move ranks while training"):
        rule_of(method)


def test_gard_without_gram_matrices_is_refused() -> None:
    model, batches = model_and_batches("llama")
    with pytest.raises(PlanError, match="gard needs Gram matrices"):
        estimate(Gard(r=4), measure(model, batches, statistics=("mean",)))
