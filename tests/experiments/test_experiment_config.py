from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from rankwise.errors import ConfigError, RankwiseError
from rankwise.experiments.cells import make_groups, search_cells
from rankwise.experiments.config import load_experiment, make_experiment

MINIMAL: dict[str, Any] = {
    "output": "out",
    "model": "somewhere",
    "tasks": [{"name": "one", "kind": "completion", "train": "a.jsonl", "test": "b.jsonl"}],
    "methods": ["lora", {"name": "ralora", "label": "RaLoRA, function", "scaling": "function"}],
    "budgets": [4, 8],
    "seeds": [0, 1, 2],
    "learning_rates": [1e-3, 1e-2],
}

LONG: dict[str, Any] = MINIMAL["tasks"][0] | {"name": "long", "training": {"steps": 900}}


def test_a_file_with_overrides_and_a_small_scale(tmp_path: Path) -> None:
    document = MINIMAL | {"small": {"budgets": [1], "training": {"steps": 3}}}
    path = tmp_path / "experiment.yaml"
    path.write_text(yaml.safe_dump(document))
    full = load_experiment(path, ["training.steps=7", "tasks.0.max_test=5"])
    assert full.training.steps == 7
    assert full.make_tasks()[0].task.max_test == 5
    assert full.make_tasks()[0].task.model == "somewhere"
    assert full.budgets == [4, 8]
    small = load_experiment(path, scale="small")
    assert (small.budgets, small.training.steps) == ([1], 3)
    path.write_text(yaml.safe_dump(MINIMAL))
    with pytest.raises(ConfigError, match="no section 'small'"):
        load_experiment(path, scale="small")


def test_a_task_may_have_settings_of_its_own() -> None:
    task = MINIMAL["tasks"][0] | {"training": {"steps": 9}, "budgets": [2], "targets": ["q_proj"]}
    spec = make_experiment(MINIMAL | {"tasks": [task]}).make_tasks()[0]
    assert spec.training.steps == 9
    assert spec.training.batch_size == 16
    assert spec.budgets == [2]
    assert spec.targets == ["q_proj"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": [4]}, "unknown key 'budget'; did you mean 'budgets'"),
        ({"training": {"step": 4}}, "unknown key 'training.step'; did you mean 'steps'"),
        ({"methods": ["lorra"]}, "'lorra' is not a method; did you mean 'lora'"),
        ({"methods": ["lora", "lora"]}, "lora stands there twice; give each a label"),
        ({"methods": [{"name": "ralora", "n_maxx": 4}]}, "did you mean 'n_max'"),
        ({"methods": [{"name": "ralora", "scaling": "x"}]}, "scaling='x' is not known"),
        ({"methods": [{"name": "ralora", "r": 4}]}, "ralora: the budget sets r and alpha"),
        ({"methods": [{"name": "lr-lora", "point": 4}]}, "did you mean 'points'"),
        ({"methods": [{"name": "fourierft", "scalin": 4}]}, "did you mean 'scaling'"),
        ({"methods": [{"name": "full", "x": 4}]}, "full has no options"),
        ({"methods": [{"name": "gard-dynamic", "dynamic": {"tau": 3}}]}, "dynamic.tau"),
        (
            {"methods": [{"name": "water-fill-dynamic", "adapter": "lr-lora"}]},
            "ranks move in plain LoRA only",
        ),
        ({"methods": [{"name": "gard", "dynamic": {}}]}, "name the method gard-dynamic"),
        ({"methods": [{"name": "lora", "learning_rate": -1.0}]}, "must be a positive number"),
        ({"methods": [{"name": "ia3", "alpha_over_r": 1.0}]}, "it has no alpha"),
        (
            {"methods": [{"name": "full", "alpha_over_r": 1.0}]},
            "full.alpha_over_r: it has no alpha",
        ),
        ({"methods": [{"name": "lora", "label": "--"}]}, "must hold letters or digits"),
        ({"seeds": [0, 0]}, "holds a value twice"),
        ({"seeds": [-1]}, r"seeds.0.*greater than or equal to 0"),
        ({"budgets": [0]}, r"budgets.0.*greater than or equal to 1"),
        ({"learning_rates": [0.0, 1e-3]}, r"learning_rates.0.*greater than 0"),
        ({"tasks": [LONG | {"learning_rates": []}]}, r"tasks.0: learning_rates.*at least 1 item"),
        ({"tasks": [LONG | {"learning_rates": [-1.0]}]}, r"learning_rates.0.*greater than 0"),
        ({"tasks": [LONG | {"budgets": []}]}, r"tasks.0: budgets.*at least 1 item"),
        ({"tasks": [LONG | {"budgets": [4, 4]}]}, "holds a value twice"),
        ({"seeds": [0, 1000]}, r"\[1000\] are among seeds"),
        ({"tasks": [MINIMAL["tasks"][0] | {"kind": "choise"}]}, "did you mean 'choice'"),
        ({"tasks": [MINIMAL["tasks"][0] | {"max_tests": 3}]}, "did you mean 'max_test'"),
        ({"tasks": [MINIMAL["tasks"][0] | {"max_test": "3"}]}, "max_test"),
        ({"tasks": [{"kind": "completion", "test": "x"}]}, "needs 'train'"),
        ({"tasks": [MINIMAL["tasks"][0]] * 2}, "one stands there twice"),
        ({"tasks": [MINIMAL["tasks"][0] | {"name": "a/b"}]}, "must be letters"),
        (
            {"tasks": [MINIMAL["tasks"][0] | {"selection": {"seeds": [2, 9]}}]},
            r"\[2\] are among seeds",
        ),
        ({"tasks": [LONG | {"selection": {"step": 2}}]}, "did you mean 'steps'"),
        ({"selection": {"metric": "los"}}, "one: selection.metric='los': did you mean 'loss'"),
        ({"selection": {"budget": 2}}, "selection.budget=2 is no budget of one"),
        ({"tasks": [LONG | {"methods": ["lora", "lorra"]}]}, "did you mean 'lora'"),
        ({"tasks": [LONG | {"methods": []}]}, "long.methods leaves out 'lora'"),
        ({"tasks": [MINIMAL["tasks"][0], LONG | {"rates_from": "on"}]}, "did you mean 'one'"),
        ({"tasks": [LONG | {"rates_from": "long"}]}, "long.rates_from='long'"),
        (
            {"tasks": [MINIMAL["tasks"][0], LONG | {"rates_from": "one", "budgets": [2]}]},
            "it has no budget 2; set selection.budget",
        ),
        (
            {"tasks": [LONG | {"rates_from": "one", "learning_rates": [1e-3]}]},
            "leaves nothing for learning_rates",
        ),
    ],
)
def test_mistakes_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_experiment(MINIMAL | changes)


