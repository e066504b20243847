from __future__ import annotations

import logging
import math
from dataclasses import asdict
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from rankwise.errors import PlanError
from rankwise.methods import METHODS, Compose, Lora, Method, RaLora, RaLoraPro
from rankwise.plan import BlockOptions
from rankwise.profiling import profile_gradients
from rankwise.targets import LinearShape, Targets, find_targets
from tiny_models import synthetic_profile, tiny_llama, token_batch

SHAPES = {
    "model.layers.0.q": (64, 64),
    "model.layers.0.down": (256, 64),
    "model.layers.1.q": (64, 64),
    "model.layers.1.down": (256, 64),
}
LORA_COST = 2 * (128 + 320)


@pytest.fixture(scope="module")
def llama_8b_attention() -> Targets:
    """q, k, v, o of Llama-3.1-8B, without its weights."""
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    return find_targets(model, ["q_proj", "k_proj", "v_proj", "o_proj"])


class TestPaperParameterCounts:
    @pytest.mark.parametrize(
        ("r", "parameters"), [(8, 6_815_744), (200, 170_393_600), (380, 323_747_840)]
    )
    def test_llama_8b_attention(self, llama_8b_attention: Targets, r: int, parameters: int) -> None:
        assert len(llama_8b_attention) == 128
        shapes = {name: (s.d_in, s.d_out) for name, s in llama_8b_attention.items()}
        profile = synthetic_profile(shapes, gid=900)
        lora = Lora(r=r).plan(llama_8b_attention)
        ralora = RaLora(r=r).plan(profile)
        assert lora.parameters == lora.budget == parameters
        assert ralora.parameters == ralora.budget == parameters
        assert {m.blocks for m in ralora.modules.values()} == {
            min(32, 2 ** int(math.log2(900 / r)))
        }

    def test_ralora_pro_stays_within_it(self, llama_8b_attention: Targets) -> None:
        shapes = {name: (s.d_in, s.d_out) for name, s in llama_8b_attention.items()}
        scores = {name: 1.0 + i % 7 for i, name in enumerate(shapes)}
        profile = synthetic_profile(shapes, gid=900, sensitivity=scores)
        plan = RaLoraPro().plan(profile)
        assert plan.budget == 6_815_744
        assert 6_815_744 - 5120 < plan.parameters <= 6_815_744  # cheapest rank: 4096 + 1024


class TestLora:
    def test_one_rank_everywhere(self) -> None:
        plan = Lora(r=4, alpha=8).plan({"a": LinearShape(64, 32), "b": LinearShape(16, 16)})
        assert [(m.rank, m.blocks, m.gid) for m in plan.modules.values()] == [(4, 1, None)] * 2
        assert (plan.method, plan.adapter, plan.scaling) == ("lora", "lora", 2.0)
        assert plan.parameters == plan.budget == 4 * (96 + 32)
        assert plan.model_fingerprint is None
        assert plan.provenance == {"options": {"r": 4, "alpha": 8}}

    def test_profile_leaves_its_mark(self) -> None:
        plan = Lora(r=4).plan(synthetic_profile(SHAPES, gid=5, fingerprint="ab" * 8))
        assert plan.model_fingerprint == "ab" * 8
        assert plan.provenance["profile"]["batches"] == 1
        assert [m.gid for m in plan.modules.values()] == pytest.approx([5.0] * 4)

    def test_convolutions_of_like_name_stay_without(self) -> None:
        model = nn.Module()
        model.proj, model.patch = nn.Linear(8, 8), nn.Module()
        model.patch.proj = nn.Conv2d(3, 8, 2)
        config = Lora(r=2).plan(find_targets(model)).to_lora_config()
        adapted = get_peft_model(model, config)
        layers = [n for n, m in adapted.named_modules() if hasattr(m, "lora_A")]
        assert layers == ["base_model.model.proj"]

    def test_an_alpha_beyond_every_float(self) -> None:
        with pytest.raises(PlanError, match="alpha is above"):
            Lora(alpha=10**400)

    def test_no_module(self) -> None:
        with pytest.raises(PlanError, match="at least one module"):
            Lora().plan({})


