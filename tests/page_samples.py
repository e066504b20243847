"""An open page in a real browser, and what it complained about or asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any


class Shown:
    """An open page, and what it complained about or asked for."""

    def __init__(self, browser: Any, path: Path, **options: Any) -> None:
        self.heard: list[str] = []
        self.page = browser.new_page(viewport={"width": 1200, "height": 900}, **options)
        self.page.on("console", lambda message: self.heard.append(message.text))
        self.page.on("pageerror", lambda error: self.heard.append(str(error)))
        self.page.on("dialog", lambda dialog: self.heard.append(f"dialog {dialog.message}"))
        own = path.as_uri()
        self.page.on(
            "request", lambda asked: asked.url == own or self.heard.append(asked.url[:200])
        )
        self.page.goto(own)

    def close(self) -> None:
        self.page.close()
        assert self.heard == []
