"""The sections of an experiment file that a task may have in place of the experiment's."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Number = TypeVar("Number", int, float)


def _distinct(values: list[Number]) -> list[Number]:
    if len(set(values)) < len(values):
        raise ValueError("holds a value twice")
    return values


Ranks = Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1), AfterValidator(_distinct)]
Seeds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1), AfterValidator(_distinct)]
LearningRates = Annotated[
    list[Annotated[float, Field(gt=0, allow_inf_nan=False)]],
    Field(min_length=1),
    AfterValidator(_distinct),
]


class Section(BaseModel):
    """Values are checked, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class TrainingSettings(Section):
    """How every method is trained; a task may have its own."""

    steps: int = Field(default=200, ge=1, description="optimizer steps")
    batch_size: int = Field(default=16, ge=1)
    gradient_accumulation: int = Field(default=1, ge=1)
    group_by_length: bool = Field(
        default=False, description="batches of rows that are about as long, to pad less"
    )
    scheduler: Literal["cosine", "linear", "constant"] = Field(
        default="cosine", description="cosine falls to 10 % of the learning rate, linear to 0"
    )
    warmup: float = Field(default=0.06, ge=0, lt=1, description="share of the steps")
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    head_learning_rate: float | None = Field(
        default=None, gt=0, description="of a new classification head; default: that of the run"
    )
    evaluations: int = Field(
        default=4, ge=1, description="evaluations on the validation part, evenly spread"
    )
    precision: Literal["fp32", "bf16"] = Field(
        default="fp32",
        description="bf16: autocast in training and evaluation; weights, profiles, plans and "
        "starts stay fp32",
    )

    def hashed(self) -> dict[str, Any]:
        """What decides a result; a setting that came later counts only where it is used."""
        settings = self.model_dump(mode="json")
        if not self.group_by_length:
            del settings["group_by_length"]
        if self.precision == "fp32":
            del settings["precision"]
        return settings


class ProfileSettings(Section):
    """How gradients are measured for the methods that need them."""

    batches: int | None = Field(default=None, ge=1, description="default: 8, and 32 for gard")
    batch_size: int | None = Field(default=None, ge=1, description="default: the training's")


class SelectionSettings(Section):
    """How learning rates are chosen, on the validation part."""

    seeds: Seeds = Field(default=[1000], description="other than those compared")
    steps: int | None = Field(default=None, ge=1, description="default: those of the training")
    metric: str | None = Field(
        default=None, description="to choose by; default: the task's, or the loss it has instead"
    )
    budget: int | None = Field(
        default=None, description="the one to choose at, for all of them; default: each its own"
    )
    extend: int = Field(
        default=0,
        ge=0,
        description="how many more rates, while the best is at an edge",
    )
    refine: int = Field(
        default=0,
        ge=0,
        le=4,
        description="how often the rates halfway to the best one's neighbours are tried too",
    )


class ReferenceSettings(Section):
    """What everything is compared with."""

    method: str | None = Field(
        default=None, description="label of a method; default: lora, or else the first"
    )
    rank: int | None = Field(
        default=None, description="budget of the result to be reached; default: 8, or the largest"
    )
