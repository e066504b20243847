"""The one place that extends PEFT's enum."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
from peft import LoraConfig, PeftConfig, PeftType
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)

from rankwise import RaLoraConfig
from rankwise.adapters import RaLoraModel
from rankwise.adapters.registration import peft_type, register


def state() -> tuple[object, ...]:
    maps = (
        PEFT_TYPE_TO_CONFIG_MAPPING,
        PEFT_TYPE_TO_PREFIX_MAPPING,
        PEFT_TYPE_TO_TUNER_MAPPING,
        PeftType.__members__,
    )
    return tuple(dict(mapping) for mapping in maps)


def test_importing_rankwise_registers_its_types() -> None:
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.RALORA] is RaLoraConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.RALORA] is RaLoraModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.RALORA] == "ralora_"


def test_the_member_is_like_any_other() -> None:
    member = PeftType.RALORA
    assert PeftType("RALORA") is PeftType["RALORA"] is member
    assert isinstance(member, PeftType)
    assert isinstance(member, str)
    assert member == "RALORA"
    assert (member.name, member.value) == ("RALORA", "RALORA")
    assert list(PeftType).count(member) == 1
    assert len(PeftType) == len(set(PeftType)) == len(PeftType.__members__)
    assert pickle.loads(pickle.dumps(member)) is member
    assert copy.deepcopy(member) is member
    assert json.loads(json.dumps({"peft_type": member})) == {"peft_type": "RALORA"}
    assert {PeftType.RALORA: 1}["RALORA"] == 1
    assert repr(member) == repr(PeftType.LORA).replace("LORA", "RALORA")
    assert str(member) == str(PeftType.LORA).replace("LORA", "RALORA")
    assert type(PeftType.LORA) is type(member)


def test_the_config_is_pickled_and_copied() -> None:
    config = RaLoraConfig(r=3, rank_pattern={"a": 2})
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config


def test_registering_again_changes_nothing() -> None:
    before = state()
    register("ralora", RaLoraConfig, RaLoraModel)
    assert state() == before
    assert peft_type("ralora") is PeftType.RALORA


@pytest.mark.parametrize("name", ["lora", "ralora"])
def test_a_name_that_is_taken_is_refused(name: str) -> None:
    class Other(PeftConfig):
        pass

    before = state()
    with pytest.raises(RuntimeError, match=f"PEFT already has an adapter type '{name}'"):
        register(name, Other, RaLoraModel)
    assert state() == before
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.LORA] is LoraConfig
