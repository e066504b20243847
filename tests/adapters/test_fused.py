"""The fused layer against the obvious expression, and against PEFT's own forward pass."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners import lora
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from contracts import OneLayer, inputs
from rankwise import RaLoraConfig, fuse_lora_, unfuse_lora_
from rankwise.adapters.fuse_lora import FusedLoraLinear
from rankwise.adapters.fused import add_update, frozen_linear, linear_with_update

S = 0.75


def operands(n: int, dtype: torch.dtype = torch.float64, tokens: int = 7) -> list[Tensor]:
    """x, W, bias, A, B of a layer of n blocks 4 x 5, r = 3."""
    generator = torch.Generator().manual_seed(n)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    k, ko, r = 5, 4, 3
    return [
        draw(2, tokens, n * k),
        draw(n * ko, n * k),
        draw(n * ko),
        draw(n, r, k).requires_grad_(),
        draw(n, ko, r).requires_grad_(),
    ]


def reference(x: Tensor, weight: Tensor, bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The dense product."""
    return F.linear(x, weight + S * torch.block_diag(*(b @ a).unbind()), bias)


def separate(
    x: Tensor, weight: Tensor, bias: Tensor, a: Tensor, b: Tensor, *dropout: nn.Module
) -> Tensor:
    return add_update(F.linear(x, weight, bias), x, a, b, S, *dropout)


def joint(
    x: Tensor, weight: Tensor, bias: Tensor, a: Tensor, b: Tensor, *dropout: nn.Module
) -> Tensor:
    return linear_with_update(x, weight, bias, a, b, S, *dropout)


def saved_for_backward(function: Callable[[], Tensor]) -> list[Tensor]:
    """What autograd keeps of a forward pass."""
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor
    ):
        function()
    return saved


both_ways = pytest.mark.parametrize("way", [separate, joint])
some_blocks = pytest.mark.parametrize("n", [1, 2, 4])