class TestRaLora:
    def test_blocks_follow_the_gid(self) -> None:
        gid = dict(zip(SHAPES, (5, 17, 40, 64), strict=True))
        plan = RaLora(r=8, alpha=32).plan(synthetic_profile(SHAPES, gid=gid))
        assert [m.blocks for m in plan.modules.values()] == [1, 2, 4, 8]
        assert {m.rank for m in plan.modules.values()} == {8}
        assert [m.gid for m in plan.modules.values()] == pytest.approx([5.0, 17.0, 40.0, 64.0])
        assert (plan.method, plan.adapter, plan.scaling) == ("ralora", "ralora", 4.0)
        assert plan.parameters == plan.budget == 8 * LORA_COST
        assert plan.provenance["options"] == {
            "r": 8,
            "alpha": 32,
            "n_max": 32,
            "scaling": "function",
            "rank_scaling": "r_ref",
            "init_fan_in": "full",
        }

    @pytest.mark.parametrize("method", [RaLora, RaLoraPro, partial(Compose, adapter="ralora")])
    def test_scaling_and_drawing_are_in_the_plan(self, method: Any) -> None:
        options = {"scaling": "paper", "rank_scaling": "sqrt_r", "init_fan_in": "block"}
        profile = synthetic_profile(SHAPES, gid=20)
        assert method(r=4).plan(profile).block_options == BlockOptions()
        assert asdict(method(r=4, **options).plan(profile).block_options) == options

    @pytest.mark.parametrize("option", ["scaling", "rank_scaling", "init_fan_in"])
    def test_unknown_scaling_and_drawing(self, option: str) -> None:
        with pytest.raises(PlanError, match=f"{option}='other' is not known"):
            RaLora(**{option: "other"})

    def test_plain_lora_has_no_options_of_blocks(self) -> None:
        with pytest.raises(PlanError, match=r"alpha / r_ref, .* adapter 'lora'"):
            Compose(scaling="paper").plan(synthetic_profile(SHAPES))

    def test_n_max(self) -> None:
        plan = RaLora(r=1, n_max=4).plan(synthetic_profile(SHAPES, gid=60))
        assert {m.blocks for m in plan.modules.values()} == {4}

    def test_blocks_that_do_not_divide_are_lowered_and_logged(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        with caplog.at_level(logging.INFO, logger="rankwise.methods"):
            plan = RaLora(r=1).plan(synthetic_profile({"odd": (96, 36), "even": (64, 64)}, gid=32))
        assert {name: m.blocks for name, m in plan.modules.items()} == {"odd": 4, "even": 32}
        assert "odd: 32 blocks do not divide 36 x 96; 4 do" in caplog.text
        assert "even" not in caplog.text

    def test_zero_gradient_gets_one_block(self) -> None:
        plan = RaLora().plan(synthetic_profile(SHAPES, gid=0))
        assert {m.blocks for m in plan.modules.values()} == {1}

    def test_reached_rank_fits_the_layer(self) -> None:
        profile = profile_gradients(tiny_llama(), [token_batch([12] * 6)], batches=1)
        plan = RaLora(r=2, n_max=16).plan(profile)
        assert any(m.blocks > 1 for m in plan.modules.values())
        for name, module in plan.modules.items():
            assert module.blocks == 1 or module.blocks * module.rank <= profile.gid[name]


class TestRaLoraPro:
    SCORES: ClassVar = dict(zip(SHAPES, (1.0, 2.0, 3.0, 4.0), strict=True))

    def test_never_more_than_lora(self) -> None:
        profile = synthetic_profile(SHAPES, gid=40, sensitivity=self.SCORES)
        for r in range(1, 33):
            plan = RaLoraPro(r=r).plan(profile)
            lora = Lora(r=r).plan(profile)
            assert plan.budget == lora.parameters
            assert plan.parameters <= lora.parameters
            assert lora.parameters - plan.parameters < 320
            low, high = RaLoraPro(r=r).bounds
            assert all(low <= m.rank <= high for m in plan.modules.values())

    def test_rank_follows_sensitivity(self) -> None:
        plan = RaLoraPro(r=8).plan(synthetic_profile(SHAPES, gid=40, sensitivity=self.SCORES))
        ranks = {name: m.rank for name, m in plan.modules.items()}
        assert ranks["model.layers.1.q"] > ranks["model.layers.0.q"]
        assert ranks["model.layers.1.down"] > ranks["model.layers.0.down"]

    def test_blocks_follow_each_own_rank(self) -> None:
        plan = RaLoraPro(r=8).plan(synthetic_profile(SHAPES, gid=40, sensitivity=self.SCORES))
        for module in plan.modules.values():
            assert module.blocks == 2 ** max(0, math.floor(math.log2(40 / module.rank)))
        assert len({m.blocks for m in plan.modules.values()}) > 1

    def test_paper_budget(self) -> None:
        plan = RaLoraPro(r=8, budget="paper").plan(
            synthetic_profile(SHAPES, gid=40, sensitivity=self.SCORES)
        )
        pool = 8 * 2 * (math.sqrt(128) + math.sqrt(320))
        expected = [
            min(max(math.floor(pool * score / 10 / math.sqrt(cost)), 4), 16)
            for score, cost in zip((1, 2, 3, 4), (128, 320, 128, 320), strict=True)
        ]
        assert [m.rank for m in plan.modules.values()] == expected
        assert plan.budget is None

    def test_paper_budget_runs_over_loras(self) -> None:
        # sensitivity on the costly layers: the square root does not preserve the parameters
        scores = dict(zip(SHAPES, (1.0, 4.0, 1.0, 4.0), strict=True))
        profile = synthetic_profile(SHAPES, gid=40, sensitivity=scores)
        lora = Lora(r=8).plan(profile).parameters
        assert RaLoraPro(r=8, budget="paper").plan(profile).parameters > lora
        assert RaLoraPro(r=8).plan(profile).parameters <= lora

    def test_equal_layers_get_equal_ranks(self) -> None:
        shapes = {f"layers.{i}.q": (64, 64) for i in range(5)}
        for budget in ("exact", "paper"):
            plan = RaLoraPro(r=6, budget=budget).plan(synthetic_profile(shapes, gid=40))
            assert {m.rank for m in plan.modules.values()} == {6}

    @pytest.mark.parametrize("budget", ["exact", "paper"])
    def test_small_layer_caps_its_rank(self, budget: Any) -> None:
        shapes = {"small": (6, 64), "large": (64, 64)}
        profile = synthetic_profile(shapes, sensitivity={"small": 9.0, "large": 1.0})
        plan = RaLoraPro(r=8, budget=budget).plan(profile)
        assert plan.modules["small"].rank == 6

    def test_dead_layer_gets_the_least_rank_and_one_block(self) -> None:
        scores = dict(zip(SHAPES, (0.0, 2.0, 3.0, 4.0), strict=True))
        gid = dict(zip(SHAPES, (0, 40, 40, 40), strict=True))
        plan = RaLoraPro(r=8).plan(synthetic_profile(SHAPES, gid=gid, sensitivity=scores))
        dead = plan.modules["model.layers.0.q"]
        assert (dead.rank, dead.blocks, dead.gid) == (4, 1, 0.0)
        assert 8 * LORA_COST - 128 < plan.parameters <= 8 * LORA_COST

    def test_all_dead(self) -> None:
        with pytest.raises(PlanError, match="every sensitivity is zero"):
            RaLoraPro().plan(synthetic_profile(SHAPES, sensitivity=0.0))

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0])
    def test_impossible_sensitivity(self, bad: float) -> None:
        scores = self.SCORES | {"model.layers.1.q": bad}
        with pytest.raises(PlanError, match=r"sensitivity of model\.layers\.1\.q is"):
            RaLoraPro().plan(synthetic_profile(SHAPES, sensitivity=scores))

    @pytest.mark.parametrize(
        ("options", "bounds"),
        [
            ({}, (4, 16)),
            ({"r": 1}, (1, 2)),
            ({"r": 5}, (2, 10)),
            ({"r_min": 1}, (1, 16)),
            ({"r_max": 9}, (4, 9)),
        ],
    )
    def test_default_bounds(self, options: dict[str, int], bounds: tuple[int, int]) -> None:
        assert RaLoraPro(**options).bounds == bounds


