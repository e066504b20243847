from __future__ import annotations

from pathlib import Path

import pytest

from rankwise.dynamic import DynamicOptions
from rankwise.errors import ConfigError, FileError
from rankwise.methods import Gard, RaLoraPro
from rankwise.training.config import load_config
from rankwise.training.options import make_method
from rankwise.training.yaml_text import parse_assignment

MINIMAL = "model: m\noutput: o\ndata: {train: t.jsonl}\n"
LR_LORA = "method: {name: lora}\nadapter: {kind: lr-lora, "


@pytest.fixture
def run_yaml(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL)
    return path


def test_defaults_and_overrides(run_yaml: Path) -> None:
    config = load_config(
        run_yaml,
        [
            "training.steps=20",
            "training.learning_rate=5e-4",
            "method.name=ralora-pro",
            "method.r=4",
        ],
    )
    assert config.training.steps == 20
    assert config.training.learning_rate == 5e-4
    assert config.training.batch_size == 8
    assert config.make_method() == RaLoraPro(r=4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (MINIMAL + "modle: x\n", r"unknown key 'modle'; did you mean 'model'\?"),
        (MINIMAL + "training: {step: 3}\n", r"unknown key 'training.step'; did you mean 'steps'\?"),
        (MINIMAL + "training: {steps: 0}\n", r"training\.steps: .*greater than or equal to 1"),
        (
            MINIMAL + "adapter: {kind: lr-lroa}\n",
            r"adapter\.kind='lr-lroa'; did you mean 'lr-lora'",
        ),
        (MINIMAL + "adapter: {points: 5}\n", r"adapter\.kind=None"),
        (MINIMAL + LR_LORA + "point: 5}\n", r"adapter\.point: .*'points'"),
        (MINIMAL + LR_LORA + "r: 5}\n", r"adapter\.r: not an option"),
        (MINIMAL + LR_LORA + "points: 0}\n", r"adapter: .*points"),
        (
            MINIMAL + "method: {name: gard-dynamic}\nadapter: {kind: lr-lora}\n",
            "only plain LoRA has ranks that move",
        ),
        (MINIMAL + "method: {name: full}\nadapter: {kind: lora}\n", "has no ranks"),
        (
            MINIMAL + "adapter: {kind: lr-lora}\n",
            r"^[^ ]*: adapter\.kind='lr-lora': has one block per module, and .*method\.n_max=1",
        ),
        (
            MINIMAL + "method: {name: lora}\nadapter: {kind: lr-lora, amplitude_ratio: 0}\n",
            r"adapter: amplitude_ratio=0 must be a positive number",
        ),
        (
            MINIMAL + "method: {name: lora}\nadapter: {kind: lora, amplitude_ratio: 1.0}\n",
            r"adapter\.amplitude_ratio: not an option",
        ),
        (MINIMAL + "training: {steps: '4'}\n", r"training\.steps: .*received '4'"),
        (MINIMAL + "training: {learning_rate: .nan}\n", r"training\.learning_rate"),
        (MINIMAL + "training: {learning_rate: .inf}\n", r"training\.learning_rate"),
        (MINIMAL + "method: {name: lroa}\n", r"method.name='lroa' .* did you mean 'lora'\?"),
        (MINIMAL + "method: {name: lora, r: 0}\n", r"r=0 must be a whole number of at least 1"),
        (MINIMAL + "method: {name: ralora, n_max: 12}\n", r"n_max=12 must be a power of two"),
        (MINIMAL + "method: {name: lora, n_max: 8}\n", r"method.n_max: lora has no such option"),
        (MINIMAL + "method: {name: ralora, scaling: functon}\n", r"did you mean 'function'\?"),
        (MINIMAL + "method: {name: lora, scaling: paper}\n", r"lora has no such option"),
        (MINIMAL + "dtype: int8\n", r"dtype: .*'float32'"),
        (MINIMAL + "method: {name: ralora-pro, r_min: x}\n", r"method\.r_min='x': .*integer"),
        (MINIMAL + "method: {name: gard, energy: a}\n", r"method\.energy='a': .*number"),
        (MINIMAL + "method: {name: gard, per_cost: x}\n", r"method\.per_cost='x': .*boolean"),
        (MINIMAL + "method: {name: ralora-threshold, threshold: x}\n", r"threshold='x': .*number"),
        (MINIMAL + f"method: {{name: lora, alpha: 1{'0' * 400}}}\n", "alpha is above"),
        (MINIMAL + "adapter: {kind: [1]}\n", r"adapter\.kind=\[1\]"),
        (MINIMAL + "method: {name: full}\nanalysis: {steps: [0]}\n", "records adapters"),
        (
            MINIMAL + "plan: p.json\nmethod: {r: 4, name: lora}\n",
            r"method\.r=4: is not used beside",
        ),
        (MINIMAL + "seed: 2024-13-45\n", r"month must be in 1\.\.12\); put it in quotes"),
        (MINIMAL + f"seed: {'1' * 5000}\n", r"a value looks like a date or a number"),
        (MINIMAL + "seed: 4294967296\n", r"seed: .*less than 4294967296"),
        (MINIMAL + "seed: 1\nseed: 2\n", r"line 5 \('seed' stands twice; keep one\)"),
        (MINIMAL + "training:\n  steps: 1\n  steps: 2\n", r"line 6 \('steps' stands twice"),
        ("model: m\n", r"Field required"),
        ("- a\n- b\n", r"must hold keys and values"),
        ("model: [\n", r"not valid YAML, line 2"),
        ("model: &a m\noutput: *a\n", r"aliases are not allowed"),
        ("model: " + "[" * 10_000 + "\n", r"nested deeper than 20"),
    ],
)
def test_a_bad_file_is_explained(run_yaml: Path, text: str, message: str) -> None:
    run_yaml.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(run_yaml)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="no such file"):
        load_config(tmp_path / "absent.yaml")


def test_a_huge_file_is_not_read(run_yaml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rankwise.files.MAX_TEXT_BYTES", 10)
    with pytest.raises(FileError, match="at most 10 are read"):
        load_config(run_yaml)


@pytest.mark.parametrize("override", ["steps", "=3", "model.x=3"])
def test_a_bad_override(run_yaml: Path, override: str) -> None:
    with pytest.raises(ConfigError, match=r"key=value|not a section"):
        load_config(run_yaml, [override])


def test_an_empty_section_is_absent(run_yaml: Path) -> None:
    run_yaml.write_text(MINIMAL + "track: null\ndynamic: null\nmethod: {name: gard}\n")
    config = load_config(run_yaml, ["track.every=2", "dynamic.interval=2"])
    assert config.track is not None and config.track.every == 2
    assert config.make_dynamic() == DynamicOptions(interval=2)
    assert load_config(run_yaml, track="gid").track is not None


def test_a_plan_takes_options_only_where_ranks_move_on(run_yaml: Path) -> None:
    run_yaml.write_text(MINIMAL + "plan: p.json\nmethod: {name: gard-dynamic, energy: 0.8}\n")
    assert load_config(run_yaml).make_method() == Gard(energy=0.8)


def test_assignments_are_yaml() -> None:
    assert parse_assignment("a.b=1e-3") == ("a.b", 1e-3)
    assert parse_assignment("t=[q_proj, v_proj]") == ("t", ["q_proj", "v_proj"])
    assert parse_assignment("m=null") == ("m", None)


def test_make_method_refuses_what_is_no_name() -> None:
    with pytest.raises(ConfigError, match="None is not a method"):
        make_method(None, {})
