"""Broken rows of a finished run, on a tiny model."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from rankwise.experiments.compare import run_experiment
from rankwise.experiments.config import make_experiment
from script_modules import load_script
from tiny_experiment import write_experiment


def test_a_cell_trained_again_has_its_recorded_loss_and_its_worst_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    document = write_experiment(tmp_path, methods=["lora", "zero-shot"], seeds=[0])
    records = {r.method: r for r in run_experiment(make_experiment(document)).records()}
    record, untrained = records["lora"], records["zero-shot"]
    assert record.test is not None
    file = tmp_path / "experiment.yaml"
    file.write_text(yaml.safe_dump(document))
    script = load_script("broken_problems")
    monkeypatch.setattr(sys, "argv", ["broken_problems", str(file), record.name, "--rows", "2"])
    script.main()
    said = capsys.readouterr().out
    loss = f"{record.test['loss']:.6f}"
    assert f"Test loss {loss}, recorded {loss}." in said
    rows = [line.split(" | ") for line in said.splitlines() if line.startswith("| `")]
    assert len(rows) == 2
    loss = f"{untrained.validation[-1].metrics['loss']:.4f}"
    assert f"Untrained, on the validation part: {loss} behind ''," in said
    assert float(rows[0][1]) == pytest.approx(record.test["worst_loss"], abs=1e-3)
    assert float(rows[1][1]) <= float(rows[0][1])
    monkeypatch.setattr(sys, "argv", ["broken_problems", str(file), "lines--dora"])
    with pytest.raises(SystemExit):
        script.main()
    assert "no such cell" in capsys.readouterr().err


def test_sinks_are_the_tokens_as_long_as_the_first() -> None:
    script = load_script("broken_problems")

    class Model(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor, **_: object) -> object:
            lengths = torch.tensor([8.0, 3.9, 4.0, 0.0, 9.0])
            states = [torch.zeros(1, 5, 2), lengths[None, :, None] * torch.tensor([0.6, 0.8])]
            normalised = torch.ones(1, 5, 2)
            return SimpleNamespace(logits=torch.zeros(1, 5, 7), hidden_states=[*states, normalised])

    row = {"input_ids": [1, 2, 3, 4], "labels": [-100, -100, 3, 4]}
    seen = script.look(Model(), row, [0])
    assert seen.sinks == [-1, 1, 3]
    assert seen.loss == pytest.approx(torch.tensor(7.0).log().item())
