"""f(B A) as a LoRA of higher rank: monomials, bounds, gradients, and when it is chosen."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations_with_replacement
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from torch import Tensor, nn

from contracts import OneLayer, adapter_layer, inputs
from dense_tensors import DenseTensors
from rankwise import LrLoraConfig
from rankwise.adapters.transfer import (
    BASES,
    BasisName,
    Factorised,
    Transfer,
    factorisation,
    factorised_linear,
    transfer_linear,
)
from rankwise.adapters.transfer.factorised import (
    MAX_FACTORISED,
    MIN_FACTORISED,
    SLOPE,
    TRUNCATION,
    factorised_degree,
    khatri_rao,
    khatri_rao_adjoint,
)
from transfer_samples import NAMES, sample

SMOOTH: list[BasisName] = [name for name in NAMES if name != "spline"]


def problem(radius: float, f: Transfer, tokens: int = 6) -> list[Tensor]:
    """x, A (8, 100), B (90, 8) with `max ||b_i|| max ||a_j||` the radius, and f's tensors."""
    generator = torch.Generator().manual_seed(3)
    x, a, b = (torch.randn(s, generator=generator) for s in ((tokens, 100), (8, 100), (90, 8)))
    a /= a.norm(dim=0).max()
    b *= radius / b.norm(dim=1).max()
    return [x, a, b, *(t for t in (f.amplitude, f.bandwidth, f.grid) if t is not None)]


def filled(f: Transfer, tensors: list[Tensor]) -> Transfer:
    names = [n for n in ("amplitude", "bandwidth", "grid") if getattr(f, n) is not None]
    return replace(f, **dict(zip(names, tensors, strict=True)))


@pytest.mark.parametrize(("r", "degree"), [(1, 3), (3, 1), (3, 2), (4, 3)])
def test_monomials_and_their_gradient(r: int, degree: int) -> None:
    rows = torch.randn(r, 5, dtype=torch.float64, requires_grad=True)
    expected = torch.stack(
        [
            torch.stack([torch.ones(5).double(), *(rows[k] for k in name)]).prod(0)
            for d in range(degree + 1)
            for name in combinations_with_replacement(range(r), d)
        ]
    )
    powers = khatri_rao(rows.detach(), degree)
    assert len(powers) == math.comb(r + degree, degree)
    torch.testing.assert_close(powers, expected.detach())
    upstream = torch.randn_like(powers)
    (gradient,) = torch.autograd.grad(expected, rows, upstream)
    torch.testing.assert_close(khatri_rao_adjoint(rows.detach(), powers, upstream), gradient)


