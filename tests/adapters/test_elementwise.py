"""What is particular to LR-LoRA: its start, its parameters, sharing, options."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from contracts import D_IN, D_OUT, OneLayer, adapter_layer, assert_close, factors_of, inputs
from rankwise import LrLoraConfig, lr_lora_param_groups
from rankwise.adapters import LrLoraLinear
from rankwise.adapters.transfer import evaluate

BASES = ("sinc", "rbf", "spline", "fourier", "polynomial", "sine")


class Chain(nn.Module):
    """Square layers `layers.0.proj`, `layers.1.proj`, ..., with tanh between."""

    def __init__(self, depth: int = 3, width: int = 32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"proj": nn.Linear(width, width)}) for _ in range(depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer["proj"](x))
        return x


def one_layer(dtype: torch.dtype = torch.float32, **options: Any) -> PeftModel:
    torch.manual_seed(0)
    return get_peft_model(OneLayer(dtype=dtype), LrLoraConfig(target_modules=["layer"], **options))


def train(model: nn.Module, steps: int, lr: float = 1e-2) -> list[dict[str, float]]:
    """Adam towards a full-rank map; the size of every factor's gradient at each step."""
    dtype = next(model.parameters()).dtype
    x = inputs(dtype)
    target = OneLayer(dtype=dtype)(x).detach() + 0.2 * x @ torch.eye(D_IN, D_OUT, dtype=dtype)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
    sizes = []
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) - target).square().mean().backward()
        factors = factors_of(adapter_layer(model))
        sizes.append({name: float(f.grad.abs().max()) for name, f in factors.items()})
        optimizer.step()
    return sizes


class TestStart:
    def test_the_papers_start_is_a_dead_point_of_both_factors(self) -> None:
        # in fp64, because Adam makes whole steps of the rounding by which A and B escape
        dead = train(one_layer(torch.float64, init="paper"), 5)
        live = train(one_layer(torch.float64), 5)
        for step in dead:
            assert step["lrlora_amplitude"] > 0.1
            # f'(0) of an even function, to rounding
            assert max(step["lrlora_A"], step["lrlora_B"]) < 1e-10
        for step in live[1:]:
            assert min(step["lrlora_A"], step["lrlora_B"]) > 1e-5

    @pytest.mark.parametrize("init", ["live", "grid_shift"])
    def test_the_update_is_zero_and_everything_moves_after_one_step(self, init: str) -> None:
        model = one_layer(init=init)
        assert torch.equal(model(inputs()), OneLayer()(inputs()))
        layer = adapter_layer(model)
        assert torch.count_nonzero(layer.delta_weight("default")) == 0
        first, second, third = train(model, 3)
        assert first["lrlora_amplitude"] > 0.1
        # under grid_shift B = 0 still holds A back by one step
        assert min((second if init == "live" else third).values()) > 1e-6
        assert second["lrlora_B"] > 1e-6

    def test_small_amplitudes_make_a_constant_update(self) -> None:
        model = one_layer(init="small", amplitude_std=0.5)
        delta = adapter_layer(model).delta_weight("default")
        assert delta.std() < 1e-6 * delta.abs().max()
        assert delta.abs().max() > 0.1
        amplitude = factors_of(adapter_layer(one_layer(init="small", points=4000)))
        assert amplitude["lrlora_amplitude"].std().item() == pytest.approx(0.1, rel=0.05)

    def test_without_its_constant_f_moves_nothing_where_u_is_zero(self) -> None:
        model = one_layer(init="small", amplitude_std=0.5, constant=False)
        assert adapter_layer(model).delta_weight("default").abs().max() < 1e-12
        layer = adapter_layer(one_layer(constant=False, init_weights=False))
        moved = layer.delta_weight("default")
        layer.lrlora_config["default"] = (*layer.lrlora_config["default"][:2], True)
        constant = evaluate(torch.zeros(1), layer.transfer("default")) * layer.scaling["default"]
        torch.testing.assert_close(moved, layer.delta_weight("default") - constant)

    def test_factors_bandwidths_and_grid(self) -> None:
        model = one_layer(r=32, bandwidth_init=2.5, grid="learned", points=9)
        factors = factors_of(adapter_layer(model))
        for name in ("lrlora_A", "lrlora_B"):
            assert factors[name].var().item() == pytest.approx(1 / (3 * D_IN), rel=0.1)
        torch.testing.assert_close(F.softplus(factors["lrlora_bandwidth"]), torch.full((9,), 2.5))
        torch.testing.assert_close(factors["lrlora_grid"], torch.linspace(-3, 3, 9))

    def test_it_learns_a_map_of_full_rank(self) -> None:
        model, x = one_layer(r=2), inputs()
        train(model, 60)
        update = adapter_layer(model).delta_weight("default").double()
        assert torch.linalg.matrix_rank(update, rtol=1e-5) > 4
        assert not torch.allclose(model(x), OneLayer()(x))