@pytest.mark.parametrize("key", ["max_length", "validation_rows", "max_test", "max_train"])
@pytest.mark.parametrize("value", [0, -5])
def test_counts_of_rows_and_tokens_are_positive(key: str, value: int) -> None:
    task = MINIMAL["tasks"][0] | {key: value}
    with pytest.raises(RankwiseError, match=f"{key}={value} must be at least 1"):
        make_experiment(MINIMAL | {"tasks": [task]})


def test_hashes_follow_what_decides_a_result_and_nothing_else() -> None:
    def hashes(**changes: Any) -> list[str]:
        groups = make_groups(make_experiment(MINIMAL | changes))
        return [cell.config_hash for group in groups for cell in group.final(1e-3)]

    base = hashes()
    assert len(set(base)) == len(base) == 2 * 2 * 3
    assert hashes(output="elsewhere", workers=2, title="x", learning_rates=[1e-1]) == base
    # the hash of records that others have made: it may change with SETTINGS_VERSION only
    assert base[0] == "f01a5ae3357e"
    assert hashes(budgets=[4, 8, 16])[:6] == base[:6]
    renamed = [{"name": "lora", "label": "LoRA"}, MINIMAL["methods"][1]]
    assert hashes(methods=renamed) == base
    for change in (
        {"training": {"steps": 100}},
        {"training": {"group_by_length": True}},
        {"training": {"precision": "bf16"}},
        {"targets": ["q_proj"]},
        {"model": "other"},
        {"profile": {"batches": 4}},
    ):
        assert not set(hashes(**change)) & set(base)


def test_a_method_that_no_budget_changes_is_run_once() -> None:
    groups = make_groups(make_experiment(MINIMAL | {"methods": ["lora", "full", "mora"]}))
    assert [(g.method.name, g.rank) for g in groups] == [("lora", 4), ("full", None), ("lora", 8)]


def test_a_fixed_learning_rate_is_not_searched() -> None:
    methods = ["lora", {"name": "lora", "label": "fixed", "learning_rate": 3e-3}]
    groups = make_groups(make_experiment(MINIMAL | {"methods": methods, "budgets": [4]}))
    assert [len(group.search) for group in groups] == [2, 0]
    assert groups[1].grid == [3e-3]


def test_a_task_may_choose_its_rates_in_its_own_way() -> None:
    tasks = [MINIMAL["tasks"][0], LONG | {"selection": {"steps": 70, "seeds": [7]}}]
    config = make_experiment(MINIMAL | {"tasks": tasks, "selection": {"steps": 5}})
    found = {(g.task.name, c.steps, c.seed) for g in make_groups(config) for c in g.search}
    assert found == {("one", 5, 1000), ("long", 70, 7)}


def test_searches_can_be_shared_between_budgets_and_tasks() -> None:
    tasks = [MINIMAL["tasks"][0], LONG | {"rates_from": "one"}]
    config = make_experiment(MINIMAL | {"tasks": tasks, "selection": {"budget": 8}})
    groups = [g for g in make_groups(config) if g.method.name == "lora"]
    assert [(g.task.name, g.rank) for g in groups] == [
        ("one", 4), ("one", 8), ("long", 4), ("long", 8),
    ]  # fmt: skip
    assert {cell.name for g in groups for cell in g.search} == {
        "one--lora--r8--lr0.001--seed1000--search",
        "one--lora--r8--lr0.01--seed1000--search",
    }
    assert len(search_cells(groups)) == 2
    assert [cell.steps for cell in groups[-1].final(1e-3)] == [900] * 3
