"""The documentation says what is true: the README's example runs, the key table is complete."""

from __future__ import annotations

import inspect
import re
from dataclasses import fields
from pathlib import Path

import pytest
from pydantic import BaseModel
from typer.main import get_command

import rankwise
from rankwise.cli import app
from rankwise.methods import METHODS
from rankwise.training.config import RunConfig
from tiny_folder import save_tiny_llama

ROOT = Path(__file__).parent.parent


def test_readme_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(r"```python\n(.*?)```", readme, re.DOTALL)
    assert block is not None
    code = block[1]
    for old, new in {
        '"HuggingFaceTB/SmolLM2-135M-Instruct"': repr(str(save_tiny_llama(tmp_path / "model"))),
        "RaLoraPro(r=8)": "RaLoraPro(r=2)",
    }.items():
        assert old in code
        code = code.replace(old, new)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    assert (tmp_path / "out/adapter/adapter_model.safetensors").is_file()
    assert "trainable parameters" in capsys.readouterr().out


def _keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += _keys(field.annotation, f"{prefix}{name}.")
        else:
            keys.append(prefix + name)
    return keys


def test_every_key_of_a_run_is_documented() -> None:
    page = (ROOT / "docs/train.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w.]+)` \|", page, re.MULTILINE)
    methods = [row for row in rows if row.startswith("method.")]
    assert [row for row in rows if row not in methods] == [
        key for key in _keys(RunConfig) if key != "method"
    ]
    options = {field.name for cls in METHODS.values() for field in fields(cls)}
    assert {row.removeprefix("method.") for row in methods} == options | {"name"}


def test_documented_defaults_are_the_defaults() -> None:
    page = (ROOT / "docs/train.md").read_text(encoding="utf-8")
    config = RunConfig.model_validate({"model": "m", "output": "o", "data": {"train": "t"}})
    for key, default in re.findall(r"^\| `([\w.]+)` \| `([^`]+)` \|", page, re.MULTILINE):
        if key.startswith("method."):
            continue
        value: object = config
        for part in key.split("."):
            value = getattr(value, part)
        assert ("null" if value is None else str(value).lower()) == default, key


PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for part in ("*.md", "docs/**/*.md", "experiments/**/*.md", "benchmarks/**/*.md")
    for path in ROOT.glob(part)
)


def _headings(page: Path) -> set[str]:
    """The anchors a page's headings get where Markdown is shown: lower case, spaces as hyphens."""
    found = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


def _broken_links(page: Path) -> list[str]:
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if link.startswith(("http:", "https:")):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if not target.exists() or (anchor and anchor not in _headings(target)):
            broken.append(link)
    return broken


@pytest.mark.parametrize("name", PAGES)
def test_links_between_pages_lead_somewhere(name: str) -> None:
    assert _broken_links(ROOT / name) == []


def test_a_link_that_leads_nowhere_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# One part\n[a](#one-part) [b](#another) [c](gone.md) [d](https://x.org)\n")
    assert _broken_links(page) == ["#another", "gone.md"]


def test_the_architecture_names_every_module() -> None:
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    source = ROOT / "src/rankwise"
    by_room = {"cli", "methods", "tasks"}  # a file per command, method and kind of task
    unnamed = [
        str(path.relative_to(source))
        for path in sorted(source.rglob("*.py"))
        if path.name not in page
        and not path.name.startswith("__")
        and not by_room & set(path.relative_to(source).parts)
        and not (path.parent.name == "report" and path.name.endswith("_view.py"))
    ]
    assert unnamed == []


def test_what_the_page_on_profiles_names_is_there() -> None:
    page = (ROOT / "docs/profile.md").read_text(encoding="utf-8")
    for name in re.findall(r"\brw\.(\w+)", page):
        assert hasattr(rankwise, name), name
    arguments = inspect.signature(rankwise.profile_gradients).parameters
    for name in re.findall(r"^\| `(\w+)=", page, re.MULTILINE):
        assert name in arguments, name
    commands = get_command(app).commands.values()  # type: ignore[attr-defined]
    known = {option for command in commands for each in command.params for option in each.opts}
    assert set(re.findall(r"--[a-z][a-z-]+", page)) <= known
