from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from rankwise.cli import main
from tiny_experiment import write_experiment


def call(*arguments: object) -> int:
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def _write(folder: Path, **changes: object) -> Path:
    document = write_experiment(folder, seeds=[0], small={"training": {"steps": 2}}, **changes)
    path = folder / "experiment.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def test_run_show_and_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = _write(tmp_path)
    assert call("compare", path, "--dry-run") == 0
    assert "2 cells, 8 optimizer steps" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    assert call("compare", path) == 0
    captured = capsys.readouterr()
    assert "2 of 2 cells finished" in captured.out
    assert "1 of 2 cells, about" in captured.err
    assert "size 2, 928 parameters (+0.0% of the budget)" in captured.err
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert [row["label"] for row in results["rows"]] == ["lora", "ralora"]
    assert call("compare", path, "--table") == 0
    assert capsys.readouterr().out == captured.out
    assert call("compare", path, "--scale", "small", f"output={tmp_path / 'small'}") == 0
    capsys.readouterr()
    assert call("compare", path, "--check", "lines--lora--r2--lr0.01--seed0") == 0
    assert "reproduced exactly" in capsys.readouterr().out
    assert call("compare", path, "--against", tmp_path / "small") == 0
    out = capsys.readouterr().out
    assert "no cell is in both" in out and "other settings there: lines--lora" in out
    # one seed has no interval that could save a record which is wrong
    (path_of,) = (tmp_path / "out/records").glob("lines--lora--*.json")
    record = json.loads(path_of.read_text())
    record["test"]["loss"] += 1
    path_of.write_text(json.dumps(record))
    assert call("compare", path, "--check", "lines--lora--r2--lr0.01--seed0") == 1
    assert "too few seeds for an interval" in capsys.readouterr().out


def test_a_failed_cell_makes_the_command_exit_with_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = _write(tmp_path, methods=["lora", "head-only"])
    assert call("compare", path) == 1
    captured = capsys.readouterr()
    assert "head-only: seed 0 failed: ConfigError: head-only needs a task" in captured.out
    assert "Traceback" not in captured.err
    failure = next((tmp_path / "out/records").glob("*.failed.json"))
    assert "Traceback" in json.loads(failure.read_text())["traceback"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent.yaml"], "no such file"),
        (["{path}", "budget=[3]"], "did you mean 'budgets'"),
        (["{path}", "--scale", "tiny"], "scale='tiny' must be"),
        (["{path}", "--check", "lines--lora--r2"], "no such cell; did you mean 'lines--lora--r2--"),
        (["{path}", "--check", "lines--lora--r2--lr0.01--seed0"], "has no record yet"),
        (["{path}", "--against", "{folder}"], "holds no records"),
    ],
)
def test_errors_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    path = _write(tmp_path)
    capsys.readouterr()
    given = [argument.format(path=path, folder=tmp_path) for argument in arguments]
    assert call("compare", *given) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert message in captured.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("absent", ["model", "train", "test"])
def test_models_and_data_that_are_not_there_stop_it_before_the_first_cell(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], absent: str
) -> None:
    path = _write(tmp_path)
    document = yaml.safe_load(path.read_text())
    second = document["tasks"][0] | {"name": "more", absent: str(tmp_path / "absent.jsonl")}
    document["tasks"].append(second)
    path.write_text(yaml.safe_dump(document))
    assert call("compare", path) == 1
    error = capfd.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and "absent.jsonl" in error
    assert not (tmp_path / "out").exists()
    assert call("compare", path, f"tasks=[{json.dumps(document['tasks'][0])}]") == 0
    records = {p: p.read_text() for p in (tmp_path / "out/records").iterdir()}
    assert call("compare", path) == 1
    assert "absent.jsonl" in capfd.readouterr().err.splitlines()[-1]
    assert records == {p: p.read_text() for p in (tmp_path / "out/records").iterdir()}
    assert call("compare", path, "--table") == 0