class TestParameters:
    @pytest.mark.parametrize(
        ("basis", "grid", "per_module"),
        [
            *((basis, "uniform", 100) for basis in BASES),
            *((basis, "learned", 150) for basis in ("sinc", "rbf")),
        ],
    )
    def test_saved_tensors(self, basis: str, grid: str, per_module: int, tmp_path: Path) -> None:
        model = one_layer(basis=basis, grid=grid, init_weights=False)
        model.save_pretrained(tmp_path)
        saved = load_file(tmp_path / "adapter_model.safetensors")
        prefix = "base_model.model.layer.lrlora_"
        sizes = {name.removeprefix(prefix): tuple(t.shape) for name, t in saved.items()}
        assert sizes.pop("A.weight") == (8, D_IN)
        assert sizes.pop("B.weight") == (D_OUT, 8)
        assert sum(math.prod(s) for s in sizes.values()) == (0 if basis == "sine" else per_module)
        loaded = PeftModel.from_pretrained(OneLayer(), tmp_path)
        assert torch.equal(loaded(inputs()), model(inputs()))
        assert not torch.allclose(model(inputs()), OneLayer()(inputs()))

    @pytest.mark.parametrize(
        ("layers", "modules", "expected"),
        [(24, 7, 16_800), (32, 7, 22_400), (12, 6, 7_200)],
        ids=["qwen2-0.5b", "llama3-8b", "roberta-base"],
    )
    def test_two_k_a_module(self, layers: int, modules: int, expected: int) -> None:
        with torch.device("meta"):
            model = nn.ModuleList(
                nn.ModuleDict({f"proj{i}": nn.Linear(64, 64) for i in range(modules)})
                for _ in range(layers)
            )
        names = [f"proj{i}" for i in range(modules)]
        adapted = get_peft_model(model, LrLoraConfig(target_modules=names), low_cpu_mem_usage=True)
        trainable, _ = adapted.get_nb_trainable_parameters()
        assert trainable - layers * modules * 8 * 128 == expected

    def test_scaling(self) -> None:
        assert adapter_layer(one_layer(r=4)).scaling["default"] == 2
        assert adapter_layer(one_layer(r=4, alpha=12)).scaling["default"] == 3
        sine = adapter_layer(one_layer(r=4, basis="sine"))
        assert sine.scaling["default"] == pytest.approx(2 / math.sqrt(D_IN))

    def test_sinelora_is_its_formula(self) -> None:
        model = one_layer(torch.float64, basis="sine", omega=37.0, init_weights=False)
        layer = adapter_layer(model)
        a, b = (f.detach().double() for f in factors_of(layer).values())
        expected = 2 * torch.sin(37 * b @ a) / math.sqrt(D_IN)
        torch.testing.assert_close(layer.delta_weight("default").double(), expected)


