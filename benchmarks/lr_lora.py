"""LR-LoRA: its function against the loop over K and one product, layers, and a step of SmolLM2."""

from __future__ import annotations

import copy
import math
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import rankwise as rw
from benchmarks.adapters import layer_step
from benchmarks.text import LENGTH, frozen_model, text_batches
from benchmarks.timing import Row, at_most, interleaved
from rankwise.adapters import LrLoraLinear
from rankwise.adapters.transfer import (
    Evaluation,
    Transfer,
    evaluate,
    evaluator,
    factorisation,
    factorised_linear,
    grid_points,
)
from rankwise.adapters.transfer.passes import tiles

TOKENS, RANK = 1024, 8


def measure(*, quick: bool) -> list[Row]:
    """Function, cost in K, factorised layers, and whole training steps."""
    with _one_thread():  # as the targets were measured; f takes one, products take all
        rows = [*_function(quick), *_in_k(quick)]
    return [*rows, *_factorised(quick), *_step(quick)]


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _sinc(points: int) -> Transfer:
    torch.manual_seed(0)
    grid = grid_points("uniform", points, 3.0).float()
    return Transfer("sinc", 3.0, 0.3 * torch.randn(points), torch.ones(points), grid)


def _loop(u: Tensor, h: Tensor, f: Transfer) -> None:
    """f and all its gradients as the paper's formulas are written, one k after the other."""
    assert f.bandwidth is not None and f.grid is not None
    value, slope, amplitudes, widths = torch.zeros_like(u), torch.zeros_like(u), [], []
    for a, w, g in zip(f.amplitude, f.bandwidth, f.grid, strict=True):
        offset = u - g
        t = w * offset
        phi = torch.sinc(t)
        derivative = (torch.cos(math.pi * t) - phi) / t
        value.add_(phi, alpha=float(a))
        slope.add_(derivative, alpha=float(a * w))
        amplitudes.append((h * phi).sum())
        widths.append(a * (h * offset * derivative).sum())
    slope.mul_(h)


def _ours(u: Tensor, h: Tensor, f: Transfer, evaluation: Evaluation = "auto") -> Callable[[], None]:
    """f and all its gradients in memory that is there, as a layer runs them."""
    radius, (entries, weights) = float(u.abs().max()), (torch.empty_like(u), torch.empty_like(h))

    def run() -> None:
        used = evaluator(f, radius, u.dtype, evaluation)
        torch.mul(u, used.scale, out=entries)
        for tile in tiles(used, entries):
            used.value_(entries[tile])
        torch.mul(u, used.scale, out=entries)
        weights.copy_(h)
        for tile in tiles(used, entries):
            used.backward_(entries[tile], weights[tile])
        used.gradients()

    return run


def _entries(d_out: int, d_in: int, radius: float) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    u = radius * (2 * torch.rand(d_out, d_in, generator=generator) - 1)
    return u, torch.randn(d_out, d_in, generator=generator)


def _function(quick: bool) -> list[Row]:
    """f once and its gradients once, K = 50, in units of the loop and of one product."""
    rows, f = [], _sinc(50)
    cases = [((1536, 576), 0.7, 1 / 40), ((1536, 576), 4.0, 1 / 15)]
    if not quick:
        cases += [((2048, 2048), 0.7, 1 / 100), ((2048, 2048), 0.05, 1 / 100)]
    for (d_out, d_in), radius, of_loop in cases:
        u, h = _entries(d_out, d_in, radius)
        x, weight = torch.randn(TOKENS, d_in), torch.randn(d_out, d_in)
        candidates = {"ours": _ours(u, h, f), "product": lambda x=x, weight=weight: x @ weight.T}
        if d_in == 2048:
            candidates["compiled"] = _ours(u, h, f, "compiled")
        seconds = interleaved(3 if quick else 9, **candidates)
        loop = interleaved(1 if quick else 2, loop=lambda u=u, h=h: _loop(u, h, f))["loop"]
        name = f"LR-LoRA f and gradients, one thread, {d_out} x {d_in}, |U| <= {radius:g}"
        rows.append(at_most(f"{name}, time", seconds["ours"] / loop, of_loop, "of the loop over K"))
        product, unit = seconds["ours"] / seconds["product"], f"of x W' at {TOKENS} tokens"
        if "compiled" in seconds:
            rows.append(at_most(f"{name}, eager", product, 0.4, unit))
            compiled = seconds["compiled"] / seconds["product"]
            rows.append(at_most(f"{name}, compiled", compiled, 0.15, unit))
        else:
            rows.append(Row(f"{name}, eager", product, unit))
    return rows


def _in_k(quick: bool) -> list[Row]:
    u, h = _entries(1536, 576, 0.7)
    seconds = interleaved(
        5 if quick else 15, few=_ours(u, h, _sinc(8)), many=_ours(u, h, _sinc(512))
    )
    name = "LR-LoRA f and gradients, one thread, K = 512, time"
    return [at_most(name, seconds["many"] / seconds["few"], 1.3, "of K = 8")]


