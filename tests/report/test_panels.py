"""The health panel and the serving panel: each verdict can turn out either way."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from rankwise.methods import Lora, RaLora, WaterFill
from rankwise.plan import AdapterKind, ModulePlan, RankPlan
from rankwise.profiling.profile import GradientProfile
from rankwise.report.health import health
from rankwise.report.load import SourceRun, report_of
from rankwise.report.panels import serving_table
from rankwise.report.plan_view import VLLM_RANKS, recorded_plan, view_of_plan
from rankwise.report.views import Report
from report_samples import make_profile, make_record


def verdicts(report: Report) -> dict[str, tuple[str, bool | None]]:
    return {check.what: (check.value, check.good) for check in health(report)}


def changed(profile: GradientProfile, **provenance: Any) -> GradientProfile:
    return replace(profile, provenance=replace(profile.provenance, **provenance))


def test_a_clean_profile_is_fine() -> None:
    found = verdicts(report_of(profiles=[make_profile()]))
    assert found["dropped batches"] == ("0 of 4", True)
    assert found["modules without gradient"] == ("0 of 7", True)
    assert found["dtype of the model"] == ("float32", True)
    assert found["enough batches"] == ("not measured", None)
    assert all(good is not False for _, good in found.values())


def test_what_is_wrong_with_a_profile_is_said() -> None:
    profile = make_profile()
    first, second, third, *_ = profile.modules
    modules = {
        **profile.modules,
        first: replace(profile.modules[first], gradient_norm=0.0, zero_batches=4),
        second: replace(profile.modules[second], zero_batches=1),
        third: replace(profile.modules[third], batches=3),
    }
    climbing = dict.fromkeys(modules, torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64))
    bad = changed(
        replace(profile, modules=modules, convergence=climbing),
        dropped_batches=[3],
        unlabelled_batches=[0, 5],
        dtype="bfloat16",
        train_mode=True,
    )
    found = verdicts(report_of(profiles=[bad]))
    assert found["dropped batches"] == ("1 of 7", False)
    assert found["batches without a label"] == ("2 of 7", False)
    assert found["modules without gradient"] == ("1 of 7", False)
    assert found["modules that some batches missed"] == ("2 of 7", False)
    assert found["dtype of the model"] == ("bfloat16", False)
    assert found["dropout while measuring"] == ("on", False)
    assert found["enough batches"] == ("profile more", False)


def test_what_does_not_belong_together_is_said() -> None:
    plan = Lora(r=2).plan(make_profile())
    one = SourceRun(make_record(plan), "a")
    same = verdicts(report_of(runs=[one, SourceRun(make_record(plan, seed=8), "b")]))
    assert same["base models"] == ("the same", True)
    assert same["package versions"] == ("torch 2.13.0", True)
    assert same["seeds"] == ("7 and 8", True)
    another = SourceRun(make_record(RaLora(r=2).plan(make_profile()), seed=8), "b")
    assert verdicts(report_of(runs=[one, another]))["seeds"] == ("7 and 8", False)
    other = make_record(plan, model_fingerprint="ff", versions={"torch": "2.8"}, commit="ab-dirty")
    mixed = verdicts(report_of(runs=[one, SourceRun(other, "b")]))
    assert mixed["base models"] == ("2 different", False)
    assert mixed["package versions"] == ("torch differ", False)
    assert mixed["seeds"] == ("7", False)
    assert mixed["commit"] == ("ab-dirty", False)


@pytest.mark.parametrize(
    ("rank", "needed"), [(1, 1), (2, 8), (8, 8), (9, 16), (257, 320), (512, 512), (513, None)]
)
def test_vllm_gets_the_smallest_rank_that_holds_it(rank: int, needed: int | None) -> None:
    assert VLLM_RANKS == (1, 8, 16, 32, 64, 128, 256, 320, 512)
    modules = {"a": ModulePlan(1024, 1024, rank)}
    view = view_of_plan(RankPlan("lora", "lora", rank, 16, None, modules)).serving
    assert (view.largest_rank, view.uneven, view.vllm_rank) == (rank, False, needed)


def test_serving_counts_blocks_as_rank_and_pads_uneven_ranks() -> None:
    modules = {"a": ModulePlan(64, 32, 4, 4), "b": ModulePlan(64, 64, 8, 1)}
    view = view_of_plan(RankPlan("ralora", "ralora", 4, 16, None, modules))
    assert view.serving.largest_rank == 16
    assert (view.serving.uneven, view.serving.adapter) == (True, "ralora")
    assert view.serving.padded_parameters == 16 * (64 + 32 + 64 + 64)
    assert "padded LoRA" in serving_table([view])
    even = view_of_plan(Lora(r=4).plan(make_profile()))
    assert "padded LoRA" not in serving_table([even])
    assert "--max-lora-rank" in serving_table([even])


@pytest.mark.parametrize(
    ("adapter", "export", "readers"),
    [
        ("lora", "as it is", "reads it as it is"),
        ("ralora", "plain LoRA of rank n × r, or merged weights", "after the export"),
        ("lr-lora", "merged weights, or what rankwise export approximates", "after the export"),
    ],
)
def test_serving_tells_adapters_of_equal_ranks_apart(
    adapter: AdapterKind, export: str, readers: str
) -> None:
    plan = replace(Lora(r=4).plan(make_profile()), adapter=adapter)
    kind = "lr-lora" if adapter == "lr-lora" else None
    record = make_record(plan, config={"adapter": {"kind": kind}})
    shown = serving_table([view_of_plan(plan)])
    assert f'data-label="export"><span>{export}</span>' in shown
    assert readers in shown
    if adapter != "ralora":  # a lone record of one block everywhere does not tell
        assert readers in serving_table([recorded_plan(record)])


def test_uniform_ranks_have_the_parameters_of_the_plan() -> None:
    plan = WaterFill(r=8, budget="r=3").plan(make_profile())
    view = view_of_plan(plan)
    assert view.even_rank == pytest.approx(
        plan.parameters / Lora(r=1).plan(make_profile()).parameters
    )
    assert 2.5 < view.even_rank <= 3


def test_energy_is_captured_only_where_the_profile_is_the_plans() -> None:
    profile = make_profile()
    lora = WaterFill(r=4).plan(profile)
    assert view_of_plan(lora, [profile]).captured is not None
    assert view_of_plan(lora).captured is None
    assert view_of_plan(lora, [changed(profile, model_fingerprint="ff")]).captured is None
    assert view_of_plan(lora, [make_profile(size=2)]).captured is None
    other = replace(
        changed(profile, data_fingerprint="ff"),
        singular_values={name: values * 0 + 1 for name, values in profile.singular_values.items()},
    )
    own = view_of_plan(lora, [profile]).captured
    assert view_of_plan(lora, [other]).captured != own
    assert view_of_plan(lora, [other, profile]).captured == own, "the profile it was made from"
    assert view_of_plan(RaLora(r=4).plan(profile), [profile]).captured is None
