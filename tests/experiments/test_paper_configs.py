"""Every configuration of `experiments`, parsed and counted without weights, in both scales.

Models are built from their dimensions on the meta device, once each; methods are sized for every
task and budget. What a profile decides is bounded by the budget, and is no matter of these tests.
"""

from functools import cache
from pathlib import Path

import pytest

from rankwise.experiments.architectures import meta_model
from rankwise.experiments.config import load_experiment
from rankwise.experiments.sizing import TOLERANCE
from rankwise.targets import find_targets

PAPER = Path(__file__).parents[2] / "experiments" / "paper"
FILES = sorted(PAPER.glob("*/*.yaml"))
MAIN = sorted((PAPER.parent / "main").glob("*.yaml"))
CASES = [
    pytest.param(path, scale, id=f"{path.parent.name}-{path.stem}-{scale}")
    for path in FILES
    for scale in ("full", "small")
] + [pytest.param(path, "full", id=f"main-{path.stem}") for path in MAIN]
TABLES = {
    "ralora": {*range(1, 12)} - {8},
    "lr-lora": {*range(1, 28)} - {10},
    "gard": {1, 2},
}
"""Tables that are runs. RaLoRA's table 8 correlates profiles; LR-LoRA's table 10 is settings."""

COARSE = {"randlora": 0.1, "vera": 1.0, "ia3": 1.0}
"""How far off methods may be whose sizes are far apart or end below a budget; the dry run and the
results say of such a row that it is not matched."""

_load = cache(load_experiment)
_models = {}


def _targets(task, targets):
    """Shapes of the targets; a model is built once for its kind and number of labels."""
    key = (type(task).__mro__[1], type(task), task.model, getattr(task, "labels", None))
    if key not in _models:
        _models[key] = meta_model(task)
    return find_targets(_models[key], targets)


@cache
def _solve(contestant_key, shapes, budget):
    contestant = _contestants[contestant_key]
    return contestant.solve(dict(shapes), budget)


_contestants = {}


def _size(entry, targets, budget):
    key = (entry.name, repr(sorted(entry.options.items())))
    _contestants[key] = entry.contestant
    return _solve(key, tuple(targets.items()), budget)


def test_every_table_has_a_file():
    for paper, tables in TABLES.items():
        named = {
            int(path.stem.removeprefix("table")) for path in PAPER.glob(f"{paper}/table*.yaml")
        }
        served = set()
        for path in (PAPER / paper).glob("table*.yaml"):
            first = path.read_text().splitlines()[0]
            head = first.partition(":")[0].rpartition("table")[2].lstrip("s").replace(" and ", ", ")
            served |= {int(number) for number in head.split(",")}
        assert named <= served == tables


@pytest.mark.parametrize(("path", "scale"), CASES)
def test_it_is_parsed_and_counted(path, scale):
    config = _load(path, scale=scale)
    entries = config.make_methods()
    labels = [entry.label for entry in entries]
    assert config.title
    assert config.output.endswith(f"{path.parent.name}/{path.stem}")
    for spec in config.make_tasks():
        targets = _targets(spec.task, spec.targets)
        assert targets
        cost = sum(shape.rank_cost for shape in targets.values())
        for rank in spec.budgets:
            for entry in entries:
                if entry.reason is not None or not entry.contestant.budgeted:
                    continue
                size = _size(entry, targets, rank * cost)
                if size is None:  # a profile decides, within the budget
                    continue
                assert set(size.values) == set(targets)
                off = abs(size.parameters / size.budget - 1)
                assert off <= COARSE.get(entry.name, TOLERANCE), (entry.label, str(size))
    if config.reference.method in labels:
        assert any(config.reference.rank in spec.budgets for spec in config.make_tasks())


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_the_small_scale_runs_here(path):
    config = _load(path, scale="small")
    for spec in config.make_tasks():
        assert spec.task.model.startswith("models/")
        assert spec.task.train.startswith("data/")
        assert spec.training.steps <= 800


def test_no_file_is_of_one_machine():
    for path in FILES:
        text = path.read_text()
        assert "/work" not in text
        assert "/tmp" not in text
        assert not any(
            line.strip().startswith(("output: /", "model: /")) for line in text.splitlines()
        )
