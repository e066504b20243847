"""Plans in plain PEFT: configurations saved, loaded where rankwise is not, trained, reloaded."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from rankwise.plan import ModulePlan, RankPlan
from rankwise.targets import LinearShape

SHAPE = LinearShape(8, 8)
CODE = """
import json, sys
sys.modules["rankwise"] = None
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

folder, names = sys.argv[1], json.loads(sys.argv[2])

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        for name in names:
            *parents, last = name.split(".")
            place = self
            for part in parents:
                if part not in place._modules:
                    place.add_module(part, nn.Module())
                place = place._modules[part]
            place.add_module(last, nn.Linear(8, 8))

    def forward(self, x):
        for name in names:
            x = x + torch.tanh(self.get_submodule(name)(x))
        return x

def found(model):
    start = "base_model.model."
    return {name.removeprefix(start): [m.r["default"], m.scaling["default"],
            list(m.lora_A["default"].weight.shape)]
            for name, m in model.named_modules() if isinstance(m, LoraLayer)}

torch.manual_seed(0)
base = Net()
state = base.state_dict()
model = get_peft_model(base, LoraConfig.from_pretrained(folder))
before = found(model)
optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
x = torch.randn(4, 8)
model(x).pow(2).mean().backward()
optimizer.step()
after = model(x)
model.save_pretrained(folder + "/adapter")
fresh = Net()
fresh.load_state_dict({k: v for k, v in zip(fresh.state_dict(), [state[k] for k in state])})
again = PeftModel.from_pretrained(fresh, folder + "/adapter")
assert torch.allclose(again(x), after, atol=1e-6)
assert found(again) == before
print(json.dumps(before))
"""


def in_plain_peft(folder: Path, plan: RankPlan, names: list[str]) -> dict[str, list[object]]:
    plan.to_lora_config().save_pretrained(folder)
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(folder), json.dumps(names)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, list[object]] = json.loads(done.stdout.splitlines()[-1])
    return found


def plan_of(ranks: dict[str, int], look_alikes: list[str]) -> RankPlan:
    return RankPlan(
        "by hand", "lora", r_ref=4, alpha=6.0, budget=None,
        modules={name: ModulePlan(8, 8, rank) for name, rank in ranks.items() if rank},
        left_out={name: SHAPE for name, rank in ranks.items() if not rank},
        look_alikes=look_alikes,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("ranks", "others"),
    [
        # a left-out name ends in a planned one, and the other way round
        ({"proj": 2, "x.proj": 0, "y.proj": 3, "y.x.proj": 1}, []),
        ({"proj": 0, "x.proj": 4}, []),
        # prefixes of one another
        ({"layer.1.q": 1, "layer.11.q": 5, "layer.111.q": 0, "layer.1.qq": 3}, []),
        # the look-alike was not measured at all
        ({"q": 3, "k": 1}, ["deep.q"]),
        # what regular expressions would read otherwise
        ({"a+b.q": 2, "aab.q": 3, "a(b.q": 1, "a|b.q": 0, "c$.q": 6, "[ab].q": 7, "x^.q": 1}, []),
    ],
    ids=["suffixes", "left out suffix", "prefixes", "look-alike", "regex characters"],
)
def test_every_module_has_exactly_its_rank_and_scale(
    tmp_path: Path, ranks: dict[str, int], others: list[str]
) -> None:
    plan = plan_of(ranks, others)
    found = in_plain_peft(tmp_path, plan, [*ranks, *others])
    assert found == {name: [rank, 1.5, [rank, 8]] for name, rank in ranks.items() if rank}


def test_names_are_a_list_where_a_list_is_exact() -> None:
    config = plan_of({"layer.1.q": 1, "layer.11.q": 5, "head": 0}, []).to_lora_config()
    assert set(config.target_modules or ()) == {"layer.1.q", "layer.11.q"}
    config = plan_of({"q": 1, "x.q": 0}, []).to_lora_config()
    assert config.target_modules == "(?:q)"
