"""Every adapter, in every dtype, on every kind of layer (see contracts.py)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from contracts import (
    AdapterCase,
    OneLayer,
    adapted,
    adapter_layer,
    assert_close,
    every_adapter,
    every_dtype,
    every_layer_kind,
    factors_of,
    inputs,
    reference_output,
    train_by_chance_,
)

KEYED = (dict, nn.ModuleDict, nn.ParameterDict)
"""What a layer keeps by adapter name."""


def wide_factors(model: nn.Module, adapter: str = "default") -> dict[str, Tensor]:
    """fp64 copies of an adapter's factors, as leaves."""
    factors = factors_of(adapter_layer(model), adapter)
    return {name: f.detach().double().clone().requires_grad_() for name, f in factors.items()}


def dense_delta(case: AdapterCase, model: nn.Module, adapter: str = "default") -> Tensor:
    return case.reference_delta(wide_factors(model, adapter)).detach()


@every_adapter
@every_dtype
@every_layer_kind
class TestEveryDtype:
    def test_a_fresh_adapter_is_the_base_bit_for_bit(
        self, case: AdapterCase, dtype: torch.dtype, kind: str
    ) -> None:
        x = inputs(dtype)
        assert torch.equal(adapted(case, kind, dtype, trained=False)(x), OneLayer(kind, dtype)(x))

    def test_forward_is_the_dense_product(
        self, case: AdapterCase, dtype: torch.dtype, kind: str
    ) -> None:
        model, base, x = adapted(case, kind, dtype), OneLayer(kind, dtype), inputs(dtype)
        output = model(x)
        assert output.dtype == dtype
        assert_close(output, reference_output(x, base, [dense_delta(case, model)]), dtype)

    @pytest.mark.parametrize("shape", [(), (7,), (2, 3, 4)], ids=str)
    def test_any_batch_shape_will_do(
        self, case: AdapterCase, dtype: torch.dtype, kind: str, shape: tuple[int, ...]
    ) -> None:
        model, base = adapted(case, kind, dtype), OneLayer(kind, dtype)
        x = inputs(dtype, *shape) if shape else inputs(dtype, 1)[0]
        assert_close(model(x), reference_output(x, base, [dense_delta(case, model)]), dtype)

    def test_gradients_are_those_of_the_dense_product(
        self, case: AdapterCase, dtype: torch.dtype, kind: str
    ) -> None:
        model, base = adapted(case, kind, dtype), OneLayer(kind, dtype)
        x = inputs(dtype).requires_grad_()
        output = model(x)
        upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(4)).to(dtype)
        output.backward(upstream)

        factors, wide_x = wide_factors(model), x.detach().double().requires_grad_()
        expected = reference_output(wide_x, base, [case.reference_delta(factors)])
        expected.backward(upstream.double())

        assert_close(x.grad, wide_x.grad, dtype)
        for name, factor in factors_of(adapter_layer(model)).items():
            slack = case.slack if name in case.summed else 1
            assert_close(factor.grad, factors[name].grad, dtype, slack)

    def test_merged_equals_unmerged(self, case: AdapterCase, dtype: torch.dtype, kind: str) -> None:
        model, base, x = adapted(case, kind, dtype), OneLayer(kind, dtype), inputs(dtype)
        expected = reference_output(x, base, [dense_delta(case, model)])
        merged = model.merge_and_unload(safe_merge=True)
        assert type(merged.layer) is type(base.layer)
        assert merged.layer.weight.dtype == dtype
        assert_close(merged(x), expected, dtype)

    def test_unmerging_restores_weight_and_output(
        self, case: AdapterCase, dtype: torch.dtype, kind: str
    ) -> None:
        model, base, x = adapted(case, kind, dtype), OneLayer(kind, dtype), inputs(dtype)
        before = model(x)
        model.merge_adapter()
        weight = adapter_layer(model).get_base_layer().weight
        assert not torch.equal(weight, base.layer.weight)
        model.unmerge_adapter()
        assert_close(weight, base.layer.weight, dtype)
        assert_close(model(x), before, dtype)

    def test_disabling_is_the_base_bit_for_bit(
        self, case: AdapterCase, dtype: torch.dtype, kind: str
    ) -> None:
        model, x = adapted(case, kind, dtype), inputs(dtype)
        before, base_output = model(x), OneLayer(kind, dtype)(x)
        with model.disable_adapter():
            assert torch.equal(model(x), base_output)
        assert not torch.equal(before, base_output)
        assert torch.equal(model(x), before)

    def test_active_adapters_add_up(self, case: AdapterCase, dtype: torch.dtype, kind: str) -> None:
        model, base, x = two_adapters(case, kind, dtype), OneLayer(kind, dtype), inputs(dtype)
        first, second = dense_delta(case, model), dense_delta(case, model, "other")
        assert_close(model(x), reference_output(x, base, [first]), dtype)
        model.set_adapter("other")
        assert_close(model(x), reference_output(x, base, [second]), dtype)
        model.base_model.set_adapter(["default", "other"])
        assert_close(model(x), reference_output(x, base, [first, second]), dtype)
        model.merge_adapter()
        assert_close(model(x), reference_output(x, base, [first, second]), dtype)


