"""Adding adapter types to PEFT; the only file that touches its enum.

PEFT has no plug-in mechanism: `register_peft_method` wants a member of the closed enum `PeftType`.
String keys in PEFT's maps break transformers, and LoRA variants lose their fields on reload, so
the enum itself is extended by one member per adapter and the official registration does the rest.
"""

from __future__ import annotations

from typing import Any

from peft.utils import PeftType, register_peft_method


def register(name: str, config_cls: type[Any], model_cls: type[Any]) -> None:
    """Register an adapter type; calling it again for the same classes does nothing.

    Args:
        name: Lower-case name of the type, which is also the prefix of its weights.
        config_cls: Subclass of `peft.PeftConfig`.
        model_cls: Subclass of `peft.tuners.tuners_utils.BaseTuner`.

    Raises:
        RuntimeError: PEFT itself, or another package, already has a type of this name.
    """
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    member = peft_type(name)
    if member in PEFT_TYPE_TO_CONFIG_MAPPING:
        if PEFT_TYPE_TO_CONFIG_MAPPING[member] is config_cls:
            return
        raise RuntimeError(
            f"PEFT already has an adapter type {name!r}; rankwise will not replace it. Install the "
            "PEFT version that this rankwise requires (pip install 'peft>=0.21,<0.22')."
        )
    register_peft_method(name=name, config_cls=config_cls, model_cls=model_cls)


def peft_type(name: str) -> PeftType:
    """The enum member for an adapter type, added to `PeftType` if it is not there yet."""
    value = name.upper()
    if value in PeftType.__members__:
        return PeftType[value]
    member = str.__new__(PeftType, value)
    member._name_ = value
    member._value_ = value
    member.__objclass__ = PeftType  # type: ignore[attr-defined]
    member._sort_order_ = len(PeftType.__members__)  # type: ignore[attr-defined]
    PeftType._member_names_.append(value)
    PeftType._member_map_[value] = member
    PeftType._value2member_map_[value] = member
    type.__setattr__(PeftType, value, member)
    return member
