"""Adapters from strangers: everything that is wrong is named, and the model stays as it was."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from adapter_fuzzer import fuzz
from rankwise import export_lora, load_adapter
from saved_adapters import (
    A_NAME,
    CONFIG,
    WEIGHTS,
    TwoLayers,
    X,
    edit_config,
    edit_weights,
    make_lora,
    make_lr_lora,
    make_ralora,
    refused,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_ralora(tmp_path / "adapter")
    return tmp_path / "adapter"


class TestGoodAdapters:
    @pytest.mark.parametrize("make", [make_ralora, make_lora, make_lr_lora])
    @pytest.mark.parametrize("options", [{}, {"modules_to_save": ["norm"]}])
    def test_they_compute_what_they_did(
        self, make: Callable[..., Tensor], options: dict[str, Any], tmp_path: Path
    ) -> None:
        expected = make(tmp_path, **options)
        assert torch.equal(load_adapter(TwoLayers(), tmp_path)(X), expected)

    @pytest.mark.parametrize(
        "options", [{"scaling": "paper"}, {"rank_scaling": "sqrt_r"}, {"dropout": 0.2}]
    )
    def test_options(self, options: dict[str, Any], tmp_path: Path) -> None:
        expected = make_ralora(tmp_path, **options)
        assert torch.equal(load_adapter(TwoLayers(), tmp_path)(X), expected)

    @pytest.mark.parametrize(
        ("make", "own"),
        [(make_ralora, "ralora"), (make_lora, "lora"), (make_lr_lora, "lrlora")],
    )
    @pytest.mark.parametrize("bias", ["all", "{own}_only"])
    @pytest.mark.parametrize("whole", [None, ["norm"]])
    def test_trained_biases(
        self,
        make: Callable[..., Tensor],
        own: str,
        bias: str,
        whole: list[str] | None,
        tmp_path: Path,
    ) -> None:
        bias = bias.format(own=own)
        untouched = make(tmp_path, bias=bias, modules_to_save=whole)

        def moved(tensors: dict[str, Tensor]) -> None:
            for name in [name for name in tensors if name.endswith("bias")]:
                tensors[name] += 0.25

        edit_weights(tmp_path, moved)
        expected = PeftModel.from_pretrained(TwoLayers(), tmp_path).eval()(X)
        model = load_adapter(TwoLayers(), tmp_path)
        assert torch.equal(model(X), expected)
        assert not torch.allclose(expected, untouched)
        trainable = load_adapter(TwoLayers(), tmp_path, trainable=True)
        names = {n for n, p in trainable.named_parameters() if p.requires_grad and "bias" in n}
        assert any("first.base_layer.bias" in name for name in names)

    @pytest.mark.parametrize("mode", ["padded", "compact"])
    def test_exports(self, folder: Path, mode: Any, tmp_path: Path) -> None:
        model = load_adapter(TwoLayers(), folder)
        export_lora(model, tmp_path / "out", mode=mode, example={"x": X})
        found = load_adapter(TwoLayers(), tmp_path / "out")(X)
        torch.testing.assert_close(found, model(X), rtol=1e-5, atol=1e-5)

    def test_it_trains_only_when_asked(self, folder: Path) -> None:
        model = load_adapter(TwoLayers(), folder)
        assert not model.training and not any(p.requires_grad for p in model.parameters())
        model = load_adapter(TwoLayers(), folder, trainable=True)
        assert sum(p.requires_grad for p in model.parameters()) == 4
        assert list(model.peft_config) == ["default"]
        assert list(load_adapter(TwoLayers(), folder, adapter_name="mine").peft_config) == ["mine"]


class TestBrokenWeights:
    @pytest.mark.parametrize("keep", [0, 7, 100, -1])
    def test_truncated(self, folder: Path, keep: int) -> None:
        content = (folder / WEIGHTS).read_bytes()
        (folder / WEIGHTS).write_bytes(content[:keep])
        refused(folder, "not a whole safetensors file")

    def test_an_over_long_header(self, folder: Path) -> None:
        content = (folder / WEIGHTS).read_bytes()
        (folder / WEIGHTS).write_bytes((2**62).to_bytes(8, "little") + content[8:])
        refused(folder, "not a whole safetensors file")

    @pytest.mark.parametrize("value", [torch.nan, torch.inf])
    def test_non_finite(self, folder: Path, value: float) -> None:
        edit_weights(folder, lambda tensors: tensors[A_NAME].flatten()[3:4].fill_(value))
        refused(folder, "first.ralora_A.weight has NaN or infinite values")

    def test_missing_tensors(self, folder: Path) -> None:
        edit_weights(folder, lambda tensors: tensors.pop(A_NAME))
        refused(folder, "lacks base_model.model.first.ralora_A.weight")

    def test_a_missing_module(self, folder: Path) -> None:
        edit_weights(folder, lambda t: [t.pop(name) for name in list(t) if "first" in name])
        refused(folder, "target_modules has 'first', for which there are no weights")
        edit_config(folder, target_modules=".*")
        refused(folder, "rank_pattern has 'first', for which there are no weights")

    @pytest.mark.parametrize(
        "name", ["base_model.model.third.ralora_A.weight", "base_model.model.norm.ralora_B.weight"]
    )
    def test_factors_of_no_linear_layer(self, folder: Path, name: str) -> None:
        edit_weights(folder, lambda tensors: tensors.update({name: torch.zeros(1)}))
        refused(folder, "which is no linear layer of the model")

    @pytest.mark.parametrize(
        "name", ["base_model.model.first.weight", "../first", "/etc/passwd", "a\0b"]
    )
    def test_unexpected_tensors(self, folder: Path, name: str) -> None:
        edit_weights(folder, lambda tensors: tensors.update({name: torch.zeros(24, 16)}))
        refused(folder, "has .* which is unexpected")

    def test_wrong_shapes_are_both_named(self, folder: Path) -> None:
        edit_weights(folder, lambda tensors: tensors.update({A_NAME: torch.zeros(4, 2, 5)}))
        refused(
            folder,
            re.escape("is (4, 2, 5); by the configuration and the model it should be (4, 2, 4)"),
        )

    def test_other_dtypes(self, folder: Path) -> None:
        edit_weights(folder, lambda t: t.update({A_NAME: t[A_NAME].to(torch.int32)}))
        refused(folder, "is I32; adapters are F64, F32, F16, BF16")

    def test_biases_are_checked_like_factors(self, folder: Path) -> None:
        name = "base_model.model.first.base_layer.bias"
        edit_weights(folder, lambda t: t.update({name: torch.zeros(24)}))
        refused(folder, "base_layer.bias', which is unexpected")
        edit_config(folder, bias="ralora_only")
        refused(folder, r"lacks base_model.model.second.base_layer.bias of shape \(16,\)")
        edit_config(folder, bias="lora_only")
        refused(folder, "bias='lora_only' must be")

    def test_nothing_in_it(self, folder: Path) -> None:
        edit_weights(folder, lambda tensors: tensors.clear())
        refused(folder, "holds no tensor named")

    def test_pickles_are_never_opened(self, folder: Path) -> None:
        (folder / WEIGHTS).rename(folder / "adapter_model.bin")
        refused(folder, "adapter_model.bin is a pickle, which is never opened")


class TestBrokenConfigs:
    @pytest.mark.parametrize(
        "r", [0, -3, 4.5, "4", 1e9, 10**9, 10**400, None, True, [1]], ids=range(10)
    )
    def test_ranks(self, folder: Path, r: Any) -> None:
        edit_config(folder, r=r, rank_pattern={"second": 3})
        refused(folder, r"r=|rank_pattern|^rank \d+ of first exceeds|should be")
        edit_config(folder, r=2, rank_pattern={"second": 3, "first": r})
        refused(folder, r"rank_pattern|^rank \d+ of first exceeds|should be")

    @pytest.mark.parametrize("blocks", [0, 3, -2, 2.0, "2", 2**40, 10**400])
    def test_blocks(self, folder: Path, blocks: Any) -> None:
        edit_config(folder, blocks_pattern={"first": blocks, "second": 2})
        refused(folder, "blocks|should be")

    @pytest.mark.parametrize("alpha", ["NaN", "Infinity", "-Infinity", "-1", "0", "1e999", '"16"'])
    def test_alpha(self, folder: Path, alpha: str) -> None:
        text = (folder / CONFIG).read_text()
        (folder / CONFIG).write_text(re.sub(r'"alpha": [\d.]+', f'"alpha": {alpha}', text))
        refused(folder, "alpha|valid JSON|JSON")

    @pytest.mark.parametrize(
        "field", ["trust_remote_code", "custom_code", "extra_path", "rank_patern", "__class__"]
    )
    def test_unknown_fields_are_named(self, folder: Path, field: str) -> None:
        edit_config(folder, **{field: "x"})
        refused(folder, field)

    def test_auto_mapping_is_never_imported(self, folder: Path) -> None:
        edit_config(folder, auto_mapping={"base_model_class": "X", "parent_library": "antigravity"})
        refused(folder, "auto_mapping asks to import base_model_class='X'")

    @pytest.mark.parametrize(
        "field", ["use_dora", "layer_replication", "megatron_core", "unheard_of"]
    )
    def test_lora_options_that_are_not_plain(self, field: str, tmp_path: Path) -> None:
        make_lora(tmp_path)
        value = {"layer_replication": [[0, 4]], "megatron_core": "os"}.get(field, True)
        edit_config(tmp_path, **{field: value})
        refused(tmp_path, f"{field} is not read by rankwise")

    @pytest.mark.parametrize(
        "change", [{"r": 0}, {"lora_alpha": -1}, {"alpha_pattern": {"first": 0}}]
    )
    def test_lora_numbers(self, change: dict[str, Any], tmp_path: Path) -> None:
        make_lora(tmp_path)
        edit_config(tmp_path, **change)
        refused(tmp_path, "must be a positive number")

    def test_patterns_are_no_regular_expressions(self, tmp_path: Path) -> None:
        make_lora(tmp_path)
        edit_config(tmp_path, rank_pattern={"(a+)+$": 2})
        refused(tmp_path, "regular expressions from elsewhere are not run")
        make_ralora(tmp_path)
        edit_config(tmp_path, rank_pattern={"(a+)+$": 2})
        refused(tmp_path, "rank_pattern has .* no weights")

    def test_an_explosive_target_is_not_run(self, folder: Path) -> None:
        expected = load_adapter(TwoLayers(), folder)(X)
        edit_config(folder, target_modules="(.*.*.*)*x")
        started = time.perf_counter()
        assert torch.equal(load_adapter(TwoLayers(), folder)(X), expected)
        assert time.perf_counter() - started < 2

    @pytest.mark.parametrize(
        "text", ["", "[]", "null", "{", '{"peft_type": "X"}', "[" * 10_000, '{"a":' * 10_000]
    )
    def test_no_configuration(self, folder: Path, text: str) -> None:
        (folder / CONFIG).write_text(text)
        started = time.perf_counter()
        refused(folder, "adapter configuration")
        assert time.perf_counter() - started < 1

    def test_a_huge_configuration(self, folder: Path) -> None:
        with (folder / CONFIG).open("wb") as file:
            file.truncate(2**30)
        started = time.perf_counter()
        refused(folder, "1073741824 bytes; at most")
        assert time.perf_counter() - started < 1


@pytest.mark.parametrize("make", [make_ralora, make_lora, make_lr_lora])
def test_broken_bytes_give_our_errors_only(make: Callable[..., Tensor], tmp_path: Path) -> None:
    make(tmp_path / "original")
    outcomes = fuzz(TwoLayers, tmp_path / "original", tmp_path / "scratch", runs=150, seed=0)
    assert outcomes["FileError"] > 60
    assert set(outcomes) == {"FileError", "loaded"}, "a flipped bit of a weight is another weight"
