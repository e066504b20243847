"""How objects look in a notebook: renderers registered by the layers above them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_renderers: dict[type, Callable[[Any], str]] = {}


def show_as_html(kind: type, renderer: Callable[[Any], str]) -> None:
    """Let a function make the HTML of every object of a type."""
    _renderers[kind] = renderer


class Displayed:
    """Something that a notebook shows as HTML, once a renderer is registered for its type."""

    def _repr_html_(self) -> str | None:
        """The HTML, or None, with which a notebook falls back on the text."""
        renderer = _renderers.get(type(self))
        return None if renderer is None else renderer(self)
