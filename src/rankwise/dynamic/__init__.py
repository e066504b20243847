"""Ranks that move while training, under a hard budget."""

from rankwise.dynamic.callback import RankCallback
from rankwise.dynamic.checkpoint import last_checkpoint
from rankwise.dynamic.controller import (
    ControllerState,
    Decision,
    DynamicOptions,
    RankChange,
    RankController,
)
from rankwise.dynamic.estimates import Rule, estimate, rule_of
from rankwise.dynamic.events import RankEvent, RankMove
from rankwise.dynamic.saved import SavedRanks
from rankwise.dynamic.session import DynamicRanks

__all__ = [
    "ControllerState",
    "Decision",
    "DynamicOptions",
    "DynamicRanks",
    "RankCallback",
    "RankChange",
    "RankController",
    "RankEvent",
    "RankMove",
    "Rule",
    "SavedRanks",
    "estimate",
    "last_checkpoint",
    "rule_of",
]
