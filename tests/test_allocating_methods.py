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

from rankwise.curve import BudgetCurve, BudgetPoint, budget_curve
from rankwise.errors import PlanError
from rankwise.methods import METHODS, Compose, Gard, Lora, LoraGid, LsLora, RaLoraPro, WaterFill
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
    batches = [token_batch([9, 7], seed=seed) for seed in range(3)]
    profile = profile_gradients(
        model, batches, batches=3, statistics=METHODS[name]().statistics, progress=False
    )
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
        assert "ask for more rank" in budget_curve(flat, ranks=[8, 16, 32]).recommendation()
        steep = with_spectra({name: [1.0, 1e-3] for name in SHAPES})
        text = budget_curve(steep).recommendation()
        assert text.startswith("r = 1 (576 parameters, budget=r=1) can capture 100.0% of the grad")
        assert "doubling the budget once more would add 0.0 percentage points" in text

    def test_the_knee_is_farthest_from_the_chord(self) -> None:
        shares = (0.5, 0.7, 0.85, 0.88, 0.9)  # 0.1 a doubling on average
        points = tuple(BudgetPoint(2**i, 2**i, s, s) for i, s in enumerate(shares))
        curve = BudgetCurve(points, batches=4)
        assert curve.average_gain == pytest.approx(0.1)
        assert curve.knee.r == 4
        assert "r = 4 (4 parameters, budget=r=4) can capture 85.0%" in curve.recommendation()

    def test_table(self) -> None:
        text = str(budget_curve(with_spectra({name: [1.0] for name in SHAPES}), ranks=[1, 2]))
        assert "water-fill" in text and "100.0%" in text

    def test_a_gate_with_one_output_ends_no_curve(self) -> None:
        shapes = {f"m{i}": (64, 64) for i in range(32)}
        flat = synthetic_profile(shapes | {"gate": (64, 1)}, gid=1)
        curve = budget_curve(flat)
        assert [point.r for point in curve.points] == [1, 2, 4, 8, 16, 32, 64]

    def test_one_budget_is_no_reason(self) -> None:
        text = budget_curve(synthetic_profile(SHAPES), ranks=[4]).recommendation()
        assert text.endswith("it is the only budget looked at.")

    def test_what_is_recommended_can_be_captured(self) -> None:
        """By the method's own bounds: no module may have more than eight times the rank."""
        gid = {f"m{i}": 1 for i in range(32)} | {"m0": 32}
        loud = synthetic_profile({name: (64, 64) for name in gid}, gid=gid)
        point = budget_curve(loud, ranks=[1]).points[0]
        plan = WaterFill(budget="r=1").plan(loud)
        assert plan.captured == pytest.approx(point.water_fill)
        assert ranks(plan)["m0"] <= 8

    @pytest.mark.parametrize(
        ("bad", "message"),
        [([], "at least 1"), ([0], "at least 1"), ([-1, 2], "at least 1"), ([8, 9], "be twice")],
    )
    def test_bad_ranks(self, bad: list[int], message: str) -> None:
        with pytest.raises(PlanError, match=message):
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


def with_grams(spectra: dict[str, list[float]]) -> GradientProfile:
    """Gram matrices with the given eigenvalues, four batches."""
    rotation = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q
    grams = {
        name: rotation @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ rotation.T
        for name, values in spectra.items()
    }
    return replace(synthetic_profile(SHAPES), gram=grams)


