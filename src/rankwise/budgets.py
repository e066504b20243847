"""Budgets as people say them: a LoRA rank, parameters, a part of the model, megabytes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from rankwise.errors import PlanError

_COUNT = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}
_BYTES = {"kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_WIDTH = {"float32": 4, "fp32": 4, "float16": 2, "fp16": 2, "bfloat16": 2, "bf16": 2}
_WHOLE = r"[1-9]\d{0,2}(?:,\d{3})+|\d+(?:_\d+)*"  # a comma elsewhere is somebody's decimal point
_NUMBER = rf"(?P<number>(?:{_WHOLE})(?:\.\d+)?|\.\d+)"
_RANK = re.compile(r"r\s*=?\s*(?P<number>\d+)")
_PERCENT = re.compile(_NUMBER + r"\s*%(?:\s*of the model)?")
_PARAMETERS = re.compile(
    r"(?:params\s*=\s*)?" + _NUMBER + r"\s*(?P<unit>[kmb]?)(?:\s*(?:params|parameters))?"
)
_MEMORY = re.compile(_NUMBER + r"\s*(?P<unit>[kmg]i?b)(?:\s+(?:in\s+)?(?P<dtype>[a-z]+\d+))?")
_LARGEST = 10**18
"""Parameters, bytes and ranks beyond any model; far beyond it sums are no floats."""
_LONGEST = 100
"""Characters of a text that says an amount; of thousands of digits Python makes no number."""
GRAMMAR = (
    "'r=8' (LoRA of that rank), '2570' or '2.4M params', '0.5%' (of the model's parameters), "
    "'10MB' or '10MB bf16' (size of the adapter, in fp32 unless said)"
)


@dataclass(frozen=True)
class Budget:
    """A budget as it was said.

    Attributes:
        kind: What the amount counts.
        amount: LoRA rank, parameters, part of the model (0.005 for 0.5 %), or bytes.
        width: Bytes of a parameter, for `kind="bytes"`.
    """

    kind: Literal["rank", "parameters", "part", "bytes"]
    amount: Fraction
    width: int = 4

    def parameters(self, costs: Mapping[str, int], model_parameters: int | None) -> int:
        """The budget in trainable parameters, rounded down.

        Args:
            costs: `d_in + d_out` per module.
            model_parameters: Parameters of the model, for a part of it; None where not known.

        Raises:
            PlanError: A part is asked for of a model whose size is not known, or nothing is left.
        """
        if self.kind == "rank":
            return int(self.amount) * sum(costs.values())
        if self.kind == "part" and model_parameters is None:
            raise PlanError(
                "budget: a percentage needs the number of the model's parameters, which this "
                "profile does not hold; profile again or name a number of parameters."
            )
        scale = {"part": Fraction(model_parameters or 0), "bytes": Fraction(1, self.width)}
        found = math.floor(self.amount * scale.get(self.kind, Fraction(1)))
        if found < 1:
            raise PlanError("budget: it comes to less than one parameter; raise it.")
        return found


def parse_budget(value: object) -> Budget:
    """A budget from what a user wrote.

    Args:
        value: A number of parameters, or a text: see `GRAMMAR`. MB are 10^6 bytes, MiB 2^20; fp32
            is the dtype PEFT trains and saves adapters in by default.

    Raises:
        PlanError: It is neither, not positive, or beyond any model.

    Example:
        >>> parse_budget("2.4M params").parameters({}, None)
        2400000
        >>> parse_budget("10MB bf16").parameters({}, None)
        5000000
        >>> parse_budget("r=8").parameters({"q": 128}, None)
        1024
    """
    if isinstance(value, int) and not isinstance(value, bool):
        if abs(value) > _LARGEST:
            raise _out_of_range()
        value = str(value)
    if not isinstance(value, str):
        raise _not_understood(value)
    text = value.strip().lower()
    if len(text) > _LONGEST:
        raise PlanError(
            f"budget: a text of {len(text)} characters is not understood; allowed: {GRAMMAR}."
        )
    if found := _RANK.fullmatch(text):
        budget = Budget("rank", Fraction(found["number"]))
    elif found := _PERCENT.fullmatch(text):
        budget = Budget("part", _number(found["number"]) / 100)
    elif found := _PARAMETERS.fullmatch(text):
        budget = Budget("parameters", _number(found["number"]) * _COUNT[found["unit"]])
    elif (found := _MEMORY.fullmatch(text)) and (found["dtype"] or "fp32") in _WIDTH:
        amount = _number(found["number"]) * _BYTES[found["unit"]]
        budget = Budget("bytes", amount, _WIDTH[found["dtype"] or "fp32"])
    else:
        raise _not_understood(value)
    if budget.amount <= 0 or (budget.kind == "parameters" and budget.amount < 1):
        raise PlanError(f"budget={value!r} must be positive.")
    if budget.amount > _LARGEST:
        raise _out_of_range()
    return budget


def _number(text: str) -> Fraction:
    return Fraction(text.replace(",", "").replace("_", ""))


def _out_of_range() -> PlanError:
    return PlanError(
        f"budget: an amount beyond {_LARGEST:,} was received, more than any model has; it must be "
        "positive and smaller."
    )


def _not_understood(value: object) -> PlanError:
    return PlanError(f"budget={value!r} is not understood; allowed: {GRAMMAR}.")