def _factorised(quick: bool) -> list[Row]:
    """A layer forward and backward through factors of rank 45, against the fused LoRA."""
    rows = []
    for d in (2048,) if quick else (2048, 4096):
        bases = [nn.Sequential(nn.Linear(d, d, bias=False)) for _ in range(2)]
        lora = get_peft_model(bases[0], LoraConfig(r=RANK, target_modules=["0"]))
        rw.fuse_lora_(lora)
        ours = get_peft_model(bases[1], rw.LrLoraConfig(r=RANK, target_modules=["0"]))
        layer = next(m for m in ours.modules() if isinstance(m, LrLoraLinear))
        radius = 0.008 / math.pi
        _in_range_(layer, radius)
        x, upstream = torch.randn(TOKENS, d), torch.randn(TOKENS, d)
        seconds = interleaved(
            5 if quick else 9,
            lora=layer_step(lora, x, upstream),
            ours=layer_step(ours.train(), x, upstream),
        )
        assert layer.lrlora_passes["default"][0] == 0
        name = f"LR-LoRA layer {d} x {d}, |U| <= {radius:.2g}, factorised"
        ratio = seconds["ours"] / seconds["lora"]
        rows.append(at_most(f"{name}, time", ratio, 1.06, "of the fused LoRA"))
        error = _factorised_error(layer)
        rows.append(at_most(f"{name}, error of f", error, 1e-6, "of sum |a|"))
    return rows


@torch.no_grad()
def _in_range_(layer: LrLoraLinear, radius: float, amplitude: float = 0.3) -> None:
    """A trained-looking f, and factors with `max ||b_i|| max ||a_j||` the radius."""
    layer.lrlora_amplitude["default"].weight.normal_(std=amplitude)
    a, b = layer.factors("default")
    b.mul_(radius / (b.norm(dim=1).max() * a.norm(dim=0).max()))


@torch.no_grad()
def _factorised_error(layer: LrLoraLinear) -> float:
    """Largest error of p(B A) on 64 rows, against f in fp64."""
    a, b = layer.factors("default")
    f, rows = layer.transfer("default"), b[:64]
    way = factorisation(f, a, b, TOKENS)
    assert way is not None
    p = factorised_linear(torch.eye(layer.in_features), a, rows, f, way, scale=1.0).T
    exact = evaluate(rows.double() @ a.double(), f)
    return float((p - exact).abs().max() / f.amplitude.abs().sum())


def _lora(base: nn.Module, adapter: str) -> nn.Module:
    """Rank 8 on every linear layer of the body, in training mode."""
    plan = rw.Lora().plan(rw.find_targets(base))
    return rw.attach(base, plan, adapter=adapter).train()  # type: ignore[arg-type]


def _trained_by_chance_(model: nn.Module) -> None:
    """Factors as some steps leave them, so that nothing is evaluated at zero."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and ("_B." in name or "amplitude" in name):
                parameter.normal_(std=0.01)


def _step(quick: bool) -> list[Row]:
    base = frozen_model()
    (batch,) = text_batches(1, TOKENS // LENGTH)

    def step_of(adapter: str, radius: float = 0.0, compiled: bool = False) -> Callable[[], None]:
        model = _lora(copy.deepcopy(base), adapter)
        _trained_by_chance_(model)
        for layer in model.modules():
            if radius and isinstance(layer, LrLoraLinear):
                # larger ones destroy the model, and its gradients become denormal numbers
                _in_range_(layer, radius, amplitude=0.001)
        if compiled:
            rw.compile_lr_lora_(model)

        def step() -> None:
            model(**batch, use_cache=False).loss.backward()
            model.zero_grad()

        return step

    candidates = {
        "lora": step_of("lora"),
        "small": step_of("lr-lora"),
        "dense": step_of("lr-lora", 0.05),
        "compiled": step_of("lr-lora", 0.05, compiled=True),
        "wide": step_of("lr-lora", 0.5),
    }
    seconds = interleaved(2 if quick else 5, **candidates)
    memory = {adapter: _peak_memory(adapter) for adapter in ("lora", "lr-lora")}
    unit, name = "of PEFT's LoRA step", f"SmolLM2 LR-LoRA step, {TOKENS} tokens"
    labels = {"small": "", "dense": ", |U| <= 0.05", "compiled": ", |U| <= 0.05, compiled"}
    labels["wide"] = ", |U| <= 0.5"
    rows = [
        at_most(f"{name}{label}, time", seconds[key] / seconds["lora"], 1.25, unit)
        for key, label in labels.items()
    ]
    peak = memory["lr-lora"] / memory["lora"]
    return [*rows, at_most(f"{name}, peak memory", peak, 1.0, unit)]


def _peak_memory(adapter: str) -> float:
    """Resident memory at its largest, in a process of its own: model, two steps, nothing else."""
    command = [sys.executable, "-m", "benchmarks.lr_lora", adapter]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return float(output.split()[-1])


def _print_peak_memory(adapter: str) -> None:
    base = frozen_model()
    model = _lora(base, adapter)
    _trained_by_chance_(model)
    tokens = torch.randint(3, 1000, (TOKENS // LENGTH, LENGTH))
    for _ in range(2):
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        model.zero_grad()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


if __name__ == "__main__":
    _print_peak_memory(sys.argv[1])