@both_ways
@some_blocks
class TestFunction:
    def test_first_and_second_derivatives(self, way: Callable[..., Tensor], n: int) -> None:
        x, weight, bias, a, b = operands(n, tokens=2)
        x.requires_grad_()

        def function(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
            return way(x, weight, bias, a, b)

        assert torch.autograd.gradcheck(function, (x, a, b))
        assert torch.autograd.gradgradcheck(function, (x, a, b))

    def test_it_is_the_dense_product_in_fp32(self, way: Callable[..., Tensor], n: int) -> None:
        wide, narrow = operands(n), operands(n, torch.float32)
        wide[0].requires_grad_()
        narrow[0].requires_grad_()
        expected, output = reference(*wide), way(*narrow)
        torch.testing.assert_close(output.double(), expected, rtol=0, atol=1e-6 * 20)
        upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
        expected.backward(upstream.double())
        output.backward(upstream)
        for ours, theirs in zip(narrow, wide, strict=True):
            if theirs.requires_grad:
                scale = theirs.grad.abs().max()
                assert (ours.grad.double() - theirs.grad).abs().max() <= 1e-6 * scale

    def test_inputs_are_not_changed(self, way: Callable[..., Tensor], n: int) -> None:
        given = operands(n)
        before = [tensor.clone() for tensor in given]
        way(*given).sum().backward()
        assert all(torch.equal(old, new) for old, new in zip(before, given, strict=True))

    def test_any_layout_of_input_and_gradient(self, way: Callable[..., Tensor], n: int) -> None:
        x, *rest = operands(n)
        strided = x.transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
        assert not strided.is_contiguous()
        contiguous = x.clone().requires_grad_()
        way(strided, *rest).sum().backward()  # the gradient of a sum is one number, expanded
        reference(contiguous, *rest).sum().backward()
        torch.testing.assert_close(strided.grad, contiguous.grad)

    def test_only_what_is_wanted_is_computed(self, way: Callable[..., Tensor], n: int) -> None:
        x, weight, bias, a, b = operands(n)
        a.requires_grad_(False)
        way(x, weight, bias, a, b).sum().backward()
        assert x.grad is None and a.grad is None and b.grad is not None

    def test_what_is_kept_for_the_backward_pass(self, way: Callable[..., Tensor], n: int) -> None:
        given = operands(n)
        saved = saved_for_backward(lambda: way(*given))
        z = torch.Size((n, 2 * 7, 3))
        assert (z in [tensor.shape for tensor in saved]) is (n == 1)
        assert max(t.numel() for t in saved) <= max(t.numel() for t in given)

    def test_dropout_is_that_of_torch(self, way: Callable[..., Tensor], n: int) -> None:
        dropout, given, expected = nn.Dropout(0.3), operands(n), operands(n)
        for x, *_ in (given, expected):
            x.requires_grad_()
        torch.manual_seed(6)
        ours = way(*given, dropout)
        torch.manual_seed(6)
        x, weight, bias, a, b = expected
        delta = S * torch.block_diag(*(b @ a).unbind())
        theirs = F.linear(x, weight, bias) + F.linear(dropout(x), delta)
        torch.testing.assert_close(ours, theirs)
        for output in (ours, theirs):
            output.square().sum().backward()
        for mine, other in zip(given, expected, strict=True):
            torch.testing.assert_close(mine.grad, other.grad)

    def test_dropout_twice_differentiated(self, way: Callable[..., Tensor], n: int) -> None:
        x, weight, bias, a, b = operands(n, tokens=2)
        x.requires_grad_()

        def function(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
            torch.manual_seed(6)
            return way(x, weight, bias, a, b, nn.Dropout(0.5))

        assert torch.autograd.gradcheck(function, (x, a, b))
        assert torch.autograd.gradgradcheck(function, (x, a, b))

    @pytest.mark.parametrize(
        ("dropout", "kept"), [(nn.Dropout(0.5).eval(), 1), (nn.Dropout(0.0), 1), (nn.Dropout(1), 0)]
    )
    def test_dropout_of_all_or_nothing(
        self, way: Callable[..., Tensor], n: int, dropout: nn.Module, kept: int
    ) -> None:
        given = operands(n)
        x, weight, bias, *_ = given
        expected = reference(*given) if kept else F.linear(x, weight, bias)
        torch.testing.assert_close(way(*given, dropout), expected)

    def test_dropout_keeps_the_input_itself_and_a_byte_an_entry(
        self, way: Callable[..., Tensor], n: int
    ) -> None:
        given = operands(n)
        saved = saved_for_backward(lambda: way(*given, nn.Dropout(0.5)))
        as_large = [t for t in saved if t.shape == given[0].shape]
        assert {t.dtype for t in as_large} == {torch.float64, torch.bool}
        own = {t.data_ptr() for t in given}
        assert all(t.data_ptr() in own for t in as_large if t.dtype != torch.bool)

    @pytest.mark.parametrize("dropout", [(), (nn.Dropout(0.5),)])
    def test_it_compiles_with_its_backward_pass(
        self, way: Callable[..., Tensor], n: int, dropout: tuple[nn.Module, ...]
    ) -> None:
        def gradients(function: Callable[..., Tensor]) -> tuple[Tensor, ...]:
            given = operands(n)
            given[0].requires_grad_()
            torch.manual_seed(6)
            loss = function(*given, *dropout).square().sum()
            return torch.autograd.grad(loss, [t for t in given if t.requires_grad])

        torch._dynamo.reset()
        compiled = torch.compile(way, fullgraph=True, backend="aot_eager")
        for ours, expected in zip(gradients(compiled), gradients(way), strict=True):
            torch.testing.assert_close(ours, expected)

    def test_functional_transforms(self, way: Callable[..., Tensor], n: int) -> None:
        x, weight, bias, a, b = operands(n)
        gradient = torch.func.grad(lambda a: way(x, weight, bias, a, b).square().sum())(a)
        (expected,) = torch.autograd.grad(reference(x, weight, bias, a, b).square().sum(), a)
        torch.testing.assert_close(gradient, expected)


def test_a_narrow_input_is_kept_as_it_is() -> None:
    x, weight, bias, a, b = operands(2, torch.float32)
    half = x.bfloat16().requires_grad_()
    result = F.linear(half.detach(), weight.bfloat16(), bias.bfloat16())
    saved = saved_for_backward(lambda: add_update(result, half, a, b, S))
    as_large = [t for t in saved if t.shape == x.shape]
    assert [t.data_ptr() for t in as_large] == [half.data_ptr()]
    output = add_update(result, half, a, b, S)
    expected = result.float() + S * F.linear(half.float(), torch.block_diag(*(b @ a).unbind()))
    torch.testing.assert_close(output, expected)
    ours = torch.autograd.grad(output.square().sum(), (half, a, b))
    theirs = torch.autograd.grad(expected.square().sum(), (half, a, b))
    assert ours[0].dtype == torch.bfloat16
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_computes_in_its_dtype(dtype: torch.dtype) -> None:
    x, weight, bias, a, b = operands(2, torch.float32)
    with torch.autocast("cpu", dtype):
        output = separate(x, weight, bias, a, b)
        expected = F.linear(x, weight, bias) + S * F.linear(x, torch.block_diag(*(b @ a).unbind()))
    assert output.dtype == expected.dtype == dtype
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(output, expected, rtol=tolerance, atol=tolerance * 10)
    output.float().sum().backward()
    assert a.grad.dtype == b.grad.dtype == torch.float32


class TestFrozenLinear:
    X, FACTOR = torch.zeros(2, 6), torch.zeros(1, 3, 6)

    def frozen(self, kind: str = "Linear") -> nn.Module:
        layer = nn.Linear(6, 4) if kind == "Linear" else Conv1D(4, 6)
        return layer.requires_grad_(False)

    @pytest.mark.parametrize("kind", ["Linear", "Conv1D"])
    def test_plain_layers(self, kind: str) -> None:
        found = frozen_linear(self.frozen(kind), self.X, self.FACTOR)
        assert found is not None and found[0].shape == (4, 6)

    @pytest.mark.parametrize(
        "spoil",
        [
            lambda layer: layer.weight.requires_grad_(),
            lambda layer: layer.bias.requires_grad_(),
            lambda layer: layer.double(),
            lambda layer: layer.register_forward_hook(lambda *_: None),
            lambda layer: layer.register_forward_pre_hook(lambda *_: None),
            lambda layer: layer.register_full_backward_hook(lambda *_: None),
            lambda layer: setattr(layer, "forward", layer.forward),
            lambda layer: setattr(layer, "__class__", type("Other", (nn.Linear,), {})),
        ],
    )
    def test_anything_else_is_called_as_it_is(self, spoil: Callable[[nn.Module], Any]) -> None:
        layer = self.frozen()
        spoil(layer)
        assert frozen_linear(layer, self.X, self.FACTOR) is None

    def test_autocast(self) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            assert frozen_linear(self.frozen(), self.X, self.FACTOR) is None

    def test_hooks_of_the_base_layer_run(self) -> None:
        model = get_peft_model(OneLayer(), RaLoraConfig(r=2, blocks=2, target_modules=["layer"]))
        calls = []
        model.base_model.model.layer.base_layer.register_forward_hook(lambda *_: calls.append(1))
        model(inputs())
        assert calls == [1]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("n", [1, 4])
def test_a_quantised_base(bits: int, n: int) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    if bits == 4:
        base = bnb.nn.Linear4bit(64, 96, compute_dtype=torch.float32)
    else:
        base = bnb.nn.Linear8bitLt(64, 96, has_fp16_weights=False)
    model = nn.Sequential(base.to("cpu"))
    x = torch.randn(3, 64)
    frozen = model(x).detach()
    config = RaLoraConfig(r=4, blocks=n, target_modules=["0"], init_weights=False)
    layer = get_peft_model(model, config).base_model.model[0]
    assert frozen_linear(layer.base_layer, x, x) is None
    factors = [f.detach().clone().requires_grad_() for f in layer.factors("default")]
    expected = frozen + layer.scaling["default"] * x @ torch.block_diag(*factors[1] @ factors[0]).T
    output = layer(x)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    output.square().sum().backward()
    expected.square().sum().backward()
    for ours, theirs in zip(layer.factors("default"), factors, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4)


def lora_model(kind: str = "Linear", *, dropout: float = 0.0, **options: Any) -> PeftModel:
    torch.manual_seed(2)
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        lora_dropout=dropout,
        target_modules=["layer"],
        fan_in_fan_out=kind == "Conv1D",
        init_lora_weights=False,
        **options,
    )
    return get_peft_model(OneLayer(kind), config)


def layer_of(model: nn.Module) -> lora.Linear:
    return model.base_model.model.layer


def outcome(model: nn.Module) -> dict[str, Tensor]:
    """Output and all gradients, in training mode, from one seed."""
    x = inputs().requires_grad_()
    model.zero_grad()
    torch.manual_seed(5)
    output = model.train()(x)
    output.square().sum().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"output": output.detach(), "x": x.grad, **grads}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert (ours[name] - expected).abs().max() <= 1e-6 * expected.abs().max(), name


