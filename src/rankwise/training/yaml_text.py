"""Plain values from YAML that somebody wrote by hand."""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml

from rankwise.errors import ConfigError

MAX_DEPTH = 20
"""Deepest nesting of a configuration file; ours needs three."""


def parse_assignment(text: str) -> tuple[str, Any]:
    """Split `key=value`, the value in YAML.

    Raises:
        ConfigError: There is no `=`, or the value is not YAML.
    """
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"{text!r} must have the form key=value, such as training.steps=20.")
    return key, parse_yaml(value, text)


def parse_yaml(text: str, where: str) -> Any:
    """Plain values from YAML, `2e-4` a number.

    Raises:
        ConfigError: It is not YAML, has aliases or a key twice, is nested too deep, or a value is
            not what it looks like, such as the date 2024-13-45.
    """
    try:
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                raise ConfigError(f"{where}: YAML aliases are not allowed; write the value out.")
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_DEPTH:
                raise ConfigError(f"{where}: nested deeper than {MAX_DEPTH} levels.")
        return _load(text, where)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        raise ConfigError(f"{where}: is not valid YAML{line} ({problem}).") from error


def _load(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except (ValueError, KeyError, AttributeError) as error:  # PyYAML's own, from dates and numbers
        raise ConfigError(
            f"{where}: a value looks like a date or a number and is none ({error}); put it in "
            "quotes if it is text."
        ) from error


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key that stands twice, and reads `2e-4` as a number.

    YAML 1.2 does both, and PyYAML's 1.1 neither.
    """

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        found = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                break  # the base class explains it
            if key in found:
                raise yaml.constructor.ConstructorError(
                    problem=f"{key!r} stands twice; keep one", problem_mark=key_node.start_mark
                )
            found.add(key)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    key: list(value) for key, value in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)
