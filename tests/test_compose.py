from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest
import torch

from rankwise.errors import PlanError
from rankwise.methods import Compose, Gard, LoraGid, RaLora, WaterFill
from rankwise.methods.compose import Estimator, Rule, Source
from rankwise.plan import RankPlan
from rankwise.profiling import GradientProfile, profile_gradients
from tiny_models import synthetic_profile, tiny_llama, token_batch


@pytest.fixture(scope="module")
def profile() -> GradientProfile:
    batches = [token_batch([9, 7], seed=seed) for seed in range(4)]
    return profile_gradients(
        tiny_llama(), batches, batches=4, statistics=("mean", "gram"), progress=False
    )


def ranks(plan: RankPlan) -> dict[str, int]:
    return {name: module.rank for name, module in plan.modules.items()}


@pytest.mark.parametrize("statistic", get_args(Source))
@pytest.mark.parametrize("estimator", get_args(Estimator))
@pytest.mark.parametrize("rule", get_args(Rule))
@pytest.mark.parametrize("adapter", ["lora", "ralora"])
def test_every_combination_keeps_the_budget(
    profile: GradientProfile, statistic: Source, estimator: Estimator, rule: Rule, adapter: str
) -> None:
    method = Compose(r=2, statistic=statistic, estimator=estimator, rule=rule, adapter=adapter)
    plan = method.plan(profile)
    assert (
        plan.parameters
        <= plan.budget
        == 2 * sum(module.shape.rank_cost for module in profile.modules.values())
    )
    assert plan.adapter == adapter
    if adapter == "ralora":
        assert max(module.blocks for module in plan.modules.values()) > 1


def test_it_contains_the_named_methods(profile: GradientProfile) -> None:
    gid = Compose(r=2, r_max=16).plan(profile)
    assert ranks(gid) == ranks(LoraGid(r=2, budget="exact").plan(profile))
    filled = Compose(r=2, r_min=0, rule="water-fill").plan(profile)
    assert ranks(filled) == ranks(WaterFill(r=2).plan(profile))
    blocks = Compose(r=2, rule="uniform", adapter="ralora").plan(profile)
    assert blocks.modules == RaLora(r=2).plan(profile).modules
    scores = Compose(statistic="gram", estimator="energy").scores(profile)
    assert scores == profile.energy_ranks()
    ours = ranks(Compose(r=4, statistic="gram", estimator="energy").plan(profile))
    theirs = ranks(Gard(r=4).plan(profile))
    assert all(abs(ours[name] - theirs[name]) <= 3 for name in ours)


def test_scores_by_hand() -> None:
    shapes = {"model.layers.0.q": (8, 8), "model.layers.3.q": (8, 8), "head": (8, 8)}
    names = list(shapes)
    profile = synthetic_profile(
        shapes, gid=dict(zip(names, (2, 4, 8), strict=True)), sensitivity=0.5
    )
    spectral = [2.0, 4.0, 8.0]
    for estimator in ("effective-rank", "stable-rank", "participation-ratio"):
        found = Compose(estimator=estimator).scores(profile)
        assert list(found.values()) == pytest.approx(spectral)
    assert list(Compose(estimator="energy").scores(profile).values()) == [2.0, 4.0, 8.0]
    assert list(Compose(estimator="depth").scores(profile).values()) == [1.0, 4.0, 1.0]
    assert list(Compose(estimator="sensitivity").scores(profile).values()) == [0.5] * 3
    norms = Compose(estimator="gradient-norm").scores(profile)
    assert list(norms.values()) == pytest.approx([2**0.5, 2.0, 8**0.5])


def test_random_is_the_seeds() -> None:
    profile = synthetic_profile({name: (8, 8) for name in "abc"})
    first, again, other = (Compose(estimator="random", seed=s).scores(profile) for s in (0, 0, 1))
    assert first == again != other


def test_the_gram_spectrum_is_that_of_the_matrix() -> None:
    profile = synthetic_profile({"a": (8, 8)})
    gram = {"a": torch.diag(torch.tensor([4.0, 1.0, 1.0], dtype=torch.float64))}
    scores = Compose(statistic="gram", estimator="stable-rank").scores(replace(profile, gram=gram))
    assert scores["a"] == pytest.approx(6 / 4)


@pytest.mark.parametrize("statistic", get_args(Source))
def test_a_profile_of_what_it_asks_for_is_enough(statistic: Source) -> None:
    method = Compose(r=2, statistic=statistic)
    profile = profile_gradients(
        tiny_llama(),
        [token_batch([6, 6], seed=i) for i in range(2)],
        batches=2,
        statistics=method.statistics,
        progress=False,
    )
    assert (profile.gram is not None) == (statistic == "gram")
    assert method.plan(profile).parameters


def test_a_profile_without_grams_is_refused() -> None:
    with pytest.raises(PlanError, match=r"needs the Gram matrices"):
        Compose(statistic="gram").plan(synthetic_profile({"a": (8, 8)}, gid=2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"estimator": "efective-rank"}, r"did you mean 'effective-rank'\?"),
        ({"statistic": "median"}, "statistic='median'"),
        ({"rule": "greedy"}, "rule='greedy'"),
        ({"adapter": "dora"}, r"did you mean '(lora|ralora)'\?"),
        ({"n_max": 3}, "power of two"),
    ],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Compose(**options)