class TestFuseLora:
    @pytest.mark.parametrize("kind", ["Linear", "Conv1D"])
    @pytest.mark.parametrize("dropout", [0.0, 0.5])
    @pytest.mark.parametrize("use_rslora", [False, True])
    def test_same_numbers(self, kind: str, dropout: float, use_rslora: bool) -> None:
        model = lora_model(kind, dropout=dropout, use_rslora=use_rslora)
        expected = outcome(model)
        assert fuse_lora_(model) == ["base_model.model.layer"]
        assert type(layer_of(model)) is FusedLoraLinear
        assert_same(outcome(model), expected)

    def test_it_is_undone_and_may_be_repeated(self) -> None:
        model = lora_model()
        expected = model(inputs())
        assert fuse_lora_(model) == fuse_lora_(model) == unfuse_lora_(model)
        assert type(layer_of(model)) is lora.Linear
        assert unfuse_lora_(model) == []
        assert torch.equal(model(inputs()), expected)

    def test_one_or_several_active_adapters(self) -> None:
        model = lora_model()
        model.add_adapter(
            "other", LoraConfig(r=2, target_modules=["layer"], init_lora_weights=False)
        )
        for active in ("default", "other", ["default", "other"]):
            model.base_model.set_adapter(active)
            unfuse_lora_(model)
            expected = outcome(model)
            fuse_lora_(model)
            assert_same(outcome(model), expected)

    @pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}])
    def test_what_it_cannot_do_is_left_alone(
        self, options: dict[str, Any], caplog: pytest.LogCaptureFixture
    ) -> None:
        model = lora_model(**options)
        with caplog.at_level("INFO", logger="rankwise"):
            assert fuse_lora_(model) == []
        assert "base_model.model.layer is not fused: adapter 'default'" in caplog.text
        assert type(layer_of(model)) is lora.Linear

    @pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}])
    def test_an_adapter_added_later_that_it_cannot_do(self, options: dict[str, Any]) -> None:
        model = lora_model()
        fuse_lora_(model)
        config = LoraConfig(r=2, target_modules=["layer"], init_lora_weights=False, **options)
        model.add_adapter("other", config)
        model.set_adapter("other")
        ours = outcome(model)
        unfuse_lora_(model)
        assert_same(ours, outcome(model))

    def test_batches_of_mixed_adapters(self) -> None:
        model = lora_model().eval()
        model.add_adapter("other", LoraConfig(r=2, target_modules=["layer"]))
        names = ["default", "__base__"]
        expected = model(inputs(), adapter_names=names)
        fuse_lora_(model)
        assert torch.equal(model(inputs(), adapter_names=names), expected)

    def test_a_bf16_base_under_fp32_factors(self) -> None:
        config = LoraConfig(r=4, target_modules=["layer"], init_lora_weights=False)
        model = get_peft_model(OneLayer(dtype=torch.bfloat16), config)
        x = inputs(torch.bfloat16)
        expected = model(x)
        fuse_lora_(model)
        torch.testing.assert_close(model(x), expected, rtol=2**-7, atol=2**-7)

    def test_merging_disabling_and_files(self, tmp_path: Path) -> None:
        model = lora_model().eval()
        x, base = inputs(), OneLayer()(inputs())
        model.save_pretrained(tmp_path / "before")
        fuse_lora_(model)
        live = model(x)
        model.save_pretrained(tmp_path / "after")
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            before, after = ((tmp_path / when / file).read_bytes() for when in ("before", "after"))
            assert before == after
        with model.disable_adapter():
            assert torch.equal(model(x), base)
        model.merge_adapter()
        torch.testing.assert_close(model(x), live, rtol=1e-5, atol=1e-5)
        model.unmerge_adapter()
        torch.testing.assert_close(model(x), live, rtol=1e-5, atol=1e-5)
        merged = model.merge_and_unload(safe_merge=True)
        assert type(merged.layer) is nn.Linear
        torch.testing.assert_close(merged(x), live, rtol=1e-5, atol=1e-5)

    def test_copies_and_pickles_stay_fused_and_independent(self) -> None:
        model = lora_model().eval()
        fuse_lora_(model)
        layer = layer_of(model)
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            twin.lora_B["default"].weight.data.zero_()
            assert type(twin) is FusedLoraLinear
            assert torch.equal(twin(inputs()), OneLayer().layer(inputs()))
        assert not torch.equal(layer(inputs()), OneLayer().layer(inputs()))

    def test_it_compiles_without_graph_breaks(self) -> None:
        model = lora_model().eval()
        fuse_lora_(model)
        expected = model(inputs())
        torch._dynamo.reset()
        compiled = torch.compile(layer_of(model), fullgraph=True, backend="eager")
        assert torch.equal(compiled(inputs()), expected)

    def test_a_model_trained_fused_loads_unfused(self, tmp_path: Path) -> None:
        model = lora_model()
        fuse_lora_(model)
        optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=1e-4)
        outcome(model)
        optimizer.step()
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(OneLayer(), tmp_path)
        torch.testing.assert_close(loaded(inputs()), model.eval()(inputs()), rtol=1e-6, atol=1e-6)
        assert len(load_file(tmp_path / "adapter_model.safetensors")) == 2