class TestOneProduct:
    """The layer reads W instead of calling the base layer, where that makes no difference."""

    def calls(self, model: PeftModel, x: Tensor) -> int:
        """How often the base layer computes, seen without a hook."""
        base, count = adapter_layer(model).base_layer, 0
        original = type(base).forward

        def forward(self: nn.Module, value: Tensor) -> Tensor:
            nonlocal count
            count += 1
            return original(self, value)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(base), "forward", forward)
            model(x)
        return count

    def test_it_does_for_a_plain_layer(self) -> None:
        assert self.calls(one_layer(), inputs()) == 0

    def test_it_does_not_where_somebody_would_notice(self) -> None:
        hooked = one_layer()
        seen: list[nn.Module] = []
        layer = adapter_layer(hooked)
        layer.base_layer.register_forward_hook(lambda module, *_: seen.append(module))
        hooked(inputs())
        assert seen == [layer.base_layer]
        trained = one_layer(bias="all")
        assert self.calls(trained, inputs()) == 1
        half = one_layer(torch.bfloat16)
        assert self.calls(half, inputs(torch.bfloat16)) == 1
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert self.calls(one_layer(), inputs()) == 1

    def test_both_ways_agree(self) -> None:
        model, x = one_layer(init_weights=False), inputs()
        together = model(x)
        adapter_layer(model).base_layer.register_forward_hook(lambda *_: None)
        assert_close(model(x), together, torch.float32)


class TestSharing:
    @pytest.mark.parametrize(
        ("share", "saved"),
        [("none", 0), ("grid", 50), ("bandwidth", 50), ("amplitude", 50), ("all", 150)],
    )
    def test_shared_parameters_are_one(self, share: str, saved: int, tmp_path: Path) -> None:
        config = LrLoraConfig(target_modules=["proj"], grid="learned", share=share)
        model = get_peft_model(Chain(), config)
        trainable, _ = model.get_nb_trainable_parameters()
        assert trainable == 3 * (8 * 64 + 150) - 2 * saved
        x = torch.randn(5, 32)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(3):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
        model.save_pretrained(tmp_path)
        for low in (False, True):
            loaded = PeftModel.from_pretrained(Chain(), tmp_path, low_cpu_mem_usage=low)
            assert torch.equal(loaded(x), model(x))
            assert sum(p.numel() for p in loaded.parameters()) == sum(
                p.numel() for p in model.parameters()
            )

    def test_the_shared_gradient_is_the_sum(self) -> None:
        x = torch.randn(5, 32)
        gradients = {}
        for share in ("none", "amplitude"):
            torch.manual_seed(1)
            config = LrLoraConfig(target_modules=["proj"], share=share)
            model = get_peft_model(Chain(), config)
            model(x).square().sum().backward()
            layers = [m for m in model.modules() if isinstance(m, LrLoraLinear)]
            gradients[share] = [la.lrlora_amplitude["default"].weight.grad for la in layers]
        total = torch.stack(gradients["none"]).sum(0)
        torch.testing.assert_close(gradients["amplitude"][0], total)

    def test_deleting_one_adapter_leaves_the_other(self) -> None:
        config = LrLoraConfig(target_modules=["proj"], share="all")
        model, x = get_peft_model(Chain(), config), torch.randn(5, 32)
        model.add_adapter("other", LrLoraConfig(target_modules=["proj"], share="all"))
        model.set_adapter("other")
        model.delete_adapter("default")
        assert torch.equal(model(x), Chain()(x))


