"""Boxes around an earlier plan, ranks decided beforehand, and what a plan says of itself."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rankwise.allocation import box_limits, fix_limits
from rankwise.errors import PlanError
from rankwise.methods import Compose, Gard, Lora, LsLora, Method, RaLoraPro, WaterFill
from rankwise.plan import RankPlan
from rankwise.profiling import GradientProfile
from rankwise.targets import count_parameters
from tiny_models import synthetic_profile, tiny_gpt2, tiny_llama

SHAPES = {f"layers.{i}.{kind}": (64, 64) for i in range(3) for kind in ("q", "v", "out")}
SHAPES["layers.0.up"] = (64, 256)


def measured(seed: int = 0) -> GradientProfile:
    """A profile with spectra, Gram matrices and sensitivities that differ between modules."""
    generator = torch.Generator().manual_seed(seed)
    plain = synthetic_profile(
        SHAPES,
        sensitivity={
            name: float(value)
            for name, value in zip(
                SHAPES, torch.rand(len(SHAPES), generator=generator) + 0.1, strict=True
            )
        },
    )
    spectra, grams = {}, {}
    n = 12
    for name, values in plain.singular_values.items():
        power = 0.2 + 2 * float(torch.rand((), generator=generator))
        spectra[name] = torch.arange(1, len(values) + 1, dtype=torch.float64) ** -power
        gradients = torch.randn(n, 9, generator=generator, dtype=torch.float64)
        gradients *= torch.arange(1, 10) ** -power
        grams[name] = gradients @ gradients.T / n
    return replace(plain, singular_values=spectra, gram=grams)


def ranks(plan: RankPlan) -> dict[str, int]:
    return {name: plan.modules[name].rank if name in plan.modules else 0 for name in SHAPES}


METHODS = {
    "gard": Gard(r_min=0),
    "ls-lora": LsLora(),
    "ralora-pro": RaLoraPro(),
    "water-fill": WaterFill(),
    "compose": Compose(estimator="stable-rank", rule="proportional"),
}


class TestBoxLimits:
    def test_the_box_is_within_the_limits(self) -> None:
        found = box_limits({"a": (1, 16), "b": (1, 16), "c": (0, 4)}, {"a": 8, "b": 15}, 2)
        assert found == {"a": (6, 10), "b": (13, 16), "c": (0, 2)}

    def test_an_old_rank_outside_gives_the_nearest_limit(self) -> None:
        assert box_limits({"a": (4, 8)}, {"a": 20}, 2) == {"a": (8, 8)}
        assert box_limits({"a": (4, 8)}, {"a": 0}, 2) == {"a": (4, 4)}

    def test_a_module_of_another_model(self) -> None:
        with pytest.raises(PlanError, match=r"adapts 'layer\.a'"):
            box_limits({"layers.a": (0, 4)}, {"layer.a": 2}, 2)


LIMITS = {"a.proj": (0, 8), "b.proj": (0, 8), "proj": (0, 8), "b.projector": (0, 8)}
CAPS = dict.fromkeys(LIMITS, 32)


class TestFixLimits:
    def test_a_name_stands_for_its_endings_and_the_longest_decides(self) -> None:
        found = fix_limits(LIMITS, {"b.proj": 3, "proj": 5}, CAPS)
        assert found == {
            "a.proj": (5, 5),
            "b.proj": (3, 3),
            "proj": (5, 5),
            "b.projector": (0, 8),
        }

    def test_a_name_is_taken_literally(self) -> None:
        with pytest.raises(PlanError, match="matches no module"):
            fix_limits(LIMITS, {".*": 3}, CAPS)
        with pytest.raises(PlanError, match="projector"):
            fix_limits(LIMITS, {"projectr": 3}, CAPS)

    @pytest.mark.parametrize("rank", [-1, 33])
    def test_a_rank_that_does_not_fit(self, rank: int) -> None:
        with pytest.raises(PlanError, match=rf"rank {rank} of a\.proj must be from 0 to"):
            fix_limits(LIMITS, {"proj": rank}, CAPS)


@pytest.mark.parametrize("name", METHODS)
class TestEveryBudgetedMethod:
    def test_stays_in_the_box_and_the_budget(self, name: str) -> None:
        method, profile = METHODS[name], measured()
        before = method.plan(profile)
        after = replace(method, around=before, delta=1).plan(measured(seed=1))
        old, new = ranks(before), ranks(after)
        assert all(abs(new[module] - old[module]) <= 1 for module in SHAPES)
        assert after.parameters <= after.budget
        free = method.plan(measured(seed=1))
        assert any(abs(ranks(free)[module] - old[module]) > 1 for module in SHAPES)

    def test_takes_the_earlier_plan_from_its_file(self, name: str, tmp_path: Path) -> None:
        method = METHODS[name]
        before = method.plan(measured())
        before.save(tmp_path / "plan.json")
        by_file = replace(method, around=str(tmp_path / "plan.json"), delta=1)
        by_plan = replace(method, around=before, delta=1)
        assert ranks(by_file.plan(measured(1))) == ranks(by_plan.plan(measured(1)))

    def test_keeps_fixed_ranks_and_spends_the_rest(self, name: str) -> None:
        method, profile = METHODS[name], measured()
        plan = replace(method, fixed={"v": 5, "layers.0.up": 4}).plan(profile)
        found = ranks(plan)
        assert [found[f"layers.{i}.v"] for i in range(3)] == [5, 5, 5]
        assert found["layers.0.up"] == 4
        assert plan.parameters <= plan.budget
        assert plan.budget - plan.parameters < 128

    def test_fixed_ranks_over_the_budget_state_the_range(self, name: str) -> None:
        with pytest.raises(PlanError, match=r"infeasible.* take from \d+ to \d+"):
            replace(METHODS[name], fixed={"layers.0.up": 64}, budget=2_000).plan(measured())


@pytest.mark.parametrize("option", [{"delta": 0}, {"fixed": {"v": 1.5}}, {"around": 3}])
def test_options_of_the_wrong_kind(option: dict[str, object]) -> None:
    with pytest.raises(PlanError, match=next(iter(option))):
        WaterFill(**option)


class TestWords:
    def test_the_verdict_of_equal_ranks(self) -> None:
        assert "the same rank in every module" in Lora().plan(measured()).verdict()

    def test_the_verdict_counts_what_moved(self) -> None:
        plan = replace(
            WaterFill(r=4).plan(measured()), captured=0.5, captured_by_uniform=0.25, left_out={}
        )
        costs = {name: module.shape.rank_cost for name, module in plan.modules.items()}
        even = plan.parameters / sum(costs.values())
        moved = sum(max(m.rank - even, 0) * costs[n] for n, m in plan.modules.items())
        text = plan.verdict()
        assert f"{moved / plan.parameters:.0%} of the parameters" in text
        assert "can hold 50.0% of the measured gradient energy, uniform ones 25.0%" in text
        assert "\n" not in text

    def test_captured_energy_is_that_of_the_spectra(self) -> None:
        profile = measured()
        plan = WaterFill(r=4).plan(profile)
        energy = {name: values**2 for name, values in profile.singular_values.items()}
        total = sum(float(e.sum()) for e in energy.values())
        held = sum(float(energy[n][: m.rank].sum()) for n, m in plan.modules.items())
        assert plan.captured == pytest.approx(held / total)
        assert plan.captured >= plan.captured_by_uniform

    def test_the_table_ends_with_totals_and_verdict(self) -> None:
        plan = WaterFill(r=4).plan(measured())
        *_, totals, verdict = str(plan).splitlines()
        assert f"{plan.parameters:,} trainable parameters of {plan.budget:,}" in totals
        assert verdict == plan.verdict()

    def test_less_than_one_rank_a_module(self) -> None:
        plan = WaterFill(budget=128).plan(measured())
        assert len(plan.modules) == 1
        assert "1 module, 128 trainable parameters" in str(plan)
        assert "less than r = 1 everywhere" in plan.verdict()

    def test_markdown_holds_verdict_totals_and_every_rank(self) -> None:
        plan = WaterFill(r=4).plan(measured())
        text = plan.to_markdown()
        assert plan.verdict() in text
        rows = [line for line in text.splitlines() if line.startswith("|")]
        assert len(rows) == 2 + 3  # head, rule, one row a layer
        assert all(row.count("|") == rows[0].count("|") for row in rows)
        for module in plan.modules.values():
            assert f"r={module.rank}" in text


class TestCountParameters:
    def test_of_a_model(self) -> None:
        model = tiny_llama()
        assert count_parameters(model) == sum(p.numel() for p in model.parameters())

    def test_tied_weights_count_once(self) -> None:
        model = tiny_gpt2()
        assert model.lm_head.weight is model.transformer.wte.weight
        distinct = {id(p): p.numel() for p in model.parameters()}
        assert count_parameters(model) == sum(distinct.values())


THREADS = """
import json, sys, torch
sys.path.insert(0, sys.argv[1])
torch.set_num_threads(int(sys.argv[2]))
from test_boxes import METHODS, measured, ranks
print(json.dumps({name: ranks(m.plan(measured())) for name, m in METHODS.items()}))
"""


def test_plans_are_the_same_on_any_number_of_threads() -> None:
    def planned(threads: str) -> str:
        tests = str(Path(__file__).parent)
        return subprocess.run(
            [sys.executable, "-W", "ignore", "-c", THREADS, tests, threads],
            env=os.environ | {"OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads},
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    assert planned("1") == planned("2")


def test_ties_go_by_name_whatever_the_order() -> None:
    method: Method = WaterFill(budget=128 * 4, r_min=0)
    even = synthetic_profile({name: (64, 64) for name in "dacb"})
    flat = {name: torch.ones(64, dtype=torch.float64) for name in "dacb"}
    plan = method.plan(replace(even, singular_values=flat))
    assert {name: module.rank for name, module in plan.modules.items()} == dict.fromkeys("dacb", 1)
    fewer = replace(method, budget=128 * 2).plan(replace(even, singular_values=flat))
    assert set(fewer.modules) == {"a", "b"}
