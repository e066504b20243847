"""The comparison under a shift of the text, on a tiny model: what it writes, and going on."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from script_modules import load_script
from tiny_folder import SENTENCES, save_tiny_llama, write_rows


@pytest.fixture(name="script", scope="module")
def script_fixture() -> ModuleType:
    return load_script("distribution_shift")


def test_it_goes_on_where_it_stopped_and_says_the_same(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"question": s, "answer": f"{i}"} for i in range(40) for s in SENTENCES]
    first = write_rows(tmp_path / "first.jsonl", rows)
    model = save_tiny_llama(tmp_path / "model")
    out = tmp_path / "out.jsonl"
    arguments = [
        "run", str(first), "--out", str(out), "--model", str(model), "--seeds", "2",
        "--steps", "6", "--length", "32", "--rows", "2", "--interval", "3", "--window", "3",
        "--profile-batches", "4", "--held-out", "4", "--learning-rate", "0.02",
        "--beta", "0", "--energy", "0.5",
    ]  # fmt: skip
    script.main(arguments)
    whole = out.read_text()
    lines = [json.loads(line) for line in whole.splitlines()]
    assert [(line["seed"], line["part"]) for line in lines] == [
        (seed, part) for seed in (0, 1) for part in ("plans", *script.Settings().parts)
    ]
    plans, dynamic, static, uniform = lines[:4]
    assert dynamic["parameters"] <= uniform["parameters"] >= static["parameters"]
    start = {name: module["rank"] for name, module in plans["first"]["modules"].items()}
    assert static["ranks"]["end"] == dynamic["ranks"]["start"] == start
    assert dynamic["ranks"]["end"] != start and set(uniform["ranks"]["end"].values()) == {4}
    assert [step for step, _ in dynamic["moved"]] == [3, 6]
    for run in (dynamic, static, uniform):
        assert run["held_out"]["shift"]["first"] < plans["held_out"]["first"]
        assert run["held_out"]["end"]["second"] < plans["held_out"]["second"]

    # killed in the middle of a line: what is missing is done again, to the same numbers
    out.write_text("".join(whole.splitlines(keepends=True)[:6]) + '{"seed": 1, "pa')
    script.main(arguments)
    again = [json.loads(line) for line in out.read_text().splitlines()]
    assert list(map(numbers, again)) == list(map(numbers, lines))
    with pytest.raises(SystemExit, match="made with other settings"):
        script.main([*arguments, "--steps", "10"])

    capsys.readouterr()
    script.main(["summary", str(out)])
    printed = capsys.readouterr().out
    assert printed.startswith("2 seeds") and printed.count("static GARD") >= 6
    assert "dynamic GARD at the end" in printed and "| after step | 3 | 6 |" in printed


def numbers(line: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in line.items() if key != "seconds"}
