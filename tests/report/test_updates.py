"""Learned updates: the spectra are those of s B A, for LoRA and for blocks."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rankwise.errors import FileError
from rankwise.methods import Lora, RaLora
from rankwise.report.load import load_report
from rankwise.report.sampling import places
from rankwise.report.update_view import view_of_adapter
from report_samples import make_profile, save_adapter, save_run


@pytest.mark.parametrize("method", [Lora(r=4, alpha=12), RaLora(r=4, alpha=12)])
def test_spectra_are_those_of_the_dense_update(method: Lora | RaLora, tmp_path: Path) -> None:
    plan = method.plan(make_profile())
    folder = save_adapter(tmp_path / "adapter", plan)
    view = view_of_adapter(folder, list(plan.modules))
    tensors = load_file(folder / "adapter_model.safetensors")
    assert list(view.modules) == list(plan.modules)
    if plan.adapter == "ralora":
        assert max(module.blocks for module in view.modules.values()) > 1
    for name, shown in view.modules.items():
        key = f"base_model.model.{name}.{plan.adapter}"
        a, b = (tensors[f"{key}_{side}.weight"].double() for side in "AB")
        if a.ndim == 2:
            a, b = a[None], b[None]
        scale = plan.scaling * math.sqrt(len(a))
        dense = scale * torch.block_diag(*(b[i] @ a[i] for i in range(len(a))))
        values = torch.linalg.svdvals(dense)
        planned = plan.modules[name]
        reach = planned.rank * planned.blocks
        assert dense.shape == (shown.d_out, shown.d_in) == (planned.d_out, planned.d_in)
        assert (shown.rank, shown.blocks) == (planned.rank, planned.blocks)
        expected = [float(values[rank - 1]) for rank in places(reach)]
        assert shown.singular_values == pytest.approx(expected, rel=1e-6)
        assert shown.update_norm == pytest.approx(float(dense.norm()), rel=1e-9)
        assert shown.update_stable_rank == pytest.approx(
            float((values**2).sum() / values[0] ** 2), rel=1e-9
        )


@pytest.mark.parametrize(
    ("config", "factor"),
    [
        ({}, 16 / 4),
        ({"use_rslora": True}, 16 / 2),
        ({"alpha_pattern": {"k_proj": 32}}, 32 / 4),
        ({"alpha_pattern": {"q_proj": 32}}, 16 / 4),
        ({"alpha_pattern": {"^k_proj": 32}}, 16 / 4),
        ({"alpha_pattern": {r"^model\.layers\.0\.attn\.k_proj$": 32}}, 32 / 4),
    ],
)
def test_the_scaling_is_pefts(config: dict[str, Any], factor: float, tmp_path: Path) -> None:
    plan = Lora(r=4, alpha=16).plan(make_profile(layers=1, outside=False))
    folder = save_adapter(tmp_path / "adapter", plan, **config)
    tensors = load_file(folder / "adapter_model.safetensors")
    name = "model.layers.0.attn.k_proj"
    key = f"base_model.model.{name}.lora"
    update = tensors[f"{key}_B.weight"] @ tensors[f"{key}_A.weight"]
    shown = view_of_adapter(folder).modules[name]
    assert shown.update_norm == pytest.approx(factor * float(update.norm()), rel=1e-5)


@pytest.mark.parametrize(
    ("config", "factor"),
    [
        ({}, 16 / 8 * math.sqrt(2)),
        ({"scaling": "paper"}, 16 / 8),
        ({"rank_scaling": "r", "scaling": "paper"}, 16 / 4),
        ({"rank_scaling": "sqrt_r"}, 16 / 2 * math.sqrt(2)),
    ],
)
def test_the_scaling_of_blocks(config: dict[str, Any], factor: float, tmp_path: Path) -> None:
    plan = RaLora(r=4, alpha=16, n_max=2).plan(make_profile(layers=1, outside=False))
    folder = save_adapter(tmp_path / "adapter", plan, r=8, **config)
    tensors = load_file(folder / "adapter_model.safetensors")
    name = "model.layers.0.attn.k_proj"
    assert plan.modules[name].blocks == 2
    key = f"base_model.model.{name}.ralora"
    update = tensors[f"{key}_B.weight"] @ tensors[f"{key}_A.weight"]
    shown = view_of_adapter(folder).modules[name]
    assert shown.update_norm == pytest.approx(factor * float(update.norm()), rel=1e-5)


def test_an_unknown_scaling_is_refused(tmp_path: Path) -> None:
    plan = RaLora(r=4).plan(make_profile(layers=1, outside=False))
    folder = save_adapter(tmp_path / "adapter", plan, scaling="loud")
    with pytest.raises(FileError, match="scaling='loud' is not known"):
        view_of_adapter(folder)


def test_layers_come_in_order_and_no_path_is_kept(tmp_path: Path) -> None:
    plan = Lora(r=2).plan(make_profile(layers=12, outside=False))
    view = view_of_adapter(save_adapter(tmp_path / "adapter", plan))
    layers = [int(name.split(".")[2]) for name in view.modules]
    assert layers == sorted(layers)
    assert view.base == "tiny"
    assert len(view.median_spectra) == 3
    kind = [m.singular_values for n, m in view.modules.items() if n.endswith("k_proj")]
    medians = torch.tensor(kind, dtype=torch.float64).quantile(0.5, dim=0).tolist()
    assert view.median_spectra["attn.k_proj"] == pytest.approx(medians, rel=1e-6)


def _break(folder: Path, how: str) -> None:
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    tensors = load_file(weights)
    first = next(key for key in tensors if "lora_A" in key)
    values = json.loads(config.read_text())
    if how == "nan":
        tensors[first][0, 0] = math.nan
    elif how == "half":
        del tensors[first]
    elif how == "shape":
        tensors[first] = torch.zeros(3, 5)
    elif how == "none":
        tensors = {"head.weight": torch.zeros(2, 2)}
    else:
        values |= json.loads(how)
    save_file(tensors, weights)
    config.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("nan", "NaN"),
        ("half", "only one of its factors"),
        ("shape", "do not fit"),
        ("none", "holds no lora factors"),
        ('{"peft_type": "IA3"}', "'ia3'"),
        ('{"use_dora": true}', "DoRA"),
        ('{"r": 0}', "no positive alpha and r"),
        (f'{{"r": 1{"0" * 400}}}', "no positive alpha and r below"),
        (f'{{"lora_alpha": 1{"0" * 400}}}', "no positive alpha and r below"),
        (f'{{"alpha_pattern": {{"q_proj": 1{"0" * 400}}}}}', "alpha of 10000"),
        ('{"alpha_pattern": {"(.*a)*b": 8}}', "regular expressions from elsewhere are not run"),
        ('{"lora_alpha": "8"}', "no positive alpha and r"),
        ('{"alpha_pattern": {"(": 8}}', "regular expressions"),
        ('{"alpha_pattern": {"q_proj": -1}}', "alpha of -1"),
    ],
)
def test_broken_adapters_are_refused(how: str, message: str, tmp_path: Path) -> None:
    folder = save_adapter(tmp_path / "adapter", Lora(r=2).plan(make_profile(layers=1)))
    _break(folder, how)
    with pytest.raises(FileError, match=message):
        load_report([folder])


def test_an_adapter_is_named_after_its_run(tmp_path: Path) -> None:
    plan = Lora(r=2).plan(make_profile(layers=1))
    save_adapter(tmp_path / "mine" / "adapter", plan)
    save_adapter(tmp_path / "other", plan)
    report = load_report([tmp_path / "mine" / "adapter", tmp_path / "other"])
    assert [update.label for update in report.updates] == ["mine", "other"]


def test_adapters_of_runs_have_the_labels_of_the_runs(tmp_path: Path) -> None:
    """Equal plans are shown once, so that numbers would count plans and adapters differently."""
    for name, rank, seed in (("a", 2, 0), ("b", 2, 1), ("c", 4, 0)):
        plan = Lora(r=rank).plan(make_profile(layers=1))
        save_run(tmp_path / name, plan, None, seed=seed)
        save_adapter(tmp_path / name / "adapter", plan)
    report = load_report([tmp_path / name for name in "abc"])
    labels = [run.label for run in report.runs]
    assert labels == ["lora, seed 0, a", "lora, seed 1", "lora, seed 0, c"]
    assert [update.label for update in report.updates] == labels
    ranks = [{m.rank for m in update.modules.values()} for update in report.updates]
    assert ranks == [{2}, {2}, {4}]


def test_the_plan_of_an_lr_lora_run_counts_its_functions(tmp_path: Path) -> None:
    plan = replace(Lora(r=2).plan(make_profile(layers=1)), adapter="lr-lora")
    trained = plan.parameters + 700
    save_run(tmp_path / "a", plan, None, method="lora, lr-lora", trainable_parameters=trained)
    [view] = load_report([tmp_path / "a"]).plans
    assert (view.label, view.parameters) == ("lora, lr-lora", trained)
    assert (view.used, view.serving.adapter) == (None, "lr-lora")
    assert view.even_rank == pytest.approx(2 * trained / plan.parameters)
