"""The differentiable layer: gradients, what it saves, what it refuses."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dense_tensors import DenseTensors
from rankwise.adapters.transfer import (
    BASES,
    BasisName,
    Evaluation,
    GridKind,
    Transfer,
    evaluate,
    evaluator,
    evaluators,
    passes,
    transfer_linear,
)
from rankwise.adapters.transfer.passes import (
    Merge,
    backward_pass,
    forward_pass,
    largest_norms,
    layer_evaluator,
    tiles,
)
from rankwise.adapters.transfer.scratch import Scratch
from transfer_samples import GRIDS, NAMES, sample

CASES = [
    (name, grid, way)
    for name in NAMES
    for grid in (GRIDS if BASES[name].local else GRIDS[:1])
    for way in ("direct", "fast")
]


def factors(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """x (4, 5), A (2, 5), B (3, 2)."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((4, 5), (2, 5), (3, 2))
    x, a, b = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    return tuple(t.to(dtype).requires_grad_() for t in (x, 0.4 * a, 0.4 * b))  # type: ignore


@pytest.mark.parametrize("constant", [True, False])
@pytest.mark.parametrize(("name", "grid", "way"), CASES)
def test_gradcheck(name: BasisName, grid: GridKind, way: Evaluation, constant: bool) -> None:
    f = sample(name, 6, grid=grid, constant=constant)
    parameters = {
        key: getattr(f, key).clone().requires_grad_()
        for key in ("amplitude", "bandwidth", "grid")
        if getattr(f, key) is not None and name != "sine"
    }
    weight, columns = torch.randn(3, 5).double(), torch.tensor([2.0, 0, 2, 2, 0]).double()

    def function(x: Tensor, a: Tensor, b: Tensor, *values: Tensor) -> Tensor:
        used = replace(f, **dict(zip(parameters, values, strict=True)))
        return transfer_linear(
            x, a, b, used, scale=2.0, weight=weight, columns=columns, evaluation=way
        )

    assert torch.autograd.gradcheck(function, (*factors(), *parameters.values()))


def test_it_is_the_dense_product() -> None:
    (x, a, b), f = factors(), sample()
    weight, bias = torch.randn(3, 5).double(), torch.randn(3).double()
    expected = x @ (weight + 2 * evaluate(b @ a, f)).T + bias
    output = transfer_linear(x, a, b, f, scale=2.0, weight=weight, bias=bias)
    torch.testing.assert_close(output, expected, rtol=1e-13, atol=1e-13)
    alone = transfer_linear(x.view(2, 2, 5), a, b, f, scale=2.0)
    torch.testing.assert_close(alone.view(4, 3), expected - x @ weight.T - bias)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("way", ["direct", "fast"])
def test_without_its_constant_f_goes_through_the_origin(name: BasisName, way: Evaluation) -> None:
    f = sample(name)
    u = torch.linspace(-0.3, 0.3, 31, dtype=torch.float64)  # has a zero in the middle
    moved = evaluate(u, replace(f, constant=False), evaluation=way)
    expected = evaluate(u, f) - evaluate(u[15:16], f)
    torch.testing.assert_close(moved, expected, rtol=1e-9, atol=1e-9)
    assert abs(float(moved[15])) < 1e-9 < float(moved.abs().max())


def test_a_frozen_adapter_passes_the_inputs_gradient_alone() -> None:
    (x, a, b), f = factors(), sample()
    matrix = evaluate(b @ a, f)
    transfer_linear(x, a.detach(), b.detach(), f, scale=1.0).sum().backward()
    torch.testing.assert_close(x.grad, torch.ones(4, 3).double() @ matrix)
    assert a.grad is None and b.grad is None


def test_a_second_derivative_is_refused() -> None:
    (x, a, b), f = factors(), sample()
    output = transfer_linear(x, a, b, f, scale=1.0)
    (gradient,) = torch.autograd.grad(output.sum(), a, create_graph=True)
    with pytest.raises(NotImplementedError, match="LR-LoRA has no second derivative"):
        gradient.sum().backward()


def test_gradients_of_the_frozen_weight_are_refused() -> None:
    (x, a, b), f = factors(), sample()
    weight = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    with pytest.raises(RuntimeError, match="no gradient for weight"):
        transfer_linear(x, a, b, f, scale=1.0, weight=weight)


def test_nan_comes_through() -> None:
    (x, a, b), f = factors(torch.float32), sample(dtype=torch.float32)
    with torch.no_grad():
        a[0, 0] = torch.nan
    output = transfer_linear(x, a, b, f, scale=1.0)
    assert output.isnan().all()
    output.sum().backward()
    assert x.grad is not None and x.grad[:, 0].isnan().all()


def test_f_is_computed_in_fp32_under_bf16_factors() -> None:
    (x, a, b), f = factors(torch.bfloat16), sample(bandwidth=4.0)
    output = transfer_linear(x, a, b, f, scale=1.0)
    assert output.dtype == torch.bfloat16
    matrix = evaluate(b.double() @ a.double(), f)
    expected = x.double() @ matrix.T
    assert (output - expected).abs().max() <= 2**-7 * (x.double().abs() @ matrix.abs().T).max()


SIZE = (600, 500)