class TestGroups:
    def test_every_trained_parameter_is_in_one_group(self) -> None:
        model = one_layer(modules_to_save=None, bias="all")
        groups = lr_lora_param_groups(model, 1e-3)
        assert [(g["name"], g["lr"]) for g in groups] == [
            ("factors", 1e-3),
            ("amplitudes", pytest.approx(1e-4)),
        ]
        held = [id(p) for group in groups for p in group["params"]]
        assert sorted(held) == sorted(id(p) for p in model.parameters() if p.requires_grad)
        assert groups[1]["params"] == [factors_of(adapter_layer(model))["lrlora_amplitude"]]

    @pytest.mark.parametrize("ratio", [1.0, 0.1])
    def test_the_first_step_moves_f_by_what_is_stated(self, ratio: float) -> None:
        model, lr, x = one_layer(), 1e-3, inputs()
        optimizer = torch.optim.Adam(lr_lora_param_groups(model, lr, amplitude_ratio=ratio))
        (model(x) - 1).sum().backward()
        optimizer.step()
        jump = adapter_layer(model).delta_weight("default").abs().mean() / 2
        assert jump.item() == pytest.approx(13.2 * ratio * lr, rel=0.02)

    def test_sinelora_has_one_group(self) -> None:
        groups = lr_lora_param_groups(one_layer(basis="sine"), 1e-3)
        assert [group["name"] for group in groups] == ["factors"]

    @pytest.mark.parametrize("options", [{"lr": 0.0}, {"lr": 1e-3, "amplitude_ratio": -1.0}])
    def test_numbers_are_positive(self, options: dict[str, float]) -> None:
        with pytest.raises(ValueError, match="must be a positive number"):
            lr_lora_param_groups(one_layer(), **options)

    def test_a_model_without_adapters_is_refused(self) -> None:
        with pytest.raises(ValueError, match="no LR-LoRA adapter"):
            lr_lora_param_groups(OneLayer(), 1e-3)


class TestConfig:
    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"r": 0}, "r=0 must be a whole number"),
            ({"rank_pattern": {"a": 2.5}}, r"rank_pattern\['a'\]=2.5 must be a whole number"),
            ({"rank_pattern": {"a.*": 2}}, "rank_pattern key 'a.*' must be a module name"),
            ({"alpha": math.nan}, "alpha=nan must be a positive number"),
            ({"alpha": -1}, "alpha=-1 must be a positive number"),
            ({"points": 1}, "points=1 must be a whole number of at least 2"),
            ({"points": "50"}, "points='50' must be a whole number"),
            ({"span": math.inf}, "span=inf must be a positive number"),
            ({"bandwidth_init": 0}, "bandwidth_init=0 must be a positive number"),
            ({"dropout": 1.0}, r"dropout=1.0 must be a number in \[0, 1\)"),
            ({"basis": "cosine"}, "basis='cosine' must be 'sinc', 'rbf', .* or 'sine'"),
            ({"grid": "even"}, "grid='even' must be"),
            ({"init": "zero"}, "init='zero' must be 'live', 'paper', 'grid_shift' or 'small'"),
            ({"share": "w"}, "share='w' must be"),
            ({"bias": "lora_only"}, "bias='lora_only' must be"),
            ({"basis": "fourier", "grid": "random"}, "grid='random' says nothing about"),
            ({"basis": "sine", "bandwidth": "fixed"}, "bandwidth='fixed' says nothing about"),
            ({"basis": "spline", "init": "grid_shift"}, "init='grid_shift' needs a grid"),
        ],
    )
    def test_wrong_options(self, options: dict[str, Any], match: str) -> None:
        with pytest.raises(ValueError, match=match):
            LrLoraConfig(**options)

    def test_it_is_the_same_after_saving_and_loading(self, tmp_path: Path) -> None:
        config = LrLoraConfig(
            r=4,
            rank_pattern={"b": 2},
            basis="rbf",
            grid="random",
            points=9,
            constant=False,
            target_modules=["a"],
        )
        config.save_pretrained(tmp_path)
        loaded = LrLoraConfig.from_pretrained(tmp_path)
        assert loaded.to_dict() | {"inference_mode": False} == config.to_dict()

    def test_a_rank_the_layer_cannot_have_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"rank 65 of layer exceeds its smaller dimension 64"):
            one_layer(r=65)
