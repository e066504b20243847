"""What one step of gradient descent does to the update, to first order (RaLoRA, App. A)."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from contracts import train_by_chance_
from rankwise import RaLoraConfig
from rankwise.adapters import RaLoraLinear
from rankwise.spectra import block_energy


def after_one_step(n: int, lr: float) -> tuple[Tensor, Tensor, float]:
    """Change of `delta_W`, its first-order prediction, and the largest change outside blocks.

    For each block `Delta(B A) = -lr s (B B' G + G A' A)`, so `Delta(delta_W)` has s squared; G is
    that block of the weight gradient.
    """
    torch.manual_seed(0)
    d_in, d_out = 32, 48
    base = nn.Sequential(nn.Linear(d_in, d_out)).double()
    config = RaLoraConfig(r=3, alpha=5, blocks=n, scaling="paper", target_modules=["0"])
    model = get_peft_model(base, config, autocast_adapter_dtype=False)
    train_by_chance_(model)
    layer = model.base_model.model[0]
    assert isinstance(layer, RaLoraLinear)
    x, target = torch.randn(7, d_in).double(), torch.randn(7, d_out).double()
    output = model(x)
    (g,) = torch.autograd.grad((output - target).square().sum(), output)
    gradient = g.T @ x
    (model(x) - target).square().sum().backward()
    a, b = layer.factors("default")
    before, s = layer.delta_weight("default"), layer.scaling["default"]
    blocks = [
        b[i] @ b[i].T @ block + block @ a[i].T @ a[i]
        for i, block in enumerate(
            gradient.reshape(n, d_out // n, n, d_in // n)[i, :, i] for i in range(n)
        )
    ]
    predicted = -lr * s**2 * torch.block_diag(*blocks).detach()
    with torch.no_grad():
        for factor in (a, b):
            factor -= lr * factor.grad
    change = layer.delta_weight("default") - before
    outside = change * (torch.block_diag(*torch.ones(n, d_out // n, d_in // n)) == 0)
    return change, predicted, outside.abs().max().item()


@pytest.mark.parametrize("n", [1, 2, 8, 16])
def test_the_update_moves_by_the_compressed_gradient(n: int) -> None:
    errors = []
    for lr in (1e-4, 1e-5):
        change, predicted, outside = after_one_step(n, lr)
        assert outside == 0, "nothing moves outside the blocks"
        errors.append(((change - predicted).norm() / predicted.norm()).item())
    assert errors[0] < 0.1
    assert errors[1] == pytest.approx(errors[0] / 10, rel=0.05), "the rest is of second order"


@pytest.mark.parametrize("spectrum", ["flat", "one direction", "noise"])
@pytest.mark.parametrize("n", [1, 4])
def test_at_the_start_only_the_energy_on_the_blocks_counts(spectrum: str, n: int) -> None:
    """B = 0 and A random: a step of lr on B gains `lr |dL/dB|^2`, whatever the spectrum of G.

    `dL/dB_p = s G_pp A_p'`, so that the mean over A of variance v is `s^2 r v sum_p |G_pp|^2`.
    """
    d, r, draws = 32, 32, 60
    generator = torch.Generator().manual_seed(1)
    gradient = torch.randn(d, d, generator=generator)
    if spectrum == "flat":
        gradient = torch.linalg.qr(gradient).Q
    elif spectrum == "one direction":
        gradient = gradient[:, :1] @ gradient[:1]
    model = get_peft_model(
        nn.Sequential(nn.Linear(d, d, bias=False)),
        RaLoraConfig(r=r, alpha=3 * r, blocks=n, scaling="paper", target_modules=["0"]),
    )
    layer = model.base_model.model[0]
    a, b = layer.factors("default")
    gained = 0.0
    for _ in range(draws):
        layer._initialise("default", model.peft_config["default"])
        model.zero_grad()
        model(torch.eye(d)).backward(gradient.T)  # dL/dW = (dL/dy)' x
        gained += b.grad.square().sum().item() / draws
    on_blocks = float(block_energy(gradient, n)[-1] * gradient.square().sum())
    assert gained == pytest.approx(3**2 * r * on_blocks / (3 * d), rel=0.15)
    assert a.grad.abs().max() == 0
