"""What is particular to block-diagonal adapters: shapes, initialisation, patterns, plain LoRA."""

from __future__ import annotations

import itertools
import logging
import math
import re
from typing import Any

import pytest
import torch
from beartype import beartype
from jaxtyping import TypeCheckError, jaxtyped
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

from contracts import (
    ADAPTERS,
    D_IN,
    D_OUT,
    OneLayer,
    adapted,
    adapter_layer,
    assert_close,
    every_dtype,
    every_layer_kind,
    factors_of,
    inputs,
    train_by_chance_,
)
from rankwise import RaLoraConfig
from rankwise.adapters import RaLoraLinear
from rankwise.adapters.fused import add_update

ONE_BLOCK = ADAPTERS[0]


class NamedLayers(nn.Module):
    """Linear layers in a chain, by (dotted) name -> (d_in, d_out)."""

    def __init__(self, **shapes: tuple[int, int]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            *parents, last = name.split(".")
            parent: nn.Module = self
            for part in parents:
                if not hasattr(parent, part):
                    parent.add_module(part, nn.Module())
                parent = parent.get_submodule(part)
            parent.add_module(last, nn.Linear(*shape))
        self.order = list(shapes)

    def forward(self, x: Tensor) -> Tensor:
        for name in self.order:
            x = self.get_submodule(name)(x)
        return x


class TestOneBlock:
    @every_dtype
    @every_layer_kind
    def test_it_is_pefts_lora(self, dtype: torch.dtype, kind: str) -> None:
        ours, x = adapted(ONE_BLOCK, kind, dtype), inputs(dtype)
        config = ONE_BLOCK.config()
        lora = get_peft_model(
            OneLayer(kind, dtype),
            LoraConfig(
                r=config.r,
                lora_alpha=config.alpha,
                target_modules=["layer"],
                fan_in_fan_out=kind == "Conv1D",
            ),
            autocast_adapter_dtype=False,
        ).eval()
        theirs = lora.base_model.model.layer
        a, b = factors_of(adapter_layer(ours)).values()
        theirs.lora_A.default.weight.data = a.detach()[0].clone()
        theirs.lora_B.default.weight.data = b.detach()[0].clone()

        expected = lora(x)
        assert_close(ours(x), expected, dtype)
        ours(x).square().sum().backward()
        expected.square().sum().backward()
        assert_close(a.grad[0], theirs.lora_A.default.weight.grad, dtype)
        assert_close(b.grad[0], theirs.lora_B.default.weight.grad, dtype)
        assert_close(ours.merge_and_unload()(x), lora.merge_and_unload()(x), dtype)


class TestFactors:
    @pytest.mark.parametrize("n", [1, 2, 8, 32])
    def test_saved_shapes_and_parameter_count(self, n: int, tmp_path: Any) -> None:
        r = 5
        model = get_peft_model(OneLayer(), RaLoraConfig(r=r, blocks=n, target_modules=["layer"]))
        model.save_pretrained(tmp_path)
        saved = load_file(tmp_path / "adapter_model.safetensors")
        assert {name: tuple(tensor.shape) for name, tensor in saved.items()} == {
            "base_model.model.layer.ralora_A.weight": (n, r, D_IN // n),
            "base_model.model.layer.ralora_B.weight": (n, D_OUT // n, r),
        }
        trainable, _ = model.get_nb_trainable_parameters()
        assert trainable == r * (D_IN + D_OUT)

    @pytest.mark.parametrize("n", [1, 8])
    @pytest.mark.parametrize("init_fan_in", ["full", "block"])
    def test_initial_variance(self, n: int, init_fan_in: str) -> None:
        d_in = 1024
        torch.manual_seed(0)
        config = RaLoraConfig(r=16, blocks=n, init_fan_in=init_fan_in, target_modules=["layer"])
        model = get_peft_model(NamedLayers(layer=(d_in, d_in)), config)
        a, b = factors_of(adapter_layer(model)).values()
        fan_in = d_in if init_fan_in == "full" else d_in / n
        # 16384 uniform draws estimate their variance to 0.7 % (one standard deviation)
        assert a.var().item() == pytest.approx(1 / (3 * fan_in), rel=0.03)
        assert a.abs().max().item() == pytest.approx(1 / math.sqrt(fan_in), rel=0.01)
        assert torch.count_nonzero(b) == 0

    def test_blocks_start_different(self) -> None:
        a, _ = factors_of(adapter_layer(adapted(ADAPTERS[2], trained=False))).values()
        for first, second in itertools.combinations(a.unbind(), 2):
            assert not torch.equal(first, second)

    def test_init_weights_false_changes_the_output(self) -> None:
        model = adapted(ADAPTERS[1], trained=False, init_weights=False)
        assert not torch.allclose(model(inputs()), OneLayer()(inputs()))

    @pytest.mark.parametrize("n", [2, 8, 32])
    def test_the_update_reaches_rank_n_r(self, n: int) -> None:
        torch.manual_seed(0)
        config = RaLoraConfig(r=2, blocks=n, init_weights=False, target_modules=["layer"])
        model = get_peft_model(NamedLayers(layer=(128, 128)).double(), config)
        delta = adapter_layer(model).delta_weight("default")
        assert torch.linalg.matrix_rank(delta) == 2 * n

    def test_scaling_is_alpha_over_the_reference_rank_for_every_layer(self) -> None:
        config = RaLoraConfig(
            r=8, alpha=12, target_modules=["a", "b"], rank_pattern={"a": 2, "b": 16}
        )
        model = get_peft_model(NamedLayers(a=(64, 64), b=(64, 64)), config)
        layers = [m for m in model.modules() if isinstance(m, RaLoraLinear)]
        assert [(layer.r["default"], layer.scaling["default"]) for layer in layers] == [
            (2, 1.5),
            (16, 1.5),
        ]

    @pytest.mark.parametrize("trained", [True, False])
    def test_scale_layer_multiplies_the_active_update(self, trained: bool) -> None:
        model, x = adapted(ADAPTERS[1], dtype=torch.float64, trained=trained), inputs(torch.float64)
        base = OneLayer(dtype=torch.float64)(x)
        before = model(x) - base
        adapter_layer(model).scale_layer(3.0)
        assert torch.allclose(model(x) - base, 3 * before, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("n", [1, 2, 8])
@pytest.mark.parametrize("batch", [(), (5,), (2, 3), (0,)], ids=str)
def test_shapes_are_as_annotated(n: int, batch: tuple[int, ...]) -> None:
    add = jaxtyped(add_update, typechecker=beartype)
    x, a, b = torch.randn(*batch, 8 * n), torch.randn(n, 3, 8), torch.randn(n, 5, 3)
    result = torch.randn(*batch, 5 * n)
    assert add(result, x, a, b, 2.0).shape == (*batch, 5 * n)
    with pytest.raises(TypeCheckError):
        add(result, x, a, b.transpose(1, 2), 2.0)


class TestPatterns:
    NAMES = ("proj", "a.proj", "b.proj", "x.a.proj", "aproj", "last")

    def ranks(self, **options: Any) -> dict[str, int]:
        model = get_peft_model(
            NamedLayers(**dict.fromkeys(self.NAMES, (32, 32))),
            RaLoraConfig(r=8, target_modules=list(self.NAMES), **options),
        )
        key = "blocks" if "blocks_pattern" in options else "r"
        prefix = "base_model.model."
        return {
            name.removeprefix(prefix): getattr(module, key)["default"]
            for name, module in model.named_modules()
            if isinstance(module, RaLoraLinear)
        }

    def test_the_longest_literal_match_counts(self) -> None:
        pattern = {"proj": 2, "a.proj": 4, "x.a.proj": 16, "last": 1}
        expected = {
            "proj": 2,
            "a.proj": 4,
            "b.proj": 2,
            "x.a.proj": 16,
            "aproj": 8,  # ends in "proj" but not in ".proj"
            "last": 1,
        }
        for order in itertools.permutations(pattern):  # saved configs come back sorted
            shuffled = {key: pattern[key] for key in order}
            assert self.ranks(rank_pattern=shuffled) == expected
            assert self.ranks(blocks_pattern=shuffled) == expected | {"aproj": 1}

    def test_a_dot_is_a_dot(self) -> None:
        assert self.ranks(rank_pattern={"a.roj": 2}) == dict.fromkeys(self.NAMES, 8)

    @pytest.mark.parametrize(
        "key", ["proj$", "^proj", "a|b", "(a)", "a.*", "[ab]", "a\\.b", "", "a b"]
    )
    def test_regular_expressions_are_refused(self, key: str) -> None:
        with pytest.raises(ValueError, match=r"rank_pattern key .* must be a module name"):
            RaLoraConfig(rank_pattern={key: 2})
        with pytest.raises(ValueError, match=r"blocks_pattern key .* must be a module name"):
            RaLoraConfig(blocks_pattern={key: 2})


class TestBlocksThatDoNotDivide:
    @pytest.mark.parametrize(
        ("d_in", "d_out", "wanted", "expected"),
        [(96, 64, 64, 32), (96, 100, 8, 4), (63, 64, 8, 1), (64, 64, 64, 64), (6, 10, 32, 2)],
    )
    def test_they_are_lowered_and_it_is_logged(
        self,
        d_in: int,
        d_out: int,
        wanted: int,
        expected: int,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        config = RaLoraConfig(r=2, blocks=wanted, target_modules=["layer"])
        with caplog.at_level(logging.INFO, logger="rankwise"):
            model = get_peft_model(NamedLayers(layer=(d_in, d_out)), config)
        a, b = factors_of(adapter_layer(model)).values()
        assert a.shape == (expected, 2, d_in // expected)
        assert b.shape == (expected, d_out // expected, 2)
        messages = [record.getMessage() for record in caplog.records]
        if expected == wanted:
            assert messages == []
        else:
            assert messages == [
                f"layer: {wanted} blocks do not divide {d_out} x {d_in}; {expected} do"
            ]

    def test_a_rank_the_layer_cannot_have_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"rank 65 of layer exceeds its smaller dimension 64"):
            get_peft_model(OneLayer(), RaLoraConfig(r=65, target_modules=["layer"]))


class TestConfig:
    @pytest.mark.parametrize("r", [0, -3, 4.5, 4.0, "4", True, None, math.nan])
    def test_ranks_are_positive_whole_numbers(self, r: Any) -> None:
        with pytest.raises(ValueError, match=r"^r=.* must be a whole number of at least 1"):
            RaLoraConfig(r=r)
        with pytest.raises(ValueError, match=r"^rank_pattern\['proj'\]=.* must be a whole number"):
            RaLoraConfig(rank_pattern={"proj": r})

    @pytest.mark.parametrize("blocks", [0, 3, -2, 6, 2.0, "2", True])
    def test_blocks_are_powers_of_two(self, blocks: Any) -> None:
        with pytest.raises(ValueError, match=r"^blocks=.* must be a (power of two|whole number)"):
            RaLoraConfig(blocks=blocks)
        with pytest.raises(ValueError, match=r"^blocks_pattern\['proj'\]=.* must be a"):
            RaLoraConfig(blocks_pattern={"proj": blocks})

    @pytest.mark.parametrize("alpha", [math.nan, math.inf, -1, 0, "16", True, None])
    def test_alpha_is_a_positive_number(self, alpha: Any) -> None:
        with pytest.raises(ValueError, match=r"^alpha=.* must be a positive number"):
            RaLoraConfig(alpha=alpha)

    @pytest.mark.parametrize("dropout", [-0.1, 1, 1.5, math.nan, "0.1", True, None])
    def test_dropout_is_a_probability_below_one(self, dropout: Any) -> None:
        with pytest.raises(ValueError, match=r"^dropout=.* must be a number in \[0, 1\)"):
            RaLoraConfig(dropout=dropout)

    @pytest.mark.parametrize(
        ("option", "value"),
        [
            ("init_fan_in", "blocks"),
            ("bias", "lora_only"),
            ("bias", None),
            ("scaling", "sqrt"),
            ("rank_scaling", "rank"),
            ("rank_scaling", ["r"]),
        ],
    )
    def test_choices(self, option: str, value: Any) -> None:
        with pytest.raises(ValueError, match=f"^{option}={re.escape(repr(value))} must be "):
            RaLoraConfig(**{option: value})

    @pytest.mark.parametrize(
        "options",
        [
            {"target_modules": ".*proj", "layers_to_transform": [0]},
            {"target_modules": ".*proj", "layers_pattern": "layers"},
            {"target_modules": ["proj"], "layers_pattern": "layers"},
        ],
    )
    def test_layer_options_that_peft_would_ignore(self, options: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match="layers_"):
            RaLoraConfig(**options)

    def test_it_is_the_same_after_saving_and_loading(self, tmp_path: Any) -> None:
        config = RaLoraConfig(
            r=4,
            alpha=3.5,
            blocks=2,
            rank_pattern={"b": 2, "a": 3},
            blocks_pattern={"a.b": 8},
            target_modules=["a", "b"],
            exclude_modules=["c"],
            dropout=0.1,
            rank_scaling="sqrt_r",
            scaling="function",
            init_fan_in="block",
            base_fingerprint="0123456789abcdef",
            bias="ralora_only",
            modules_to_save=["norm"],
        )
        config.save_pretrained(tmp_path)
        loaded = RaLoraConfig.from_pretrained(tmp_path)
        # an adapter is loaded for inference unless is_trainable=True says otherwise
        assert loaded.to_dict() | {"inference_mode": False} == config.to_dict()


def test_a_second_adapter_may_have_another_shape() -> None:
    model = get_peft_model(OneLayer(), RaLoraConfig(r=4, blocks=2, target_modules=["layer"]))
    model.add_adapter("other", RaLoraConfig(r=3, blocks=8, target_modules=["layer"]))
    assert isinstance(model, PeftModel)
    train_by_chance_(model, "other")
    layer = adapter_layer(model)
    assert (layer.r, layer.blocks) == ({"default": 4, "other": 3}, {"default": 2, "other": 8})
    assert layer.ralora_A["other"].weight.shape == (8, 3, D_IN // 8)


def test_the_layer_says_what_it_is() -> None:
    assert repr(adapter_layer(adapted(ONE_BLOCK))).startswith("ralora.RaLoraLinear(")