class TestOptions:
    def test_paper_defaults(self) -> None:
        assert (Lora().r, Lora().alpha) == (8, 16.0)
        assert (RaLora().r, RaLora().alpha, RaLora().n_max) == (8, 16.0, 32)
        assert RaLoraPro().budget == "exact"

    def test_names(self) -> None:
        assert list(METHODS) == [
            "lora",
            "lora-gid",
            "ls-lora",
            "gard",
            "water-fill",
            "ralora",
            "ralora-pro",
            "ralora-threshold",
            "compose",
        ]
        assert not Lora.needs_profile
        assert RaLora.needs_profile and RaLoraPro.needs_profile

    @pytest.mark.parametrize("method", METHODS.values())
    @pytest.mark.parametrize("r", [0, -1, True, False, 8.0, "8", None, math.nan])
    def test_rank(self, method: type[Method], r: Any) -> None:
        with pytest.raises(PlanError, match=r"r=.* must be a whole number of at least 1"):
            method(r=r)

    @pytest.mark.parametrize("method", METHODS.values())
    def test_a_rank_of_more_digits_than_a_float_holds(self, method: type[Method]) -> None:
        with pytest.raises(PlanError, match=r"r is above \d+, which no layer has"):
            method(r=10**5000)

    @pytest.mark.parametrize("method", METHODS.values())
    @pytest.mark.parametrize("source", [tiny_llama(), find_targets(tiny_llama()), "profile", None])
    def test_what_is_no_profile(self, method: type[Method], source: Any) -> None:
        if not method.needs_profile and isinstance(source, Targets):
            assert method(r=2).plan(source).modules.keys() == source.keys()
            return
        with pytest.raises(PlanError, match=f"plans from a profile.* {type(source).__name__}"):
            method(r=2).plan(source)

    @pytest.mark.parametrize("method", METHODS.values())
    @pytest.mark.parametrize("alpha", [0, -1, True, math.nan, math.inf, "16", None])
    def test_alpha(self, method: type[Method], alpha: Any) -> None:
        with pytest.raises(PlanError, match=r"alpha=.* must be a positive number"):
            method(alpha=alpha)

    @pytest.mark.parametrize("n_max", [3, 6, 12, 33])
    def test_n_max_is_a_power_of_two(self, n_max: int) -> None:
        with pytest.raises(PlanError, match=f"n_max={n_max} must be a power of two"):
            RaLora(n_max=n_max)

    @pytest.mark.parametrize("n_max", [0, -2, True, 4.0, None])
    def test_n_max_is_a_count(self, n_max: Any) -> None:
        with pytest.raises(PlanError, match=r"n_max=.* must be a whole number"):
            RaLora(n_max=n_max)

    @pytest.mark.parametrize("n_max", [1, 2, 64])
    def test_n_max_that_is(self, n_max: int) -> None:
        assert RaLora(n_max=n_max).n_max == n_max

    @pytest.mark.parametrize(
        "options",
        [{"r_min": True}, {"r_min": 9}, {"r_max": 7}, {"r_min": -1}, {"r_max": 1.5}],
    )
    def test_bounds(self, options: dict[str, Any]) -> None:
        with pytest.raises(PlanError, match=r"r_min|r_max"):
            RaLoraPro(**options)

    def test_budget(self) -> None:
        with pytest.raises(PlanError, match=r"'paypal' is not .*Or 'exact' or 'paper'"):
            RaLoraPro(budget="paypal")

    @pytest.mark.parametrize("method", [Lora(r=65), RaLora(r=65)])
    def test_rank_above_the_layer(self, method: Method) -> None:
        with pytest.raises(PlanError, match=r"r=65 exceeds the largest rank 64 of model\.layers"):
            method.plan(synthetic_profile(SHAPES))
