"""LR-LoRA adapters from strangers, by the same loader."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from rankwise import RankPlan, attach, find_targets, load_adapter
from rankwise.adapters import LrLoraLinear
from rankwise.methods import Lora
from saved_adapters import (
    CONFIG,
    WEIGHTS,
    TwoLayers,
    X,
    edit_config,
    edit_weights,
    make_lr_lora,
    refused,
)

PREFIX = "base_model.model.first.lrlora_"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_lr_lora(tmp_path / "adapter")
    return tmp_path / "adapter"


class TestGoodAdapters:
    @pytest.mark.parametrize(
        "options",
        [
            {"basis": "rbf", "grid": "learned"},
            {"basis": "spline", "constant": False},
            {"basis": "fourier", "dropout": 0.2},
            {"basis": "polynomial"},
            {"basis": "sine", "omega": 20.0},
            {"grid": "random", "grid_seed": 3, "bandwidth": "fixed", "bandwidth_init": 2.0},
            {"share": "all", "alpha": 5.0, "init": "grid_shift"},
        ],
        ids=lambda options: "-".join(map(str, options.values())),
    )
    def test_every_option_is_read(self, options: dict[str, Any], tmp_path: Path) -> None:
        expected = make_lr_lora(tmp_path, **options)
        assert torch.equal(load_adapter(TwoLayers(), tmp_path)(X), expected)

    def test_one_that_was_attached_knows_its_base(self, tmp_path: Path) -> None:
        plan: RankPlan = Lora(r=2).plan(find_targets(TwoLayers()))
        attach(TwoLayers(), plan, adapter="lr-lora").save_pretrained(tmp_path)
        refused(tmp_path, r"fingerprint \w{16}, this one has \w{16}", TwoLayers(1))
        model = load_adapter(TwoLayers(1), tmp_path, allow_other_base=True, trainable=True)
        layers = [m for m in model.modules() if isinstance(m, LrLoraLinear)]
        assert len(layers) == 2
        assert sum(p.requires_grad for p in model.parameters()) == 8


class TestBrokenWeights:
    @pytest.mark.parametrize("vector", ["A", "amplitude", "bandwidth"])
    def test_missing(self, folder: Path, vector: str) -> None:
        edit_weights(folder, lambda tensors: tensors.pop(f"{PREFIX}{vector}.weight"))
        refused(folder, f"lacks {PREFIX}{vector}.weight")

    @pytest.mark.parametrize(
        ("vector", "right"), [("A", "(2, 16)"), ("B", "(24, 2)"), ("amplitude", "(7,)")]
    )
    def test_wrong_shapes_are_both_named(self, folder: Path, vector: str, right: str) -> None:
        name = f"{PREFIX}{vector}.weight"
        edit_weights(folder, lambda tensors: tensors.update({name: torch.zeros(3, 5)}))
        refused(folder, re.escape("is (3, 5)") + ".*" + re.escape(f"should be {right}"))

    @pytest.mark.parametrize("value", [torch.nan, torch.inf])
    def test_non_finite(self, folder: Path, value: float) -> None:
        name = f"{PREFIX}bandwidth.weight"
        edit_weights(folder, lambda tensors: tensors[name][2:3].fill_(value))
        refused(folder, "first.lrlora_bandwidth.weight has NaN or infinite values")

    def test_a_grid_that_does_not_learn(self, folder: Path) -> None:
        name = f"{PREFIX}grid.weight"
        edit_weights(folder, lambda tensors: tensors.update({name: torch.zeros(7)}))
        refused(folder, "lrlora_grid.weight', which is unexpected")

    def test_half_a_file(self, folder: Path) -> None:
        content = (folder / WEIGHTS).read_bytes()
        (folder / WEIGHTS).write_bytes(content[: len(content) // 2])
        refused(folder, "not a whole safetensors file")


class TestBrokenConfigs:
    @pytest.mark.parametrize(
        "r", [0, -3, 4.5, "4", 1e9, 10**9, 10**400, None, True, [1]], ids=range(10)
    )
    @pytest.mark.parametrize("field", ["r", "points"])
    def test_sizes(self, folder: Path, field: str, r: Any) -> None:
        edit_config(folder, **{field: r, "rank_pattern": {"second": 3}})
        refused(folder, rf"{field}\b|^rank \d+ of first exceeds|should be")

    @pytest.mark.parametrize("field", ["alpha", "span", "bandwidth_init", "amplitude_std", "omega"])
    @pytest.mark.parametrize("value", ["NaN", "Infinity", "-1", "0", "1e999", '"3"'])
    def test_numbers(self, folder: Path, field: str, value: str) -> None:
        text = (folder / CONFIG).read_text()
        changed = re.sub(rf'"{field}": [\d.]+', f'"{field}": {value}', text)
        assert changed != text
        (folder / CONFIG).write_text(changed)
        refused(folder, f"{field}|valid JSON|JSON")

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("basis", "__import__"),
            ("grid", "uniform; import os"),
            ("init", "dead"),
            ("share", 3),
            ("constant", "maybe"),
            ("grid_seed", 10**400),
            ("grid_seed", -1),
            ("dropout", 1.5),
            ("bias", "all"),
            ("custom_code", "x"),
        ],
    )
    def test_options(self, folder: Path, field: str, value: Any) -> None:
        edit_config(folder, **{field: value})
        refused(folder, field)

    def test_patterns_are_no_regular_expressions(self, folder: Path) -> None:
        edit_config(folder, rank_pattern={"(a+)+$": 2})
        refused(folder, "rank_pattern")

    def test_another_kind(self, folder: Path) -> None:
        edit_config(folder, peft_type="LORAX")
        refused(folder, "must be 'RALORA', 'LRLORA' or 'LORA'")
        document = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(document | {"peft_type": "RALORA"}))
        refused(folder, "adapter configuration")