GRAIN = 2**15
"""Entries from which on torch shares an elementwise operation between threads."""


def large_layer() -> tuple[Tensor, Tensor, Tensor, Transfer, Tensor]:
    d_out, d_in = SIZE
    x = torch.randn(8, d_in, requires_grad=True)
    a, b = torch.randn(4, d_in) / 20, torch.randn(d_out, 4) / 20
    f = sample(dtype=torch.float32)
    return x, a.requires_grad_(), b.requires_grad_(), f, torch.randn(SIZE)


@pytest.fixture
def scratch(monkeypatch: pytest.MonkeyPatch) -> Scratch:
    """Memory that no test before has used."""
    new = Scratch()
    for module in (passes, evaluators):
        monkeypatch.setattr(module, "scratch", new)
    return new


def test_no_more_than_two_dense_matrices_live_at_a_time(scratch: Scratch) -> None:
    x, a, b, f, weight = large_layer()
    merge = Merge(weight, 1.0, None)
    with torch.no_grad(), DenseTensors(weight) as seen:
        output, used = forward_pass(x, a, b, f, merge, None, "auto", -1.0)
        assert seen.peak == 1
        backward_pass(output, x, a, b, used, merge, for_input=True, for_adapter=True)
        assert seen.peak == 2


def test_layers_in_turn_use_the_same_memory(scratch: Scratch) -> None:
    x, a, b, f, weight = large_layer()
    with torch.inference_mode():  # whose own memory could not be written outside of it
        first = transfer_linear(x, a, b, f, scale=1.0, weight=weight)
    (used,) = scratch.held.values()
    smaller = transfer_linear(x, a, b[:99], f, scale=1.0, weight=weight[:99])
    smaller.sum().backward()
    with torch.no_grad():
        assert torch.equal(transfer_linear(x, a, b, f, scale=1.0, weight=weight), first)
    torch.testing.assert_close(smaller, first[:, :99])
    assert {slot for slot, _ in scratch.held} == {0, 1, 2}  # U, H and rows of T_j(v)
    assert scratch.held[0, torch.float32] is used


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_no_entry_exceeds_the_product_of_the_norms(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        # one direction, so that the bound is reached
        direction = torch.randn(1, 8, generator=generator)
        a, b = direction.T.repeat(1, 5).to(dtype), direction.repeat(6, 1).to(dtype)
        bound = math.prod(largest_norms(a, b)) * (1 + 1e-6)
        assert (b.double() @ a.double()).abs().max() <= bound


@pytest.mark.parametrize("radius", [0.05, 3.0, 100.0])
def test_no_operation_of_a_tile_is_long_enough_for_a_second_thread(radius: float) -> None:
    """Threads that wait for one another after every operation stall on a loaded machine."""
    used = evaluator(sample(dtype=torch.float32), radius, torch.float32)
    matrix = torch.empty(1536, 576)
    assert max(matrix[tile].numel() for tile in tiles(used, matrix)) < GRAIN


@given(st.integers(1, 40), st.integers(1, 60), st.integers(1, 100))
def test_tiles_cover_every_entry_once(rows: int, columns: int, size: int) -> None:
    _, a, b, f, _ = large_layer()
    used = layer_evaluator(f, a.detach(), b.detach(), "auto", -1.0)
    used.block = size
    matrix = torch.zeros(rows, columns)
    for tile in tiles(used, matrix):
        assert matrix[tile].numel() <= size and matrix[tile].is_contiguous()
        matrix[tile] += 1
    assert (matrix == 1).all()


def test_nothing_of_the_size_of_the_weight_is_saved() -> None:
    x, a, b, f, weight = large_layer()
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        transfer_linear(x, a, b, f, scale=1.0, weight=weight)
    large = [t for t in saved if t.numel() >= weight.numel()]
    assert [t.data_ptr() for t in large] == [weight.data_ptr()]
    assert sum(t.numel() for t in saved if t.data_ptr() != weight.data_ptr()) < 10_000


def test_checkpointing_gives_the_same_gradients() -> None:
    (x, a, b), f = factors(torch.float32), sample(dtype=torch.float32)

    def function(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return transfer_linear(x, a, b, f, scale=1.0)

    plain = torch.autograd.grad(function(x, a, b).square().sum(), (x, a, b))
    output = torch.utils.checkpoint.checkpoint(function, x, a, b, use_reentrant=False)
    for found, expected in zip(
        torch.autograd.grad(output.square().sum(), (x, a, b)), plain, strict=True
    ):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("constant", [True, False])
def test_it_compiles_with_its_gradient(constant: bool) -> None:
    (x, a, b), f = factors(torch.float32), sample(dtype=torch.float32, constant=constant)
    amplitude = f.amplitude.clone().requires_grad_()

    def function(x: Tensor, a: Tensor, b: Tensor, amplitude: Tensor) -> Tensor:
        used = replace(f, amplitude=amplitude)
        return transfer_linear(x, a, b, used, scale=1.0).square().sum()

    leaves = (x, a, b, amplitude)
    expected = torch.autograd.grad(function(*leaves), leaves)
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for found, right in zip(torch.autograd.grad(compiled(*leaves), leaves), expected, strict=True):
        torch.testing.assert_close(found, right)
