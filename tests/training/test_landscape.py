"""The loss on a plane: against losses computed by hand, and nothing left moved."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rankwise.cli import main
from rankwise.errors import ConfigError, RankwiseError
from rankwise.records import RunRecord
from rankwise.run_files import Landscape, load_run_file
from rankwise.training.config import validate
from rankwise.training.landscape import (
    LandscapeSettings,
    loss_landscape,
    random_directions,
    run_landscape,
)
from rankwise.training.train import train
from tiny_folder import save_tiny_llama, write_texts


class Bowl(nn.Module):
    """`loss = |theta|^2 / 2` over two parameters, whatever the batch; infinite beyond a wall."""

    loss_type = "ForMaskedLM"

    def __init__(self, wall: float = math.inf) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[3.0, 4.0], [0.0, 12.0]], dtype=torch.float64))
        self.bias = nn.Parameter(torch.tensor([0.0, 5.0], dtype=torch.float64))
        self.frozen = nn.Parameter(torch.ones(1, dtype=torch.float64), requires_grad=False)
        self.wall = wall

    def forward(self, labels: Tensor) -> Any:
        square = self.weight.square().sum() + self.bias.square().sum()
        return SimpleNamespace(loss=square / 2 if square < self.wall else square / 0)


BATCHES = [{"labels": torch.zeros(2, 3, dtype=torch.int64)}] * 2
NORM = math.sqrt(25 + 144 + 25)


def walk(model: nn.Module, **settings: Any) -> Landscape:
    chosen = LandscapeSettings(**({"points": 5, "span": 0.5} | settings))
    return loss_landscape(
        model, BATCHES, chosen, fingerprint="f", notify=lambda _: None, progress=False
    )


def test_a_bowl_in_closed_form() -> None:
    """On orthogonal directions as long as theta: |theta|^2 (1 + a^2 + b^2) / 2 + inner products."""
    model = Bowl().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = walk(model)
    assert model.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert found.at == [-0.5, -0.25, 0.0, 0.25, 0.5]
    assert (found.parameters, found.tokens, found.batches, found.forward_passes) == (6, 12, 2, 50)
    assert found.parameter_norm == pytest.approx(NORM)
    assert found.direction_norms == pytest.approx((NORM, NORM), rel=1e-6)
    assert found.cosine == pytest.approx(0, abs=1e-7)
    theta = [model.weight.detach(), model.bias.detach()]
    first, second = random_directions(theta, 0, "norm")
    slopes = [
        float(sum((t * d).sum() for t, d in zip(theta, way, strict=True)))
        for way in (first, second)
    ]
    for i, b in enumerate(found.at):
        for j, a in enumerate(found.at):
            expected = NORM**2 * (1 + a * a + b * b) / 2 + a * slopes[0] + b * slopes[1]
            assert found.loss[i][j] == pytest.approx(expected, rel=1e-6), (a, b)
    assert walk(Bowl(), seed=1).loss != found.loss
    assert walk(Bowl()).loss == found.loss


def test_filter_normalisation_matches_every_row() -> None:
    theta = [torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.tensor([0.0, 5.0]), torch.ones(2, 3, 4)]
    for matrix, vector, blocks in random_directions(theta, 3, "filter"):
        assert matrix.norm(dim=1).tolist() == pytest.approx([5.0, 0.0])
        assert float(vector.norm()) == pytest.approx(5.0)
        assert blocks.norm(dim=-1) == pytest.approx(2.0)


def test_where_the_loss_is_infinite_there_is_none_and_weights_return_after_an_error() -> None:
    found = walk(Bowl(wall=NORM**2 * 1.05), span=1.0)
    values = [value for row in found.loss for value in row]
    assert None in values and found.loss[2][2] == pytest.approx(NORM**2 / 2)
    model = Bowl()
    calls = []

    def fail(*_: Any) -> None:
        calls.append(1)
        if len(calls) > 7:
            raise RuntimeError("broken")

    model.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="broken"):
        walk(model)
    assert torch.equal(model.weight, Bowl().weight)
    with pytest.raises(ConfigError, match="no trainable parameter"):
        walk(Bowl().requires_grad_(False))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"points": 4}, "points=4 must be odd"),
        ({"points": 1}, "points=1 must be at least 3"),
        ({"span": 0.0}, "span=0.0 must be a positive"),
        ({"span": math.nan}, "span=nan must be a positive"),
        ({"normalisation": "norn"}, "did you mean 'norm'"),
        ({"batches": 0}, "batches=0 must be at least 1"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LandscapeSettings(**settings)


@pytest.mark.parametrize("method", ["ralora", "full"])
def test_a_run_gets_its_landscape(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str
) -> None:
    save_tiny_llama(tmp_path / "model")
    write_texts(tmp_path / "train.jsonl")
    write_texts(tmp_path / "held.jsonl", 5)
    document = {
        "model": str(tmp_path / "model"),
        "output": str(tmp_path / "run"),
        "data": {"train": str(tmp_path / "train.jsonl"), "held_out": str(tmp_path / "held.jsonl")},
        "method": {"name": method},
        "profile": {"batches": 1},
        "training": {"steps": 2, "batch_size": 2, "learning_rate": 0.01},
    }
    train(validate(document, "test"))
    with pytest.raises(SystemExit) as stopped:
        main(["landscape", str(tmp_path / "run"), "--points", "3", "--batches", "9"])
    assert stopped.value.code == 0
    captured = capsys.readouterr()
    assert "3 x 3 points, 1 batches each: 9 forward passes" in captured.err
    found = load_run_file(tmp_path / "run/landscape.json", Landscape)
    record = RunRecord.load(tmp_path / "run/record.json")
    # the held-out data is one batch of five, so the middle is the loss at the end of training
    assert found.loss[1][1] == pytest.approx(record.held_out[-1].loss, rel=1e-5)
    assert f"loss {found.loss[1][1]:.4f} at the solution" in captured.out
    assert found.parameters == record.trainable_parameters
    assert found.tokens == record.held_out[-1].tokens


def test_a_base_or_data_that_changed_are_refused(tmp_path: Path) -> None:
    save_tiny_llama(tmp_path / "model")
    write_texts(tmp_path / "train.jsonl")
    document = {
        "model": str(tmp_path / "model"),
        "output": str(tmp_path / "run"),
        "data": {"train": str(tmp_path / "train.jsonl")},
        "method": {"name": "lora", "r": 2},
        "training": {"steps": 1, "batch_size": 2},
    }
    train(validate(document, "test"))
    write_texts(tmp_path / "train.jsonl", 40)
    with pytest.raises(RankwiseError, match="held-out text is no longer that of"):
        run_landscape(tmp_path / "run", LandscapeSettings(points=3), notify=lambda _: None)
    write_texts(tmp_path / "train.jsonl")
    save_tiny_llama(tmp_path / "model", seed=1)
    with pytest.raises(RankwiseError, match="no longer the model"):
        run_landscape(tmp_path / "run", LandscapeSettings(points=3), notify=lambda _: None)
    assert not (tmp_path / "run/landscape.json").exists()
