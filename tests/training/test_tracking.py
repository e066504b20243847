"""Gradients followed while training: right numbers, and the same training to the bit."""

from __future__ import annotations

import hashlib
import importlib
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import TrainerCallback

from rankwise.errors import ConfigError, FileError
from rankwise.run_files import Tracking, load_run_file
from rankwise.training.config import RunConfig, load_config, validate
from rankwise.training.tracking import GradientTracker, tracked_modules
from rankwise.training.train import train
from tiny_folder import save_tiny_llama, write_texts
from tiny_models import tiny_llama


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("track")
    save_tiny_llama(folder / "model")
    write_texts(folder / "train.jsonl")
    write_texts(folder / "held.jsonl", 3)
    return folder


def config(place: Path, output: Path, method: str, **changes: Any) -> RunConfig:
    document: dict[str, Any] = {
        "model": str(place / "model"),
        "output": str(output),
        "data": {"train": str(place / "train.jsonl"), "held_out": str(place / "held.jsonl")},
        "method": {"name": method} | ({} if method == "full" else {"r": 2}),
        "profile": {"batches": 1, "batch_size": 1},
        "training": {
            "steps": 4, "batch_size": 2, "gradient_accumulation": 2, "learning_rate": 0.01,
            "evaluate_every": 2, "log_every": 1,
        },
    }  # fmt: skip
    return validate(document | changes, "test")


def digests(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*.safetensors"))
        if "profile" not in path.parts
    }


@pytest.mark.parametrize("method", ["lora", "ralora", "water-fill-dynamic", "full"])
def test_tracking_changes_no_bit_of_the_training(place: Path, tmp_path: Path, method: str) -> None:
    dynamic = {"dynamic": {"interval": 2, "window": 1}} if "dynamic" in method else {}
    plain = train(config(place, tmp_path / "plain", method, **dynamic))
    track = {"every": 2, "modules": "all-linear"}
    seen = train(config(place, tmp_path / "seen", method, track=track, **dynamic))
    assert seen.record.train_loss == plain.record.train_loss
    assert seen.record.held_out == plain.record.held_out
    assert seen.record.held_out[-1].loss < seen.record.held_out[0].loss
    assert digests(tmp_path / "seen") == digests(tmp_path / "plain") != {}
    tracking = load_run_file(tmp_path / "seen/tracking.json", Tracking)
    assert tracking == seen.tracking
    assert [step.step for step in tracking.steps] == [0, 2]
    assert len(tracking.steps[0].modules) == 14
    assert all(m.gid > 1 and m.energy_rank >= 1 for m in tracking.steps[1].modules.values())
    assert not (tmp_path / "plain/tracking.json").exists()
    assert "track" in seen.record.seconds and "track" not in plain.record.seconds


class _Weights(TrainerCallback):
    """The weights' own gradients before each optimizer step."""

    def __init__(self, names: list[str]) -> None:
        self.names, self.seen = names, [dict[str, torch.Tensor]()]

    def on_pre_optimizer_step(self, *_: Any, model: nn.Module, **__: Any) -> None:
        weights = {n: model.get_submodule(n).weight.grad for n in self.names}
        self.seen.append({n: g.double().clone() for n, g in weights.items()})