def two_adapters(
    case: AdapterCase, kind: str = "Linear", dtype: torch.dtype = torch.float32
) -> PeftModel:
    model = adapted(case, kind, dtype)
    model.add_adapter("other", case.config(), autocast_adapter_dtype=False)
    train_by_chance_(model, "other", seed=5)
    return model


@every_adapter
@every_layer_kind
def test_gradcheck(case: AdapterCase, kind: str) -> None:
    model = adapted(case, kind, torch.float64)
    names, factors = zip(*factors_of(adapter_layer(model)).items(), strict=True)
    paths = [f"base_model.model.layer.{name}.default.weight" for name in names]

    def function(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(model, dict(zip(paths, values, strict=True)), (x,))

    x = inputs(torch.float64, 2).requires_grad_()
    leaves = [factor.detach().clone().requires_grad_() for factor in factors]
    assert torch.autograd.gradcheck(function, (x, *leaves))


@every_adapter
@every_dtype
@every_layer_kind
class TestBrokenAdapters:
    def test_safe_merge_refuses_and_leaves_the_weight(
        self, case: AdapterCase, dtype: torch.dtype, kind: str
    ) -> None:
        model = adapted(case, kind, dtype)
        self.break_(model, "default")
        self.check_refused(model, OneLayer(kind, dtype))

    def test_a_broken_second_adapter_leaves_the_first_unmerged(
        self, case: AdapterCase, dtype: torch.dtype, kind: str
    ) -> None:
        model = two_adapters(case, kind, dtype)
        model.base_model.set_adapter(["default", "other"])
        self.break_(model, "other")
        self.check_refused(model, OneLayer(kind, dtype))

    @staticmethod
    def break_(model: PeftModel, adapter: str) -> None:
        for factor in factors_of(adapter_layer(model), adapter).values():
            factor.data.flatten()[0] = torch.nan

    @staticmethod
    def check_refused(model: PeftModel, base: OneLayer) -> None:
        layer = adapter_layer(model)
        with pytest.raises(ValueError, match="non-finite"):
            model.merge_adapter(safe_merge=True)
        assert torch.equal(layer.get_base_layer().weight, base.layer.weight)
        assert not layer.merged


@every_adapter
@every_layer_kind
class TestMixedPrecision:
    """A bf16 base under fp32 factors, which is what PEFT makes of it by default."""

    def test_factors_are_fp32_and_output_is_bf16(self, case: AdapterCase, kind: str) -> None:
        model = adapted(case, kind, torch.bfloat16, autocast_adapter_dtype=True)
        assert {f.dtype for f in factors_of(adapter_layer(model)).values()} == {torch.float32}
        x = inputs(torch.bfloat16)
        expected = reference_output(x, OneLayer(kind, torch.bfloat16), [dense_delta(case, model)])
        output = model(x)
        assert output.dtype == torch.bfloat16
        assert_close(output, expected, torch.bfloat16)
        assert_close(model.merge_and_unload()(x), expected, torch.bfloat16)

    def test_the_update_is_computed_in_the_precision_of_the_factors(
        self, case: AdapterCase, kind: str
    ) -> None:
        model = adapted(case, kind, torch.bfloat16, autocast_adapter_dtype=True)
        layer = adapter_layer(model)
        for parameter in layer.get_base_layer().parameters():
            parameter.data.zero_()
        x = inputs(torch.bfloat16)
        expected = x.double() @ dense_delta(case, model).T
        # one rounding to bf16 of a value that is right to fp32
        assert ((model(x).double() - expected).abs() <= 2**-8 * expected.abs() + 1e-6).all()

    def test_fresh_is_the_base_bit_for_bit(self, case: AdapterCase, kind: str) -> None:
        model = adapted(case, kind, torch.bfloat16, trained=False, autocast_adapter_dtype=True)
        x = inputs(torch.bfloat16)
        assert torch.equal(model(x), OneLayer(kind, torch.bfloat16)(x))

    def test_adapters_of_different_dtypes_side_by_side(self, case: AdapterCase, kind: str) -> None:
        model = adapted(case, kind, torch.bfloat16, autocast_adapter_dtype=True)
        model.add_adapter("narrow", case.config(), autocast_adapter_dtype=False)
        train_by_chance_(model, "narrow", seed=5)
        model.base_model.set_adapter(["default", "narrow"])
        deltas = [dense_delta(case, model), dense_delta(case, model, "narrow")]
        x = inputs(torch.bfloat16)
        expected = reference_output(x, OneLayer(kind, torch.bfloat16), deltas)
        assert_close(model(x), expected, torch.bfloat16)


@every_adapter
class TestDropout:
    def test_it_drops_the_adapters_input_in_training(self, case: AdapterCase) -> None:
        model, x = adapted(case, dtype=torch.float64, dropout=0.5), inputs(torch.float64)
        model.train()
        torch.manual_seed(6)
        output = model(x)
        torch.manual_seed(6)
        dropped = case.drop(x, 0.5)
        base = OneLayer(dtype=torch.float64)
        expected = base(x) + dropped @ dense_delta(case, model).T
        assert_close(output, expected, torch.float64)

    def test_it_does_nothing_in_evaluation(self, case: AdapterCase) -> None:
        x = inputs(torch.float64)
        dropping = adapted(case, dtype=torch.float64, dropout=0.5)
        assert torch.equal(dropping(x), adapted(case, dtype=torch.float64)(x))


@every_adapter
class TestSeveralAdapters:
    def test_only_the_active_adapter_trains(self, case: AdapterCase) -> None:
        model = two_adapters(case)
        layer = adapter_layer(model)
        for active, idle in (("default", "other"), ("other", "default")):
            model.set_adapter(active)
            assert all(f.requires_grad for f in factors_of(layer, active).values())
            assert not any(f.requires_grad for f in factors_of(layer, idle).values())

    def test_deleting_one_leaves_no_trace_of_it_and_the_other_as_it_was(
        self, case: AdapterCase
    ) -> None:
        model, x = two_adapters(case), inputs()
        model.set_adapter("other")
        expected = model(x)
        model.delete_adapter("default")
        assert torch.equal(model(x), expected)
        layer = adapter_layer(model)
        assert layer._all_available_adapter_names() == ["other"]
        assert not any("default" in name for name in model.state_dict())
        by_adapter = [*vars(layer).values(), *layer.children()]
        assert not any("default" in kept for kept in by_adapter if isinstance(kept, KEYED))

    def test_unmerging_subtracts_every_merged_adapter(self, case: AdapterCase) -> None:
        model = two_adapters(case, dtype=torch.float64)
        model.merge_adapter(["default"])
        with pytest.warns(UserWarning, match="additionally merging other"):
            model.merge_adapter(["other"])
        layer = adapter_layer(model)
        assert layer.merged_adapters == ["default", "other"]
        model.unmerge_adapter()
        assert not layer.merged
        assert_close(layer.weight, OneLayer(dtype=torch.float64).layer.weight, torch.float64)

    def test_merging_twice_merges_once(self, case: AdapterCase) -> None:
        model, x = adapted(case), inputs()
        model.merge_adapter()
        expected = model(x)
        with pytest.warns(UserWarning, match="already merged"):
            model.merge_adapter()
        assert torch.equal(model(x), expected)

    def test_disabling_a_merged_adapter_unmerges_it(self, case: AdapterCase) -> None:
        model, x = adapted(case, dtype=torch.float64), inputs(torch.float64)
        model.merge_adapter()
        with model.disable_adapter():
            assert_close(model(x), OneLayer(dtype=torch.float64)(x), torch.float64)


@every_adapter
def test_unmerging_what_is_not_merged_warns(case: AdapterCase) -> None:
    model = adapted(case)
    weight = adapter_layer(model).weight.clone()
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.unmerge_adapter()
    assert torch.equal(adapter_layer(model).weight, weight)


@every_adapter
@pytest.mark.parametrize("active", [["default"], ["default", "other"]], ids=len)
def test_the_layer_compiles_without_graph_breaks(case: AdapterCase, active: list[str]) -> None:
    model, x = two_adapters(case), inputs()
    model.base_model.set_adapter(active)
    layer = adapter_layer(model)

    def step(forward: Callable[[Tensor], Tensor]) -> list[Tensor]:
        layer.zero_grad()
        output = forward(x)
        output.square().sum().backward()
        grads = [p.grad for p in layer.parameters() if p.grad is not None]
        assert grads
        return [output.detach(), *grads]

    expected = step(layer)
    torch._dynamo.reset()
    # "aot_eager" traces both passes as a compiler would, without the minutes of generating code
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(step(compiled), expected, strict=True):
        assert_close(ours, theirs, torch.float32)


@every_adapter
def test_a_compiled_layer_that_trains_is_compiled_once(case: AdapterCase) -> None:
    layer, x = adapter_layer(two_adapters(case)).train(), inputs()
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    compiled(x).square().sum().backward()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            compiled(x).square().sum().backward()


@every_adapter
def test_other_layers_are_refused(case: AdapterCase) -> None:
    model = OneLayer()
    model.layer = nn.Conv2d(3, 3, 1)  # type: ignore[assignment]
    with pytest.raises(TypeError, match="Conv2d cannot carry this adapter"):
        get_peft_model(model, case.config())


@every_adapter
def test_rows_for_different_adapters_are_refused_and_not_mixed_up(case: AdapterCase) -> None:
    model, x = adapted(case, "Linear", torch.float32), inputs(torch.float32)
    before = model(x)
    with pytest.raises(NotImplementedError, match="computes a batch with one adapter"):
        model(x, adapter_names=["default"] * len(x))
    assert torch.equal(model(x), before)
