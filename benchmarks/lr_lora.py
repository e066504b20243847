"""LR-LoRA: its function against the loop over K and one product, and a step of SmolLM2."""

from __future__ import annotations

import copy
import math
import resource
import subprocess
import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

import rankwise as rw
from benchmarks.text import LENGTH, frozen_model, text_batches
from benchmarks.timing import Row, at_most, interleaved
from rankwise.adapters.transfer import Transfer, evaluate, gradients, grid_points

TOKENS = 1024


def measure(*, quick: bool) -> list[Row]:
    """Function, cost in K, and whole training step."""
    return [*_function(quick), *_in_k(quick), *_step(quick)]


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


def _ours(u: Tensor, h: Tensor, f: Transfer) -> Callable[[], None]:
    def run() -> None:
        evaluate(u, f)
        gradients(u, h, f)

    return run


def _entries(d_out: int, d_in: int, radius: float) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    u = radius * (2 * torch.rand(d_out, d_in, generator=generator) - 1)
    return u, torch.randn(d_out, d_in, generator=generator)


def _function(quick: bool) -> list[Row]:
    """f once and its gradients once, K = 50, in units of the loop and of one product."""
    rows, f = [], _sinc(50)
    cases = [((1536, 576), 0.7, 1 / 40, None), ((1536, 576), 4.0, 1 / 15, None)]
    if not quick:
        cases.append(((2048, 2048), 0.7, 1 / 100, 0.4))
    for (d_out, d_in), radius, of_loop, of_product in cases:
        u, h = _entries(d_out, d_in, radius)
        x, weight = torch.randn(TOKENS, d_in), torch.randn(d_out, d_in)
        seconds = interleaved(
            3 if quick else 5,
            ours=_ours(u, h, f),
            loop=lambda u=u, h=h: _loop(u, h, f),
            product=lambda x=x, weight=weight: x @ weight.T,
        )
        name = f"LR-LoRA f and gradients, {d_out} x {d_in}, |U| <= {radius:g}, time"
        rows.append(at_most(name, seconds["ours"] / seconds["loop"], of_loop, "of the loop over K"))
        product = seconds["ours"] / seconds["product"]
        unit = f"of x W' at {TOKENS} tokens"
        if of_product is None:
            rows.append(Row(name, product, unit))
        else:
            rows.append(at_most(name, product, of_product, unit))
    return rows


def _in_k(quick: bool) -> list[Row]:
    u, h = _entries(1536, 576, 0.7)
    seconds = interleaved(
        5 if quick else 15, few=_ours(u, h, _sinc(8)), many=_ours(u, h, _sinc(512))
    )
    name = "LR-LoRA f and gradients, K = 512, time"
    return [at_most(name, seconds["many"] / seconds["few"], 1.3, "of K = 8")]


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

    def step_of(adapter: str) -> Callable[[], None]:
        model = _lora(copy.deepcopy(base), adapter)
        _trained_by_chance_(model)

        def step() -> None:
            model(**batch, use_cache=False).loss.backward()
            model.zero_grad()

        return step

    seconds = interleaved(2 if quick else 7, lora=step_of("lora"), ours=step_of("lr-lora"))
    memory = {adapter: _peak_memory(adapter) for adapter in ("lora", "lr-lora")}
    unit = "of PEFT's LoRA step"
    name = f"SmolLM2 LR-LoRA step, {TOKENS} tokens"
    return [
        at_most(f"{name}, time", seconds["ours"] / seconds["lora"], 1.25, unit),
        at_most(f"{name}, peak memory", memory["lr-lora"] / memory["lora"], 1.0, unit),
    ]


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
