"""LS-LoRA, LoRA+GID, water-filling and the budget curve."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import get_peft_model

from rankwise.curve import budget_curve
from rankwise.errors import PlanError
from rankwise.methods import METHODS, LoraGid, LsLora, RaLoraPro, WaterFill
from rankwise.plan import RankPlan
from rankwise.profiling import GradientProfile, profile_gradients
from tiny_folder import save_tiny_llama
from tiny_models import synthetic_profile, tiny_llama, token_batch

SHAPES = {"a": (64, 64), "b": (256, 64), "c": (64, 64)}


def with_spectra(spectra: dict[str, list[float]]) -> GradientProfile:
    values = {}
    for name, (d_in, d_out) in SHAPES.items():
        full = torch.zeros(min(d_in, d_out), dtype=torch.float64)
        full[: len(spectra[name])] = torch.tensor(spectra[name], dtype=torch.float64)
        values[name] = full
    return replace(synthetic_profile(SHAPES), singular_values=values)


def ranks(plan: RankPlan) -> dict[str, int]:
    return {name: module.rank for name, module in plan.modules.items()}


class TestLsLora:
    @pytest.mark.parametrize("budget", ["exact", "paper"])
    def test_ranks_of_ralora_pro_in_one_block(self, budget: str) -> None:
        profile = synthetic_profile(SHAPES, gid=40, sensitivity={"a": 1.0, "b": 5.0, "c": 2.0})
        ours, pro = LsLora(budget=budget).plan(profile), RaLoraPro(budget=budget).plan(profile)
        assert ranks(ours) == ranks(pro)
        assert ours.adapter == "lora"
        assert {module.blocks for module in ours.modules.values()} == {1}


class TestLoraGid:
    def test_rank_is_the_dimension(self) -> None:
        plan = LoraGid().plan(synthetic_profile(SHAPES, gid={"a": 3, "b": 64, "c": 0}))
        assert ranks(plan) == {"a": 3, "b": 64, "c": 1}
        assert plan.budget is None
        assert plan.scaling == 2.0

    def test_a_fraction_rounds_up(self) -> None:
        profile = with_spectra({"a": [2.0, 1.0], "b": [1.0], "c": [1.0]})
        assert 1 < profile.gid["a"] < 2
        assert ranks(LoraGid().plan(profile)) == {"a": 2, "b": 1, "c": 1}

    def test_within_a_budget(self) -> None:
        profile = synthetic_profile(SHAPES, gid={"a": 10, "b": 10, "c": 40})
        plan = LoraGid(r=4, budget="exact").plan(profile)
        assert plan.budget == 4 * (128 + 320 + 128)
        assert plan.budget - plan.parameters < 128
        assert ranks(plan)["c"] > ranks(plan)["a"] == pytest.approx(ranks(plan)["b"], abs=1)


class TestWaterFill:
    def test_energy_goes_first(self) -> None:
        # one unit of rank costs 128, 320, 128; LoRA r = 1 has 576
        profile = with_spectra({"a": [1.0, 0.9], "b": [9.0], "c": [0.1]})
        assert ranks(WaterFill(r=1).plan(profile)) == {"b": 1, "a": 2}

    def test_captures_no_less_than_uniform(self) -> None:
        generator = torch.Generator().manual_seed(0)
        spectra = {
            name: sorted(torch.rand(64, generator=generator).pow(4).tolist(), reverse=True)
            for name in SHAPES
        }
        profile = with_spectra(spectra)
        for r in (1, 3, 8):
            best = WaterFill(r=r, r_max=64).plan(profile)
            filled = sum(sum(v**2 for v in spectra[n][:k]) for n, k in ranks(best).items())
            uniform = sum(sum(v**2 for v in values[:r]) for values in spectra.values())
            assert filled >= uniform
            assert best.parameters <= r * 576

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"r_min": -1}, "r_min=-1 must be a whole number of at least 0"),
            ({"r_min": 9}, "must hold"),
            ({"r_max": 0}, "r_max=0"),
            ({"r_max": 7}, "must hold"),
        ],
    )
    def test_bad_bounds(self, options: dict[str, int], message: str) -> None:
        with pytest.raises(PlanError, match=message):
            WaterFill(**options)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_plans_a_measured_model(name: str, tmp_path: Path) -> None:
    model = tiny_llama()
    profile = profile_gradients(model, [token_batch([9, 7])], batches=1, progress=False)
    plan = METHODS[name](r=2).plan(profile)
    plan.check_fits(model)
    plan.save(tmp_path / "plan.json")
    assert RankPlan.load(tmp_path / "plan.json") == plan
    if plan.budget is not None:
        assert plan.parameters <= plan.budget
    if plan.adapter == "lora":
        adapted = get_peft_model(model, plan.to_lora_config())
        trainable = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
        assert trainable == plan.parameters


def test_a_plan_works_without_rankwise(tmp_path: Path) -> None:
    """Plain PEFT, in a process that cannot import rankwise, gives every module rank and scale."""
    folder = save_tiny_llama(tmp_path / "model")
    model = tiny_llama(vocab_size=300)
    profile = profile_gradients(model, [token_batch([9, 7])], batches=1, progress=False)
    plan = WaterFill(r=2).plan(profile)
    assert len(set(ranks(plan).values())) > 2
    plan.to_lora_config().save_pretrained(tmp_path / "config")
    code = f"""
