"""`analysis.json`: stable ranks, functions, conditioning and spectra of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.overrides import TorchFunctionMode

from rankwise import LrLoraConfig
from rankwise.adapters import LrLoraLinear
from rankwise.adapters.transfer import evaluate
from rankwise.errors import ConfigError
from rankwise.training.analysis import AnalysisCallback, conditioning, default_steps, stable_rank_of
from rankwise.training.config import RunConfig
from rankwise.training.train import train
from tiny_folder import save_tiny_llama, write_texts
from transfer_samples import sample


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("analysis")
    save_tiny_llama(folder / "model")
    write_texts(folder / "train.jsonl")
    return folder


def run(place: Path, output: Path, **changes: object) -> Any:
    document: dict[str, object] = {
        "model": str(place / "model"),
        "output": str(output),
        "data": {"train": str(place / "train.jsonl")},
        "method": {"name": "compose", "r": 2, "estimator": "depth", "adapter": "lr-lora"},
        "profile": {"batches": 2},
        "training": {"steps": 4, "batch_size": 4, "learning_rate": 0.01, "evaluate_every": 4},
    }
    return train(RunConfig.model_validate(document | changes))


def test_a_run_with_lr_lora(place: Path, tmp_path: Path) -> None:
    notes: list[str] = []
    result = run(place, tmp_path / "run", analysis={"steps": [0, 2, 4]})
    found = json.loads((tmp_path / "run/analysis.json").read_text())
    assert found == result.analysis
    assert found["schema"] == 1 and [s["step"] for s in found["steps"]] == [0, 2, 4]
    layers = {
        name: layer
        for name, layer in result.model.get_base_model().named_modules()
        if isinstance(layer, LrLoraLinear)
    }
    names = list(layers)
    assert all(list(step["modules"]) == names for step in found["steps"])
    first, last = found["steps"][0]["modules"], found["steps"][-1]["modules"]
    assert all(m["stable_rank"] is None and m["f0"] == 0 for m in first.values())
    for name, layer in layers.items():
        matrix = layer.delta_weight("default").detach().double()
        u = (layer.factors("default")[1] @ layer.factors("default")[0]).detach()
        f0 = float(evaluate(torch.zeros(1), layer.transfer("default")))
        seen = last[name]
        for key, update in (
            ("stable_rank", matrix),
            ("stable_rank_without_constant", matrix - layer.scaling["default"] * f0),
        ):
            sigma = torch.linalg.svdvals(update)
            exact = float((sigma / sigma[0]).square().sum())
            assert seen[key] == pytest.approx(exact, rel=1e-3)
        assert seen["f0"] == pytest.approx(f0) and f0 != 0
        assert [seen["u_min"], seen["u_max"]] == pytest.approx([float(u.min()), float(u.max())])
        assert [seen["grid_min"], seen["grid_max"]] == [-3, 3]
        assert seen["factorised"] == (layer.lrlora_passes["default"][1] > 0)
    kept = [names[0], names[len(names) // 2], names[-1]]
    assert [(f["step"], f["module"]) for f in found["functions"]] == [
        (step, name) for step in (0, 2, 4) for name in kept
    ]
    for drawn in found["functions"]:
        histogram = drawn["histogram"]
        assert len(drawn["u"]) == len(drawn["f"]) == 201
        assert len(histogram["edges"]) == len(histogram["counts"]) + 1 == 61
        assert sum(histogram["counts"]) == layers[drawn["module"]].base_layer.weight.numel()
    assert list(found["conditioning"]) == list(found["spectra"]) == kept
    sigma = torch.linalg.svdvals(layers[kept[0]].delta_weight("default").detach().double())
    torch.testing.assert_close(
        torch.tensor(found["spectra"][kept[0]]).double(), sigma, rtol=1e-4, atol=1e-6
    )
    del notes


def test_what_is_recorded_when(place: Path, tmp_path: Path) -> None:
    lora = {"name": "lora", "r": 2}
    assert run(place, tmp_path / "a", method=lora).analysis is None
    assert not (tmp_path / "a/analysis.json").exists()
    assert run(place, tmp_path / "b", analysis={"steps": []}).analysis is None
    found = run(place, tmp_path / "c", method=lora, analysis={"steps": [4]}).analysis
    (step,) = found["steps"]
    module = next(iter(step["modules"].values()))
    assert module["stable_rank"] >= 1 and module["f0"] is None and not module["factorised"]
    assert found["functions"] == [] and found["conditioning"] == {}
    assert default_steps(100) == [0, 10, 50, 100] and default_steps(1) == [0, 1]


def test_modules_are_named(place: Path, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj"
    found = run(place, tmp_path / "a", analysis={"modules": [name]}).analysis
    assert list(found["spectra"]) == [name]
    with pytest.raises(ConfigError, match=r"'up_prj' carries no adapter"):
        run(place, tmp_path / "b", analysis={"modules": ["up_prj"]})
    assert not (tmp_path / "b").exists()


def test_amplitudes_have_a_learning_rate_of_their_own(place: Path, tmp_path: Path) -> None:
    """After one step of Adam every amplitude has moved by a tenth of the learning rate."""
    settings = {"steps": 1, "learning_rate": 0.01, "scheduler": "constant", "warmup": 0.0}
    model = run(place, tmp_path / "run", training=settings).model
    layers = [m for m in model.modules() if isinstance(m, LrLoraLinear)]
    moved = max(la.lrlora_amplitude["default"].weight.abs().max().item() for la in layers)
    assert moved == pytest.approx(1e-3, rel=0.01)


def test_stable_ranks() -> None:
    assert stable_rank_of(torch.eye(5)) == pytest.approx(5)
    assert stable_rank_of(torch.ones(3, 7)) == pytest.approx(1)
    assert stable_rank_of(torch.zeros(3, 3)) is None
    assert stable_rank_of(torch.full((3, 3), torch.nan)) is None
    matrix = torch.randn(60, 40, generator=torch.Generator().manual_seed(0))
    sigma = torch.linalg.svdvals(matrix.double())
    exact = float((sigma / sigma[0]).square().sum())
    assert stable_rank_of(matrix) == pytest.approx(exact, rel=1e-4)


def test_conditioning() -> None:
    """50 sincs of one width span some 12 directions on [-3, 3] and 5 on [-0.2, 0.2]."""
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), LrLoraConfig(r=2, target_modules=["0"]))
    f = model.get_base_model()[0].transfer("default")
    wide, narrow = conditioning(f, -3, 3), conditioning(f, -0.2, 0.2)
    assert 10 <= wide["directions_at_1e-6"] <= 14
    assert 4 <= narrow["directions_at_1e-6"] <= 6
    assert narrow["condition_number"] > 1e12
    orthogonal = conditioning(sample("sine"), -1, 1)
    assert orthogonal == {"condition_number": pytest.approx(1), "directions_at_1e-6": 1}


class _ZeroHasDevice(TorchFunctionMode):
    """On a CPU a forgotten device does no harm: only the call for f(0) shows it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert (func, args) != (torch.zeros, (1,)) or "device" in (kwargs or {})
        return func(*args, **(kwargs or {}))


def test_f0_is_taken_where_the_adapter_lies() -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), LrLoraConfig(r=2, target_modules=["0"]))
    callback = AnalysisCallback(model, [0])
    with _ZeroHasDevice():
        callback._record(0)
    assert len(callback.document()["steps"]) == 1


def test_nothing_is_recorded_before_training() -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), LrLoraConfig(r=2, target_modules=["0"]))
    callback = AnalysisCallback(model, [0])
    assert callback.factorised_share() is None
    assert callback.document()["steps"] == []
