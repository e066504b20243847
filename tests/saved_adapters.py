"""Small saved adapters, ways to spoil them, and what refusing one means."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from contracts import train_by_chance_
from rankwise import LrLoraConfig, ModulePlan, RankPlan, attach, load_adapter
from rankwise.errors import FileError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
A_NAME = "base_model.model.first.ralora_A.weight"


class TwoLayers(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.first, self.second = nn.Linear(16, 24), nn.Linear(24, 16)
            self.norm = nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.second(torch.tanh(self.first(x))))


X = torch.linspace(-1, 1, 48).reshape(3, 16)


def make_ralora(folder: Path, **options: Any) -> Tensor:
    plan = RankPlan(
        "by hand",
        "ralora",
        r_ref=2,
        alpha=4.0,
        budget=None,
        modules={"first": ModulePlan(16, 24, 2, 4), "second": ModulePlan(24, 16, 3, 2)},
    )
    model = attach(TwoLayers(), plan, **options)
    train_by_chance_(model)
    model.save_pretrained(folder)
    return model.eval()(X).detach()


def make_lora(folder: Path, **options: Any) -> Tensor:
    config = LoraConfig(
        r=4,
        target_modules=["first", "second"],
        rank_pattern={"^second": 2},
        alpha_pattern={"^second": 3},
        init_lora_weights=False,
        **options,
    )
    model = get_peft_model(TwoLayers(), config)
    model.save_pretrained(folder)
    return model.eval()(X).detach()


def make_lr_lora(folder: Path, **options: Any) -> Tensor:
    config = LrLoraConfig(
        r=2,
        points=7,
        span=1.0,
        target_modules=["first", "second"],
        rank_pattern={"second": 3},
        init_weights=False,
        **options,
    )
    model = get_peft_model(TwoLayers(), config)
    model.save_pretrained(folder)
    return model.eval()(X).detach()


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def refused(folder: Path, match: str, model: nn.Module | None = None) -> None:
    model = model or TwoLayers()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainable = [p.requires_grad for p in model.parameters()]
    random = torch.get_rng_state()
    with pytest.raises(FileError) as refusal:
        load_adapter(model, folder)
    # the folder's name is the test's, which may name the field itself
    said = str(refusal.value).replace(str(folder), "FOLDER")
    assert re.search(match, said), said
    assert [p.requires_grad for p in model.parameters()] == trainable
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[n]) for n, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
