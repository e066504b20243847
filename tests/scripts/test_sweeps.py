"""The resumable sweeps: what they go on with, what they refuse, and tables with diverged runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, BertModel

from script_modules import load_script
from tiny_folder import SENTENCES, save_tiny_llama, write_rows
from tiny_models import bert_config


def _run(script, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["script", *map(str, arguments)])
    script.main()


def _change(path: Path, **changes) -> None:
    """Other values in the last line."""
    *lines, last = path.read_text().splitlines()
    path.write_text("\n".join([*lines, json.dumps(json.loads(last) | changes)]) + "\n")


class TestBlockScaling:
    @pytest.fixture
    def arguments(self, tmp_path):
        rows = [{"q": f"{s} {i}", "a": f"{i}"} for i in range(20) for s in SENTENCES]
        train = write_rows(tmp_path / "train.jsonl", rows)
        return [
            save_tiny_llama(tmp_path / "model"), tmp_path / "out.jsonl", "--task", f"t={train}:q:a",
            "--steps", 2, "--seeds", 0, 1, "--lrs", 1e-3, "--blocks", "1", "2", "--scalings",
            "function", "--inits", "full", "--batch-size", 2, "--max-length", 32, "--held-out", 4,
            "--r", 2,
        ]  # fmt: skip

    def test_it_goes_on_refuses_and_sums_up(self, arguments, monkeypatch, capsys):
        script = load_script("block_scaling")
        out = arguments[1]
        _run(script, monkeypatch, *arguments)
        before = out.read_text()
        assert len(before.splitlines()) == 4
        _run(script, monkeypatch, *arguments)
        assert out.read_text() == before
        with pytest.raises(SystemExit, match=r"'held_out': 4, .*not with .*'held_out': 5"):
            _run(script, monkeypatch, *arguments, "--held-out", 5)
        save_tiny_llama(arguments[0], seed=1)
        with pytest.raises(SystemExit, match="name another OUT"):
            _run(script, monkeypatch, *arguments)
        capsys.readouterr()
        _change(out, held_out=None, diverged=1)
        _run(script, monkeypatch, *arguments, "--summary")
        assert "(1, 1 diverged)" in capsys.readouterr().out


class TestLrLora:
    def test_it_goes_on_refuses_and_sums_up(self, tmp_path, monkeypatch, capsys):
        script = load_script("lr_lora_ablations")
        folder = save_tiny_llama(tmp_path / "model")
        size = len(AutoTokenizer.from_pretrained(folder))
        torch.manual_seed(0)
        BertModel(bert_config(vocab_size=size)).save_pretrained(folder)
        train = tmp_path / "train.tsv"
        train.write_text("".join(f"{SENTENCES[i % 4]} {i}\t{i % 2}\n" for i in range(300)))
        out = tmp_path / "out.jsonl"
        arguments = [
            folder, out, "--train", train, "--groups", "constant", "--steps", 2, "--seeds", 0, 1,
            "--batch-size", 2, "--depth", 1, "--limit", 5,
        ]  # fmt: skip
        _run(script, monkeypatch, *arguments)
        assert len(out.read_text().splitlines()) == 5
        _run(script, monkeypatch, *arguments[:-2])
        before = out.read_text()
        assert len(before.splitlines()) == 8
        train.write_text(train.read_text().replace("1\n", "0\n"))
        with pytest.raises(SystemExit, match="made with another model or other data"):
            _run(script, monkeypatch, *arguments[:-2])
        capsys.readouterr()
        _change(out, loss=None)
        _run(script, monkeypatch, *arguments[:-2], "--summary")
        assert "1 diverged" in capsys.readouterr().out
