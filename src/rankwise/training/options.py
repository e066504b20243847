"""Options by name, as files hold them, become methods and other settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any, TypeVar, get_type_hints

from pydantic import TypeAdapter, ValidationError

from rankwise.errors import ConfigError, PlanError, nearest
from rankwise.methods import METHODS, Method

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

FULL = "full"
"""Full fine-tuning, which is no method of ranks."""

T = TypeVar("T", bound="DataclassInstance")


def make_method(name: object, options: Mapping[str, Any]) -> Method:
    """A method by name.

    Raises:
        ConfigError: The name or an option is unknown, or an option's value is not allowed.
    """
    if not isinstance(name, str) or name not in METHODS:
        hint = nearest(str(name), [*METHODS, FULL])
        raise ConfigError(f"method.name={name!r} is not a method; {hint}")
    cls = METHODS[name]
    known = [field.name for field in fields(cls)]
    for key in options:
        if key not in known:
            raise ConfigError(
                f"method.{key}: {name} has no such option; {nearest(str(key), known)}"
            )
    return build(cls, options, "method")


def build(cls: type[T], options: Mapping[str, Any], where: str) -> T:
    """A dataclass of settings from its options, all of which it has.

    Args:
        cls: The dataclass.
        options: Values of its fields.
        where: The section of the configuration, for messages.

    Raises:
        ConfigError: A value is of the wrong kind or not allowed.
    """
    try:
        made = cls(**options)
    except PlanError as error:
        raise ConfigError(f"{where}: {error}") from error
    except (TypeError, ArithmeticError):  # comparing a text with a number, say
        made = None
    hints = get_type_hints(cls)
    for key, value in options.items():
        try:
            TypeAdapter(hints[key]).validate_python(value, strict=True)
        except ValidationError as error:
            reasons = " or ".join(each["msg"].replace("Input", "it", 1) for each in error.errors())
            raise ConfigError(f"{where}.{key}={value!r}: {reasons}.") from error
    return cls(**options) if made is None else made