import json, sys, warnings
sys.modules["rankwise"] = None
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
import torch
warnings.simplefilter("error", RuntimeWarning)
model = get_peft_model(AutoModelForCausalLM.from_pretrained({str(folder)!r}),
                       LoraConfig.from_pretrained({str(tmp_path / "config")!r}))
found = {{name.removeprefix("base_model.model."): (module.r["default"], module.scaling["default"])
         for name, module in model.named_modules() if hasattr(module, "lora_A")
         and "default" in getattr(module, "r", {{}})}}
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
ids = torch.arange(3, 12)[None]
losses = []
for _ in range(3):
    loss = model(input_ids=ids, labels=ids).loss
    losses.append(loss.item())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
assert losses[-1] < losses[0]
model.save_pretrained({str(tmp_path / "adapter")!r})
print(json.dumps(found))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    expected = {name: [module.rank, plan.scaling] for name, module in plan.modules.items()}
    assert {name: [r, pytest.approx(s)] for name, (r, s) in found.items()} == expected
    assert (tmp_path / "adapter/adapter_model.safetensors").is_file()


class TestBudgetCurve:
    def test_by_hand(self) -> None:
        profile = with_spectra({"a": [1.0, 1.0], "b": [1.0, 1.0], "c": [1.0, 1.0]})
        curve = budget_curve(profile, ranks=[1, 2, 4])
        assert [point.parameters for point in curve.points] == [576, 1152, 2304]
        assert [point.uniform for point in curve.points] == pytest.approx([1 / 2, 1.0, 1.0])
        # 576 pay for the four cheap directions at 128 each
        assert [point.water_fill for point in curve.points] == pytest.approx([4 / 6, 1.0, 1.0])
        assert curve.knee.r == 2

    def test_never_below_uniform_and_rising(self) -> None:
        model = tiny_llama()
        profile = profile_gradients(model, [token_batch([9, 7])], batches=1, progress=False)
        points = budget_curve(profile).points
        assert [point.r for point in points] == [1, 2, 4, 8]
        for point in points:
            assert point.water_fill >= point.uniform - 1e-12
        shares = [point.water_fill for point in points]
        assert shares == sorted(shares)
        assert shares[-1] <= 1 + 1e-12

    def test_words(self) -> None:
        flat = with_spectra({name: [1.0] * 64 for name in SHAPES})
        assert "ask for more rank" in budget_curve(flat, ranks=[1, 8, 32]).recommendation()
        steep = with_spectra({name: [1.0, 1e-3] for name in SHAPES})
        text = budget_curve(steep).recommendation()
        assert text.startswith("r = 1 (576 parameters) can capture 100.0% of the gradient energy")
        assert "doubling it would add 0.0 percentage points" in text

    def test_table(self) -> None:
        text = str(budget_curve(with_spectra({name: [1.0] for name in SHAPES}), ranks=[1, 2]))
        assert "water-fill" in text and "100.0%" in text

    @pytest.mark.parametrize("bad", [[], [0], [-1, 2]])
    def test_bad_ranks(self, bad: list[int]) -> None:
        with pytest.raises(PlanError, match="at least 1"):
            budget_curve(with_spectra({name: [1.0] for name in SHAPES}), ranks=bad)


def test_diff_of_two_plans() -> None:
    profile = synthetic_profile(SHAPES, gid=40, sensitivity={"a": 1.0, "b": 5.0, "c": 1.0})
    one, other = LsLora().plan(profile), RaLoraPro().plan(profile)
    text = one.diff(other)
    assert "3 of 3 modules differ" in text
    assert "n=4" in text or "n=8" in text or "n=2" in text
    assert one.diff(one).startswith("the same adapters in all 3 modules")
    left_out = WaterFill(r=1).plan(with_spectra({"a": [1.0], "b": [9.0], "c": [0.0]}))
    assert math.isclose(left_out.parameters, 576, rel_tol=0.5)