@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize("radius", [0.0, 1e-4, 3e-3, 0.02])
@pytest.mark.parametrize("constant", [True, False])
def test_it_is_the_dense_way_in_fp64_to_its_bound(
    name: BasisName, radius: float, constant: bool
) -> None:
    f = sample(name, 12, dtype=torch.float32, constant=constant)
    if name == "sine":
        radius /= 10
    tensors = problem(radius, f)
    way = factorisation(f, tensors[1], tensors[2], 1)
    if way is None:
        assert factorised_degree(name, BASES[name].reach(f, radius), len(f.amplitude)) in (None, 3)
        return
    weight = torch.randn(90, 100) / 10
    columns = (torch.arange(100) % 3 > 0) * 1.5
    upstream = torch.randn(6, 90)

    def run(dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [
            t.detach().clone().to(dtype).requires_grad_(name != "sine" or i < 3)
            for i, t in enumerate(tensors)
        ]
        x, a, b, *rest = leaves
        options: dict[str, Any] = {"weight": weight.to(dtype), "columns": columns.to(dtype)}
        used = filled(f, rest)
        if dtype == torch.float64:
            output = transfer_linear(x, a, b, used, scale=2.0, **options)
        else:
            output = factorised_linear(x, a, b, used, way, scale=2.0, **options)
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        return output, *torch.autograd.grad(output, wanted, upstream.to(dtype))

    exact, found = run(torch.float64), run(torch.float32)
    # an output is x' (W + 2 f) with 100 terms, of which f is off by TRUNCATION sum |a|
    allowed = 2 * TRUNCATION * float(f.amplitude.abs().sum()) * 100
    allowed += 2e-6 * float(exact[0].detach().abs().max())
    assert (found[0] - exact[0]).abs().max() <= allowed
    for gradient, right in zip(found[1:], exact[1:], strict=True):
        # f' is off by more than f: by the next power of the range
        atol = 2e-4 * float(right.abs().max()) + 1e-11  # at the origin some are zero
        torch.testing.assert_close(gradient.double(), right, rtol=0, atol=atol)


@settings(max_examples=40)
@given(st.sampled_from(SMOOTH), st.floats(-9.0, 1.0), st.integers(0, 9))
def test_the_polynomial_is_as_close_as_promised(
    name: BasisName, log_radius: float, seed: int
) -> None:
    """p at many points, by its own factors of rank 1: U is then any number."""
    f = sample(name, 9, seed=seed)
    radius = math.exp(log_radius)
    degree = factorised_degree(name, BASES[name].reach(f, radius), len(f.amplitude))
    if degree is None:
        return
    b = torch.linspace(-radius, radius, 101, dtype=torch.float64)[:, None]
    a = torch.ones(1, 1, dtype=torch.float64)
    way = Factorised(degree, 1.0, radius)
    p = factorised_linear(a, a, b, f, way, scale=1.0)
    exact = transfer_linear(a, a, b, f, scale=1.0)
    assert (p - exact).abs().max() <= TRUNCATION * float(f.amplitude.abs().sum())


class TestChoice:
    def test_small_ranges_of_wide_layers(self) -> None:
        f = sample(dtype=torch.float32, bandwidth=0.5)
        top = float(f.bandwidth.max()) * math.pi  # type: ignore[union-attr]

        def degree(reach: float, d: int = 2048, r: int = 8, tokens: int = 1024) -> int | None:
            a, b = torch.zeros(r, d), torch.zeros(d, r)
            a[0, 0], b[0, 0] = 1, reach / top
            way = factorisation(f, a, b, tokens)
            return None if way is None else way.degree

        assert [degree(x) for x in (0.0, 5e-5, 0.02, 0.1, 0.3)] == [2, 2, 2, 3, None]
        # 495 monomials are never fewer products than a dense gradient of this size
        assert degree(0.1, d=256) is None
        assert degree(0.1, d=512, tokens=64) == 3
        assert degree(0.02, r=64) is None

    def test_what_cannot_be(self) -> None:
        a, b = torch.zeros(2, 900), torch.zeros(900, 2)
        smooth = sample(dtype=torch.float32)
        assert factorisation(smooth, a, b, 9) is not None
        assert factorisation(smooth, a.double(), b.double(), 9) is None
        assert factorisation(smooth, a.bfloat16(), b.bfloat16(), 9) is None
        assert factorisation(sample("spline", dtype=torch.float32), a, b, 9) is None
        for value in (math.nan, math.inf):
            assert factorisation(smooth, a + value, b, 9) is None

    def test_the_degree_keeps_its_bound(self) -> None:
        for name in SMOOTH:
            for degree in range(MIN_FACTORISED, MAX_FACTORISED + 1):
                reaches = [2.0 ** (i / 4) for i in range(-120, 8)]
                chosen = [x for x in reaches if factorised_degree(name, x, 8) == degree]
                largest = max(chosen)
                log_bound = BASES[name].log_bound
                tail = sum(2 * math.exp(log_bound(j, largest, 8)) for j in range(degree + 1, 60))
                assert tail <= TRUNCATION
                rest = range(degree + 1, 60)
                steep = sum(2 * j * j * math.exp(log_bound(j, largest, 8)) for j in rest)
                assert steep <= SLOPE * min(1.0, largest)


def test_an_even_function_moves_both_factors() -> None:
    """As at the start: `f'(0) = 0`, and the gradients are those of `f''`."""
    f = sample(dtype=torch.float32)
    f = replace(f, amplitude=torch.ones(50), bandwidth=torch.ones(50))
    leaves = [t.requires_grad_() for t in problem(1e-5, f)[:3]]
    way = factorisation(f, leaves[1].detach(), leaves[2].detach(), 1)
    assert way is not None
    upstream = torch.randn(6, 90)
    found = torch.autograd.grad(factorised_linear(*leaves, f, way, scale=1.0), leaves, upstream)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    exact = transfer_linear(*wide, f, scale=1.0)
    for part, right in zip(found, torch.autograd.grad(exact, wide, upstream.double()), strict=True):
        assert right.abs().max() > 0
        assert (part - right).abs().max() <= 0.02 * right.abs().max()


def test_no_matrix_of_the_weights_size_is_formed() -> None:
    f = sample(dtype=torch.float32)
    a, b = torch.randn(4, 500) / 1e3, torch.randn(600, 4) / 1e3
    x, weight = torch.randn(8, 500, requires_grad=True), torch.randn(600, 500)
    leaves = (x, a.requires_grad_(), b.requires_grad_())
    way = factorisation(f, a.detach(), b.detach(), 8)
    assert way is not None
    with DenseTensors(weight) as seen:
        factorised_linear(x, a, b, f, way, scale=1.0, weight=weight).sum().backward()
    assert seen.peak == 0
    assert all(leaf.grad is not None for leaf in leaves)


def test_second_derivatives_and_gradients_of_the_weight_are_refused() -> None:
    f = sample(dtype=torch.float32)
    x, a, b = torch.randn(3, 5), torch.randn(2, 5, requires_grad=True), torch.randn(4, 2)
    way = Factorised(2, 4.0, 4.0)
    output = factorised_linear(x, a, b, f, way, scale=1.0)
    (gradient,) = torch.autograd.grad(output.sum(), a, create_graph=True)
    with pytest.raises(NotImplementedError, match="LR-LoRA has no second derivative"):
        gradient.sum().backward()
    weight = torch.zeros(4, 5, requires_grad=True)
    with pytest.raises(RuntimeError, match="no gradient for weight"):
        factorised_linear(x, a, b, f, way, scale=1.0, weight=weight)


class TestLayer:
    def model(self, **options: Any) -> nn.Module:
        torch.manual_seed(0)
        config = LrLoraConfig(target_modules=["layer"], r=1, init_weights=False, **options)
        model = get_peft_model(OneLayer(), config)
        with torch.no_grad():
            adapter_layer(model).lrlora_B["default"].weight.mul_(1e-3)
        return model.train()

    @pytest.mark.parametrize("dropout", [0.0, 0.3])
    def test_both_ways_agree_and_are_counted(self, dropout: float) -> None:
        model, x = self.model(dropout=dropout), inputs()
        layer = adapter_layer(model)
        gradients, outputs = [], []
        for wide in (1.0, 1e6):
            model.zero_grad()
            torch.manual_seed(1)
            # the same U from the same f; a large bandwidth alone forbids the short polynomial
            with torch.no_grad():
                layer.lrlora_bandwidth["default"].weight[0] = wide
                layer.lrlora_amplitude["default"].weight[0] = 0
            output = model(x)
            output.square().sum().backward()
            outputs.append(output)
            gradients.append([p.grad for p in layer.factors("default")])
        assert layer.lrlora_passes["default"] == [1, 1]
        torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-5, atol=1e-5)
        for small, dense in zip(*gradients, strict=True):
            assert (small - dense).abs().max() <= 5e-3 * dense.abs().max()

    def test_autocast_and_evaluation(self) -> None:
        model, x = self.model(), inputs()
        expected = model(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.testing.assert_close(model(x), expected, rtol=0.05, atol=0.05, check_dtype=False)
        before = list(adapter_layer(model).lrlora_passes["default"])
        model.eval()(x)
        assert adapter_layer(model).lrlora_passes["default"] == before
