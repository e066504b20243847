"""`rankwise export`: from an adapter's folder and its base to a folder that loads anywhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from contracts import train_by_chance_
from rankwise import ModulePlan, RankPlan, attach, find_targets, save_native
from rankwise.cli import main
from rankwise.methods import Lora
from tiny_folder import save_tiny_llama

TOKENS = torch.arange(5, 21).reshape(2, 8)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    save_tiny_llama(folder / "base")
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    modules = {
        name: ModulePlan(shape.d_in, shape.d_out, 2, 4)
        for name, shape in find_targets(base).items()
    }
    model = attach(base, RankPlan("by hand", "ralora", 2, 4.0, None, modules))
    train_by_chance_(model)
    save_native(model, folder / "adapter")
    return folder


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits


@pytest.fixture(scope="module")
def expected(place: Path) -> torch.Tensor:
    base = AutoModelForCausalLM.from_pretrained(place / "base")
    return logits(PeftModel.from_pretrained(base, place / "adapter"))


@pytest.mark.parametrize("mode", ["padded", "compact", "vllm", "merged"])
def test_every_mode(
    mode: str,
    place: Path,
    expected: torch.Tensor,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    main_returns("export", place / "adapter", place / "base", "--out", out, "--mode", mode)
    assert f"{mode} export: {out}" in capsys.readouterr().out
    if mode == "merged":
        model = AutoModelForCausalLM.from_pretrained(out)
        assert (out / "tokenizer.json").is_file()
    else:
        base = AutoModelForCausalLM.from_pretrained(place / "base")
        model = PeftModel.from_pretrained(base, out)
        assert (out / "README.md").is_file()
    assert (logits(model) - expected).abs().max() <= 1e-5 * expected.abs().max()


def main_returns(*arguments: object, code: int = 0) -> None:
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    assert (stop.value.code or 0) == code


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mode", "gguf"], "error: mode='gguf' must be one of padded, compact, vllm, merged."),
        (["--dtype", "int8"], "error: dtype='int8' must be one of"),
        (["--mode", "merged", "--native"], "error: mode='merged' has no native form"),
    ],
)
def test_wrong_options(
    arguments: list[str],
    message: str,
    place: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = ["export", place / "adapter", place / "base", "--out", tmp_path / "out", *arguments]
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in given])
    assert stop.value.code == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_another_base(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_tiny_llama(tmp_path / "other", seed=1)
    given = ["export", place / "adapter", tmp_path / "other", "--out", tmp_path / "out"]
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in given])
    assert stop.value.code == 1
    assert "allow_other_base=True (--allow-other-base)" in capsys.readouterr().err
    main_returns(*given, "--allow-other-base")


@pytest.fixture(scope="module")
def adapter(place: Path) -> Path:
    base = AutoModelForCausalLM.from_pretrained(place / "base")
    model = attach(base, Lora(r=2).plan(find_targets(base)), adapter="lr-lora")
    train_by_chance_(model)
    save_native(model, place / "lr-lora")
    return place / "lr-lora"


class TestLrLora:
    """Plain LoRA of an LR-LoRA adapter is an approximation, and says so."""

    def test_within_a_tolerance(
        self, adapter: Path, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = tmp_path / "out"
        main_returns(
            "export", adapter, place / "base", "--out", out, "--tolerance", "0.05", "--mode",
            "compact",
        )  # fmt: skip
        assert "an approximation by truncated SVD: updates are off by up to" in (
            capsys.readouterr().out
        )
        assert json.loads((out / "truncation.json").read_text())["error"] <= 0.05
        base = AutoModelForCausalLM.from_pretrained(place / "base")
        PeftModel.from_pretrained(base, out)

    def test_a_rank_too_low_is_refused(
        self, adapter: Path, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = tmp_path / "out"
        main_returns("export", adapter, place / "base", "--out", out, "--rank", "1", code=1)
        assert "rank 1 leaves" in capsys.readouterr().err
        assert not out.exists()

    def test_merged_is_exact(self, adapter: Path, place: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        main_returns("export", adapter, place / "base", "--out", out, "--mode", "merged")
        base = AutoModelForCausalLM.from_pretrained(place / "base")
        live = logits(PeftModel.from_pretrained(base, adapter))
        torch.testing.assert_close(
            logits(AutoModelForCausalLM.from_pretrained(out)), live, rtol=1e-4, atol=1e-4
        )


def test_rank_and_tolerance_are_for_lr_lora(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    main_returns("export", place / "adapter", place / "base", "--out", out, "--rank", "4", code=1)
    assert "rank and tolerance are for LR-LoRA" in capsys.readouterr().err


class TestWhatIsThere:
    def test_an_export_is_replaced_unless_something_was_added(
        self, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        arguments = "export", place / "adapter", place / "base", "--out", tmp_path / "out"
        main_returns(*arguments)
        main_returns(*arguments, "--mode", "merged")
        assert (tmp_path / "out" / "config.json").is_file()
        assert not (tmp_path / "out" / "adapter_config.json").exists()
        (tmp_path / "out" / "notes").mkdir()
        (tmp_path / "out" / "notes" / "mine.txt").write_text("kept")
        main_returns(*arguments, code=1)
        assert "holds notes/mine.txt, which rankwise did not write there" in capsys.readouterr().err
        assert (tmp_path / "out" / "notes" / "mine.txt").read_text() == "kept"

    @pytest.mark.parametrize(
        ("mode", "marker"), [("merged", "config.json"), ("padded", "adapter_config.json")]
    )
    def test_other_folders_are_kept_whatever_they_hold(
        self, mode: str, marker: str, place: Path, tmp_path: Path, capsys: Any
    ) -> None:
        mine = tmp_path / "project"
        mine.mkdir()
        (mine / marker).write_text("{}")
        (mine / "main.py").write_text("print()")
        arguments = "export", place / "adapter", place / "base", "--out", mine, "--mode", mode
        main_returns(*arguments, code=1)
        assert "holds no rankwise_export.json, so it is not replaced" in capsys.readouterr().err
        assert sorted(path.name for path in mine.iterdir()) == sorted([marker, "main.py"])

    def test_neither_the_base_nor_the_adapter_is_replaced(
        self, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        main_returns("export", place / "adapter", place / "base", "--out", tmp_path / "first")
        before = (tmp_path / "first" / "adapter_model.safetensors").read_bytes()
        again = "export", tmp_path / "first", place / "base", "--out"
        for out in (tmp_path / "first", tmp_path, place / "base"):
            main_returns(*again, out, code=1)
        assert f"would replace {tmp_path / 'first'}" in capsys.readouterr().err
        assert (tmp_path / "first" / "adapter_model.safetensors").read_bytes() == before
