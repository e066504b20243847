"""A real Chromium for the tests that need one.

They are skipped where none is installed, unless RANKWISE_BROWSER=1 demands it. RANKWISE_CHROMIUM
names another executable than those looked for.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from page_samples import Shown

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
# no sandbox, because tests run as root in containers; nothing that looks for a network
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    found = os.environ.get("RANKWISE_CHROMIUM") or next(
        filter(None, map(shutil.which, NAMES)), None
    )
    demanded = os.environ.get("RANKWISE_BROWSER") == "1"
    try:
        from playwright.sync_api import sync_playwright
    except ModuleNotFoundError:
        if demanded:
            raise
        pytest.skip("playwright is not installed: pip install playwright")
    if found is None:
        if demanded:
            pytest.fail("RANKWISE_BROWSER=1, but no Chromium is installed: apt install chromium")
        pytest.skip("no Chromium is installed: apt install chromium, or set RANKWISE_CHROMIUM")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=found, args=ARGUMENTS)
        yield chromium
        chromium.close()


@pytest.fixture
def show(browser: Any) -> Iterator[Callable[[Path], Any]]:
    """Open a file; what the page complains about or asks for is checked at the end."""
    shown: list[Shown] = []

    def open_page(path: Path) -> Any:
        shown.append(Shown(browser, path))
        return shown[-1].page

    yield open_page
    for one in shown:
        one.close()