def test_the_numbers_are_those_of_the_weights_gradient(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(place, tmp_path / "run", "full", track={"every": 1})
    training = settings.training.model_copy(update={"max_grad_norm": 0.0})
    watch = _Weights(["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"])
    trainer_module = importlib.import_module("rankwise.training.fit")
    make = trainer_module.SFTTrainer
    monkeypatch.setattr(
        trainer_module,
        "SFTTrainer",
        lambda **options: make(**options | {"callbacks": [*options["callbacks"], watch]}),
    )
    run = train(settings.model_copy(update={"training": training}))
    assert run.tracking is not None
    for step, gradients in zip(run.tracking.steps, watch.seen[1:], strict=True):
        for name, gradient in gradients.items():
            values = torch.linalg.svdvals(gradient)
            shares = values / values.sum()
            found = step.modules[name]
            assert found.gradient_norm == pytest.approx(float(gradient.norm()), rel=1e-4)
            entropy = -float((shares * shares.clamp_min(1e-300).log()).sum())
            assert found.gid == pytest.approx(torch.tensor(entropy).exp().item(), rel=1e-4)
            energy = values.square()
            assert found.stable_rank == pytest.approx(float(energy.sum() / energy[0]), rel=1e-4)
            held = energy.cumsum(0) / energy.sum()
            assert found.energy_rank == int((held < 0.9).sum()) + 1


def test_full_fine_tuning_leaves_a_model_and_no_plan(place: Path, tmp_path: Path) -> None:
    run = train(config(place, tmp_path / "run", "full"))
    assert run.plan is None and run.profile is None
    trained = load_file(tmp_path / "run/model/model.safetensors")
    before = load_file(place / "model/model.safetensors")
    moved = [name for name, tensor in trained.items() if not torch.equal(tensor, before[name])]
    assert len(moved) == len(before)
    assert run.record.method == "full" and run.record.ranks == {}
    assert run.record.trainable_parameters == sum(p.numel() for p in run.model.parameters())
    assert not (tmp_path / "run/plan.json").exists()


def test_default_modules_are_those_of_the_first_and_last_layer() -> None:
    model = tiny_llama()
    names = tracked_modules(model, "all-linear", None)
    assert {name.split(".")[2] for name in names} == {"0", "1"}
    assert list(tracked_modules(model, ["q_proj"], None)) == [
        f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)
    ]
    assert list(tracked_modules(model, ["q_proj"], r".*0\.mlp\.up_proj")) == [
        "model.layers.0.mlp.up_proj"
    ]
    stack = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4)) for _ in range(5)))
    assert list(tracked_modules(stack, "all-linear", None)) == ["0.0", "4.0"]
    alone = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    assert list(tracked_modules(alone, "all-linear", None)) == ["a", "b"]


def test_a_step_without_a_finite_batch_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    tracker = GradientTracker(model, tracked_modules(model, "all-linear", None), 1)
    state: Any = type("State", (), {"global_step": 3})()
    for scale in (float("nan"), 1.0):
        tracker.on_step_begin(None, state, None)  # type: ignore[arg-type]
        (model(torch.ones(2, 4)).sum() * scale).backward()
        with caplog.at_level(logging.WARNING):
            tracker.on_pre_optimizer_step(None, state, None)  # type: ignore[arg-type]
    assert "step 3 is not tracked" in caplog.text
    [step] = tracker.tracking.steps
    assert step.modules["0"].stable_rank == pytest.approx(1)
    assert step.modules["0"].gradient_norm == pytest.approx((3 * 4 * 2**2) ** 0.5)
    assert not model[0]._forward_hooks


def test_settings(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model: m\noutput: o\ndata: {train: t}\n")
    assert load_config(path).track is None
    given = load_config(path, ["track.every=3"], track="gid").track
    assert given is not None and (given.every, given.modules) == (3, None)
    assert load_config(path, ["track=gid"]).track == load_config(path, track="gid").track
    for overrides, track, message in (
        (["track.evry=3"], None, r"unknown key 'track.evry'; did you mean 'every'\?"),
        (["track.every=0"], None, "greater than or equal to 1"),
        ([], "loss", "track='loss'; gid"),
        (["method.name=full", "method.r=2"], None, "method.r: full has no options"),
        (["method.name=full", "plan=p.json"], None, "leave out dynamic, plan and adapter"),
        (["method.name=full", "dtype=bfloat16"], None, "needs dtype=float32"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_config(path, overrides, track=track)


def test_a_malformed_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tracking.json"
    for document in (
        {"every": 1},
        {"every": 1, "steps": [], "schema": 2},
        {"every": 0, "steps": []},
    ):
        path.write_text(json.dumps(document))
        with pytest.raises(FileError, match=r"tracking .*tracking\.json"):
            load_run_file(path, Tracking)
