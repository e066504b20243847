"""The example of docs/adapters.md: adapters on a base quantised to four bits."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from rankwise import ModulePlan, RankPlan, find_targets
from rankwise.adapters import RaLoraLinear
from tiny_models import VOCABULARY, tiny_llama

PAGE = Path(__file__).parents[2] / "docs" / "adapters.md"


def test_the_documented_example_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    monkeypatch.chdir(tmp_path)
    tiny_llama(hidden_size=64, intermediate_size=128).save_pretrained("model")
    base = AutoModelForCausalLM.from_pretrained("model")
    modules = {
        name: ModulePlan(shape.d_in, shape.d_out, 2, 4)
        for name, shape in find_targets(base).items()
    }
    plan = RankPlan(
        "by hand", "ralora", 2, 16.0, None, modules, model_fingerprint="fingerprint of fp32"
    )
    plan.save("plan.json")
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(code, "docs/adapters.md", "exec"), names)
    model = names["model"]
    layers = [module for module in model.modules() if isinstance(module, RaLoraLinear)]
    assert len(layers) == len(modules)
    assert all(isinstance(layer.base_layer, bnb.nn.Linear4bit) for layer in layers)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    tokens = torch.arange(32).reshape(2, 16) % VOCABULARY
    losses = []
    for _ in range(8):
        loss = model(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
