"""docs/tasks.md lists every key of every kind of task, with its default."""

from __future__ import annotations

import re
from dataclasses import MISSING, Field, fields
from pathlib import Path

import pytest
import yaml

from rankwise.experiments.tasks import TASKS

PAGE = (Path(__file__).parents[3] / "docs/tasks.md").read_text(encoding="utf-8")
LANGUAGE = ("completion", "math", "benchmarks", "judged", "choice", "commonsense")


def _documented() -> dict[tuple[str, str], str]:
    """(kind, key) -> default as written; later rows count, as they are of fewer kinds."""
    found: dict[tuple[str, str], str] = {}
    kinds: list[str] = []
    for named, key, default in re.findall(r"^\| ([^|]*)\| `(\w+)` \| ([^|]+) \|", PAGE, re.M):
        if named.strip() == "all":
            kinds = list(TASKS)
        elif named.strip() == "these six":
            kinds = list(LANGUAGE)
        elif named.strip():
            kinds = re.findall(r"`([\w-]+)`", named)
        found |= {(kind, key): default for kind in kinds}
    return found


def _default(field: Field[object]) -> object:
    return field.default_factory() if field.default_factory is not MISSING else field.default


@pytest.mark.parametrize("kind", TASKS)
def test_every_key_is_documented(kind: str) -> None:
    documented = {key: default for (of, key), default in _documented().items() if of == kind}
    assert set(documented) == {field.name for field in fields(TASKS[kind])}


OTHERWISE = {("glue", "test_split"), ("glue-text", "test_split"), ("judged", "test_split")}
OTHERWISE |= {("judged", "test_prompt_column")}  # the meaning says so


@pytest.mark.parametrize(("kind", "key"), _documented())
def test_documented_defaults_are_the_defaults(kind: str, key: str) -> None:
    written = _documented()[kind, key]
    field = next(field for field in fields(TASKS[kind]) if field.name == key)
    if written.startswith("`") and (kind, key) not in OTHERWISE:
        assert _default(field) == yaml.safe_load(written.strip("`"))
    elif written == "none":
        assert _default(field) == ""
    elif written == "required" and key != "subset":  # without it the GLUE kinds stop by themselves
        assert _default(field) in (MISSING, 0)