class TestGard:
    def test_ranks_follow_the_energy_rank(self) -> None:
        # energy ranks 1, 4 and 2 at 0.9; LoRA r = 4 has 4 * 576 = 2,304 parameters
        profile = with_grams({"a": [9.9, 0.1, 0, 0], "b": [1, 1, 1, 1], "c": [1, 1, 0, 0]})
        assert profile.energy_ranks() == {"a": 1, "b": 4, "c": 2}
        plan = Gard(r=4).plan(profile)
        assert plan.budget == 2304
        assert plan.budget - plan.parameters < 128
        assert ranks(plan)["a"] < ranks(plan)["c"] < ranks(plan)["b"]
        # literally: the largest c whose rounded ranks fit, found by scanning
        best: dict[str, int] = {}
        for step in range(2000):
            c = step / 100
            tried = {
                name: min(max(math.floor(1 + c * e / 7 + 0.5), 1), 32)
                for name, e in {"a": 1, "b": 4, "c": 2}.items()
            }
            if 128 * tried["a"] + 320 * tried["b"] + 128 * tried["c"] <= 2304:
                best = tried
        assert all(abs(ranks(plan)[name] - rank) <= 1 for name, rank in best.items())

    def test_ties_go_by_the_crossing_then_the_trace(self) -> None:
        spread = {"a": [9, 5, 0, 0], "b": [1, 1, 1, 1], "c": [5, 5, 0, 0]}
        profile = with_grams({name: [float(v) for v in values] for name, values in spread.items()})
        crossings = profile.energy_crossings()
        assert profile.energy_ranks()["a"] == profile.energy_ranks()["c"] == 2
        assert crossings["a"] < crossings["c"]
        # one rank more than a tie: it goes to the larger crossing, although a has more energy
        even = Gard(r=1, budget=320 + 3 * 128, r_max=2).plan(profile)
        assert (ranks(even)["a"], ranks(even)["c"]) == (1, 2)
        louder = with_grams({"a": [1.0, 1, 0, 0], "b": [1.0, 1, 1, 1], "c": [2.0, 2, 0, 0]})
        assert len(set(louder.energy_crossings().values()) - {louder.energy_crossings()["b"]}) == 1
        loud = Gard(r=1, budget=320 + 3 * 128, r_max=2).plan(louder)
        assert (ranks(loud)["a"], ranks(loud)["c"]) == (1, 2)

    def test_an_exact_budget_of_2570(self) -> None:
        """2,570 = 2 * 5 * 257: five ranks of modules that cost 514."""
        shapes = {name: (257, 257) for name in "abc"}
        profile = replace(
            synthetic_profile(shapes), gram={name: torch.eye(4).double() for name in "abc"}
        )
        plan = Gard(r=1, budget=2570, r_max=4).plan(profile)
        assert plan.parameters == plan.budget == 2570
        assert ranks(plan) == {"a": 2, "b": 2, "c": 1}

    def test_a_profile_without_grams_is_refused(self) -> None:
        with pytest.raises(PlanError, match=r"gard needs the Gram matrices .*--statistics gram"):
            Gard().plan(synthetic_profile(SHAPES))

    def test_an_infeasible_budget_states_the_range(self) -> None:
        profile = with_grams({name: [1.0, 0, 0, 0] for name in SHAPES})
        with pytest.raises(PlanError, match=r"take from 576 to"):
            Gard(budget=575).plan(profile)

    @pytest.mark.parametrize(
        "options", [{"energy": 0}, {"energy": 1.0}, {"energy": math.nan}, {"budget": 0}]
    )
    def test_bad_options(self, options: dict[str, float]) -> None:
        with pytest.raises(PlanError, match=next(iter(options))):
            Gard(**options)

    def test_cheap_modules_are_not_passed_over(self) -> None:
        profile = with_grams({name: [1.0, 1, 0, 0] for name in SHAPES})
        plain, weighted = Gard(r=8).plan(profile), Gard(r=8, per_cost=True).plan(profile)
        assert ranks(plain)["a"] == pytest.approx(ranks(plain)["b"], abs=1)
        assert ranks(weighted)["a"] > ranks(weighted)["b"] + 2


def test_what_rounding_left_goes_to_the_living() -> None:
    shapes = {"a": (576, 576), "b": (576, 576), "c": (576, 1536)}
    profile = synthetic_profile(shapes, sensitivity={"a": 1.0, "b": 1.0, "c": 0.0})
    assert ranks(LsLora(r=8).plan(profile)) == {"a": 12, "b": 11, "c": 4}


def test_a_budget_that_pays_for_no_rank_says_what_one_takes() -> None:
    profile = synthetic_profile(SHAPES)
    for method in (WaterFill(budget=100), Compose(budget=100, r_min=0)):
        with pytest.raises(PlanError, match=r"100 parameters pays for no adapter.* takes 128"):
            method.plan(profile)


def test_without_a_budget_r_is_no_bound() -> None:
    profile = synthetic_profile(SHAPES, gid=20)
    assert set(ranks(LoraGid(r_max=4).plan(profile)).values()) == {4}
    assert set(ranks(LoraGid(r_min=30).plan(profile)).values()) == {30}
    with pytest.raises(PlanError, match="r=8 <= r_max=4"):
        LoraGid(r_max=4, budget="exact")


def test_an_earlier_plan_may_be_named_by_a_path(tmp_path: Path) -> None:
    profile = synthetic_profile(SHAPES)
    Lora(r=4).plan(profile).save(tmp_path / "plan.json")
    plan = WaterFill(r=4, around=tmp_path / "plan.json", delta=1).plan(profile)
    assert set(ranks(plan).values()) <= {3, 4, 5}
    json.dumps(plan.provenance)
