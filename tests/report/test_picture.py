"""`scripts/report_picture.py`: the section asked for, with the switch asked for."""

from __future__ import annotations

import importlib.util
import struct
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from rankwise.methods import Lora, RaLora
from rankwise.report import write_report
from report_samples import make_profile

SCRIPT = Path(__file__).parents[2] / "scripts" / "report_picture.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("report_picture", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("picture")
    profile = make_profile()
    for name, method in (("a", Lora(r=2)), ("b", RaLora(r=8))):
        method.plan(profile).save(folder / f"{name}.json")
    write_report([folder / "a.json", folder / "b.json"], folder / "page.html")
    return folder / "page.html"


def size(path: Path) -> tuple[int, int]:
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", head[16:])


def test_a_section_with_a_switch(script: ModuleType, browser: Any, page: Path) -> None:
    pictures = {}
    for name, options in {
        "first": {},
        "second": {"show": "lora"},
        "narrow": {"dark": True, "width": 500},
    }.items():
        out = page.with_name(f"{name}.png")
        script.take(browser, page, out, section="ranks", **options)
        pictures[name] = out.read_bytes()
    wide = size(page.with_name("first.png"))
    assert pictures["first"] != pictures["second"]
    assert size(page.with_name("second.png"))[0] == wide[0]
    assert size(page.with_name("narrow.png"))[0] < 500 < wide[0] < 1200


def test_what_is_not_there_is_named(script: ModuleType, browser: Any, page: Path) -> None:
    out = page.with_name("none.png")
    with pytest.raises(SystemExit, match=r"the page has .*ranks"):
        script.take(browser, page, out, section="rank")
    with pytest.raises(SystemExit, match="the section has ralora; lora"):
        script.take(browser, page, out, section="ranks", show="dora")
    assert not out.exists()
