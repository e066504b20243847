"""`rankwise inspect` of a comparison: what it is, how far it is, and what failed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from rankwise.artifacts import recognise
from rankwise.errors import FileError
from rankwise.inspection import describe
from training_samples import make_results


def described(folder: Path, results: Any) -> str:
    path = folder / "results.json"
    path.write_text(json.dumps(results), encoding="utf-8")
    text = describe(folder)
    assert describe(path) == text
    return text


def test_a_comparison_says_what_it_is(tmp_path: Path) -> None:
    results = make_results()
    results["finished"] = 33
    results["experiment"]["seeds"] = [0, 1, 7]
    lines = described(tmp_path, results).splitlines()
    assert lines[:8] == [
        "comparison: small comparison",
        "task cola: matthews, higher is better; budgets of LoRA r = 2 (2,000 parameters) and "
        "r = 8 (8,000 parameters)",
        "task sums: loss, lower is better; budgets of LoRA r = 2 (2,000 parameters) and "
        "r = 8 (8,000 parameters)",
        "methods: lora (reference), RaLoRA, slow <b>one</b>, MoRA",
        "seeds: 0, 1, 7",
        "33 of 40 runs finished, 1.25 hours of computing on a processor.",
        "commits: abc",
        "",
    ]
    found = [" ".join(line.split()) for line in lines]
    assert found.count("MoRA: not available: no code.") == 4
    assert "RaLoRA 2,001 0.5703 0.5391 to 0.6016 0.008" in found
    assert not any("failed" in line for line in lines)


def test_failures_are_named_once_with_their_budgets(tmp_path: Path) -> None:
    results = make_results()
    for row in results["rows"]:
        if row["label"] == "RaLoRA" and row["task"] == "cola":
            row["failed"] = {"seed 1": "out of memory\n  at 3 GiB"}
    results["rows"][0]["failed"] = {"search 0.001": "no space left"}
    assert described(tmp_path, results).split("failed:\n")[1].splitlines() == [
        "  cola, r = 2, lora, search 0.001: no space left",
        "  cola, r = 2 and 8, RaLoRA, seed 1: out of memory at 3 GiB",
    ]


def test_what_a_file_does_not_hold_is_said(tmp_path: Path) -> None:
    results = make_results() | {"commits": [], "hardware": [], "finished": 0}
    text = described(tmp_path, results)
    assert "seeds: not recorded" in text
    assert "0 of 40 runs finished" in text
    assert "commits: none yet" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": []}, "holds no row"),
        ({"experiment": {"seeds": ["0"]}}, r"experiment\.seeds\.0"),
        ({"schema_version": 2}, "schema_version 2"),
    ],
)
def test_a_malformed_file_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(FileError, match=message):
        described(tmp_path, make_results() | change)


def test_a_comparison_without_results_says_how_to_get_them(tmp_path: Path) -> None:
    (tmp_path / "experiment.json").write_text("{}")
    with pytest.raises(FileError, match=re.escape("no results.json yet; rankwise compare")):
        recognise(tmp_path)
