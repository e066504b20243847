from __future__ import annotations

import dataclasses
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from rankwise import __version__
from rankwise.cli import main
from rankwise.cli.running import demo
from rankwise.experiments.demo import DemoSettings
from tiny_folder import save_tiny_llama, write_texts


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    save_tiny_llama(folder / "model")
    write_texts(folder / "train.jsonl")
    run = {
        "model": str(folder / "model"),
        "data": {"train": str(folder / "train.jsonl"), "held_out_fraction": 0.25},
        "output": str(folder / "run"),
        "method": {"name": "ralora", "r": 2},
        "training": {"steps": 2, "batch_size": 4},
        "profile": {"batches": 2},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    return folder


def call(*arguments: object) -> int:
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_profile_plan_inspect(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, data = place / "model", place / "train.jsonl"
    assert call("profile", model, data, "--out", place / "p", "--batches", 2) == 0
    assert "gradient intrinsic dimensionality" in capsys.readouterr().out
    assert call("plan", place / "p", "r=2", "n_max=4", "--out", place / "plan.json") == 0
    planned = capsys.readouterr().out
    assert "ralora-pro" in planned
    assert call("inspect", place / "plan.json") == 0
    assert capsys.readouterr().out == planned
    assert (
        call("plan", place / "p", "--method", "water-fill", "r=2", "--out", place / "w.json") == 0
    )
    assert "water-fill" in capsys.readouterr().out
    assert call("diff", place / "plan.json", place / "w.json") == 0
    assert "modules differ" in capsys.readouterr().out
    options = ["r=2", "scaling=paper", "rank_scaling=r", "--out", place / "f.json"]
    assert call("plan", place / "p", *options) == 0
    assert "updates scaled by alpha / r, A drawn" in capsys.readouterr().out
    assert call("plan", place / "p", "--curve", "--recommend") == 0
    assert "of the gradient energy measured over 2 batches" in capsys.readouterr().out
    assert call("inspect", place / "p") == 0
    assert "self_attn.q_proj" in capsys.readouterr().out


def test_targets_are_names_or_a_pattern(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [place / "model", place / "train.jsonl", "--batches", 1, "--targets"]
    for number, (targets, modules) in enumerate(
        [("q_proj", 2), ("q_proj, v_proj", 4), (r".*\.1\..*(q|k)_proj", 2)]
    ):
        assert call("profile", *options, targets, "--out", place / f"t{number}") == 0
        capsys.readouterr()
        document = json.loads((place / f"t{number}" / "profile.json").read_text())
        assert len(document["modules"]) == modules


def test_profile_columns_and_comparison(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, data = place / "model", place / "train.jsonl"
    options = ["--batches", 2, "--batch-size", 2, "--max-length", 32]
    assert call("profile", model, data, "--out", place / "one", *options) == 0
    captured = capsys.readouterr()
    assert "memory: about " in captured.err
    assert "beside the model (hooks): activations" in captured.err
    more = ["--column", "sensitivity", "--engine", "sweep", "--keep-gradients", "--statistics"]
    more += ["gram,convergence", "--compare", place / "one"]
    assert call("profile", model, data, "--out", place / "two", *options, *more) == 0
    captured = capsys.readouterr()
    assert "(sweep): activations" in captured.err
    assert captured.out.startswith("sensitivity mean(|W * G|) of model")
    assert "after 1, 2 batches" in captured.out
    assert "correlation 1.000, of the order" in captured.out
    assert (place / "two" / "gradients.safetensors").is_file()
    assert not (place / "one" / "gradients.safetensors").exists()
    assert call("inspect", place / "two", "--column", "gard") == 0
    assert "independent batch gradients" in capsys.readouterr().out
    assert call("inspect", place / "two", "--compare", place / "one") == 0
    assert "over 14 modules: correlation" in capsys.readouterr().out


def test_train_inspect_report(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("train", place / "run.yaml", "training.log_every=1") == 0
    out = capsys.readouterr().out
    assert "held-out loss" in out
    assert call("inspect", place / "run") == 0
    assert "run of ralora on model" in capsys.readouterr().out
    assert call("inspect", place / "run/adapter") == 0
    shown = capsys.readouterr().out
    assert "ralora adapter" in shown
    assert "scaling=function, rank_scaling=r_ref, init_fan_in=full" in shown
    assert call("report", place / "run", "--out", place / "page.html") == 0
    assert (place / "page.html").stat().st_size > 1e6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "absent.yaml"], "no such file"),
        (["train", "{place}/run.yaml", "traning.steps=2"], "did you mean 'training'?"),
        (["train", "{place}/run.yaml", "method.r=0"], "r=0 must be a whole number"),
        (["train", "{place}/run.yaml", "output={place}"], "is not replaced"),
        (["plan", "{place}/absent"], "no such file"),
        (["plan", "{place}/p", "--recommend", "--out", "{place}/x.json"], "make no plan"),
        (["plan", "{place}/p", "--curve", "r=4"], "make no plan"),
        (["plan", "{place}/p", "--curve", "--method", "gard"], "make no plan"),
        (["inspect", "{place}/run.yaml", "--column", "gid"], "is not JSON"),
        (["profile", "x", "y", "--out", "{place}/q", "--column", "gdi"], "did you mean 'gid'?"),
        (["profile", "x", "y", "subst=main", "--out", "{place}/q"], "did you mean 'subset'?"),
        (["profile", "x", "y", "subset", "--out", "{place}/q"], "must have the form key=value"),
        (
            ["profile", "x", "y", "--out", "{place}/q", "--compare", "{place}/absent"],
            "no such file",
        ),
        (["inspect", "{place}"], "name a profile, a run, an adapter, a comparison or a plan"),
        (["inspect", "{place}/run.yaml"], "is not JSON"),
        (["profile", "{place}/x", "{place}/train.jsonl", "--out", "{place}/q"], "cannot be loaded"),
        (["report", "{place}/absent", "--out", "{place}/r.html"], "absent"),
    ],
)
def test_errors_are_one_line_with_a_remedy(
    place: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert call(*(argument.format(place=place) for argument in arguments)) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err
    assert "Traceback" not in captured.err


@pytest.mark.parametrize("command", ["train", "export"])
def test_a_missing_extra_is_named(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    for name in [name for name in sys.modules if name.startswith("rankwise.training")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "datasets", None)  # as if it were not installed
    arguments = {"train": ["x"], "export": ["x", "y", "--out", place / "z"]}
    assert call(command, *arguments[command]) == 1
    error = capsys.readouterr().err
    assert "needs datasets, which is not installed; run pip install 'rankwise[train]'" in error


def test_plans_need_no_extra(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in [name for name in sys.modules if name.startswith("rankwise.training")]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("datasets", "trl", "accelerate"):
        monkeypatch.setitem(sys.modules, name, None)
    assert call("plan", tmp_path / "absent") == 1
    assert "no such" in capsys.readouterr().err


def test_train_takes_a_plan_for_another_base(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = yaml.safe_load((place / "run.yaml").read_text())
    options = ["--out", tmp_path / "p", "--batches", 1]
    assert call("profile", place / "model", place / "train.jsonl", *options) == 0
    assert call("plan", tmp_path / "p", "r=2", "--out", tmp_path / "plan.json") == 0
    run |= {"output": str(tmp_path / "a"), "method": {"name": "ralora"}}
    run["plan"] = str(tmp_path / "plan.json")
    run["model"] = str(save_tiny_llama(tmp_path / "other", seed=1))
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(run))
    assert call("train", tmp_path / "a.yaml") == 1
    assert "--allow-other-base" in capsys.readouterr().err
    assert call("train", tmp_path / "a.yaml", "--allow-other-base") == 0


def test_debug_shows_the_traceback(place: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "rankwise.cli", "--debug", "train", "absent.yaml"],
        capture_output=True,
        text=True,
        cwd=place,
    )
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "no such file" in done.stderr


def test_usage_errors_exit_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("train") == 2
    assert call("nonsense") == 2
    capsys.readouterr()


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--version") == 0
    assert capsys.readouterr().out == f"rankwise {__version__}\n"


def test_the_demo_command_says_the_demos_own_defaults() -> None:
    command = {name: told.default for name, told in inspect.signature(demo).parameters.items()}
    fields = [field for field in dataclasses.fields(DemoSettings) if field.name != "out"]
    assert {field.name: command[field.name] for field in fields} == {
        field.name: field.default for field in fields
    }


def test_the_demo_compares_and_reports(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--model", place / "model", "--data", place / "train.jsonl", "--steps", 2]
    small = ["--batches", 1, "--batch-size", 2, "--max-length", 16, "--out", tmp_path / "demo"]
    assert call("demo", *given, *small) == 0
    shown = capsys.readouterr().out
    for words in ("ralora", "lora", "held-out loss before", "one seed, 2 steps", "report.html"):
        assert words in shown
    page = (tmp_path / "demo" / "report.html").read_text()
    assert "ralora" in page and len(page) > 1e6
    assert (tmp_path / "demo" / "lora" / "record.json").is_file()


def test_what_the_docs_show_reaches_the_library(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert call("train", place / "run.yaml", f"output={run}", "--track", "gid") == 0
    assert (run / "tracking.json").is_file()
    card = tmp_path / "card.md"
    assert call("report", run, "--out", tmp_path / "page.html", "--card", card) == 0
    assert "|" in card.read_text()
    options = ["--points", 3, "--span", 0.5, "--normalise", "filter", "--seed", 4]
    assert call("landscape", run, *options) == 0
    found = json.loads((run / "landscape.json").read_text())
    assert (found["at"], found["normalisation"], found["seed"]) == ([-0.5, 0.0, 0.5], "filter", 4)
    capsys.readouterr()
    assert call("profile", place / "model", place / "train.jsonl", "--out", tmp_path / "p") == 0
    capsys.readouterr()
    assert call("plan", tmp_path / "p", "r=2", "--markdown") == 0
    assert capsys.readouterr().out.startswith("### Adapter ranks: ralora-pro")


def test_help_is_quick_and_lists_every_command() -> None:
    code = (
        "import sys; from rankwise.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "assert 'trl' not in sys.modules and 'datasets' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for command in ("profile", "plan", "diff", "train", "inspect", "report", "demo"):
        assert command in done.stdout
