"""The factor in front of an update, and why blocks ask for sqrt(n)."""

from __future__ import annotations

import math

import pytest
import torch
from peft import get_peft_model
from torch import nn

from rankwise import RaLoraConfig
from rankwise.adapters import RaLoraLinear
from rankwise.adapters.scaling import update_scaling
from rankwise.plan.block_options import BlockScaling, RankScaling


@pytest.mark.parametrize(("by", "expected"), [("r_ref", 12 / 8), ("r", 12 / 4), ("sqrt_r", 12 / 2)])
@pytest.mark.parametrize(("scaling", "factor"), [("paper", 1), ("function", math.sqrt(32))])
def test_every_layer_has_its_factor(
    by: RankScaling, expected: float, scaling: BlockScaling, factor: float
) -> None:
    assert update_scaling(12, rank=4, r_ref=8, blocks=32, by=by, scaling=scaling) == pytest.approx(
        expected * factor
    )
    config = RaLoraConfig(
        r=8,
        alpha=12,
        target_modules=["0", "1"],
        rank_pattern={"0": 4},
        blocks_pattern={"0": 32},
        rank_scaling=by,
        scaling=scaling,
    )
    model = get_peft_model(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), config)
    layers = [module for module in model.modules() if isinstance(module, RaLoraLinear)]
    assert layers[0].scaling["default"] == pytest.approx(expected * factor)
    assert layers[1].scaling["default"] == 12 / (math.sqrt(8) if by == "sqrt_r" else 8)


def first_step(blocks: int, scaling: BlockScaling, optimizer: str, init_fan_in: str) -> float:
    """How far one step from B = 0 moves the output, root mean square."""
    torch.manual_seed(0)
    d = 1024
    config = RaLoraConfig(
        r=512, blocks=blocks, target_modules=["0"], scaling=scaling, init_fan_in=init_fan_in
    )
    model = get_peft_model(nn.Sequential(nn.Linear(d, d, bias=False)), config)
    generator = torch.Generator().manual_seed(1)
    # one token: what a step gains on the input it was made from
    x, upstream = (torch.randn(1, d, generator=generator) for _ in range(2))
    parameters = [p for p in model.parameters() if p.requires_grad]
    made = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[optimizer](parameters, lr=1e-3)
    before = model(x)
    before.backward(upstream)
    made.step()
    return (model(x) - before).detach().square().mean().sqrt().item()


@pytest.mark.parametrize(("optimizer", "power"), [("adam", 0.5), ("sgd", 1.0)])
@pytest.mark.parametrize("n", [4, 16])
def test_blocks_slow_the_first_step_and_sqrt_n_makes_up_for_it(
    optimizer: str, power: float, n: int
) -> None:
    lora = first_step(1, "paper", optimizer, "full")
    assert first_step(n, "paper", optimizer, "full") == pytest.approx(lora / n**power, rel=0.2)
    assert first_step(n, "function", optimizer, "full") == pytest.approx(lora, rel=0.2)
    assert first_step(n, "paper", optimizer, "block") == pytest.approx(lora, rel=0.2)
