r"""A section of a report as a PNG, as in docs/images, taken in an installed Chromium.

    python scripts/report_picture.py report.html functions.png --section functions \
        --show "model.layers.15.self_attn.q_proj, without f(0)" --dark

The names of the sections are the ids of the page's `<section>` elements. Needs playwright and a
Chromium (`apt install chromium`); `--chromium` names another executable.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def take(
    browser: Any,
    page: Path,
    out: Path,
    *,
    section: str,
    show: str | None = None,
    dark: bool = False,
    width: int = 1200,
) -> None:
    """Open the page, choose the switch whose label is `show`, and save the section.

    Raises:
        SystemExit: The page has no such section, or the section no such switch.
    """
    scheme = "dark" if dark else "light"
    tab = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    try:
        tab.goto(page.resolve().as_uri())
        place = tab.locator(f'section[id="{section}"]')
        if place.count() == 0:
            known = tab.eval_on_selector_all("section", "all => all.map(s => s.id)")
            raise SystemExit(f"--section {section}: the page has {', '.join(known)}.")
        if show is not None:
            labels = place.locator("label:has(input)")
            texts = labels.all_inner_texts()
            if show not in texts:
                raise SystemExit(f"--show {show}: the section has {'; '.join(texts)}.")
            labels.nth(texts.index(show)).click()
            tab.mouse.move(0, 0)  # a switch looks otherwise under the pointer
        place.screenshot(path=out)
    finally:
        tab.close()


def main() -> None:
    """Parse the arguments, start Chromium, and take the picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("page", type=Path, help="what rankwise report wrote")
    parser.add_argument("out", type=Path, help="the PNG")
    parser.add_argument("--section", required=True)
    parser.add_argument("--show", help="label of a switch in the section")
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--width", type=int, default=1200, help="of the window, in pixels")
    parser.add_argument("--chromium", default=next(filter(None, map(shutil.which, _NAMES)), None))
    given = vars(parser.parse_args())
    found = given.pop("chromium")
    if found is None:
        parser.error("no Chromium is installed: apt install chromium, or name it by --chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # no sandbox, because it does not start for root in containers; the page is our own
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        take(browser, given.pop("page"), given.pop("out"), **given)
        browser.close()


if __name__ == "__main__":
    main()
