"""`RankPlan`: savable, checked against a model, and turned into a `LoraConfig`."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from peft import LoraConfig
from pydantic import ConfigDict, Field, FiniteFloat, NonNegativeInt, PositiveInt
from torch import nn

from rankwise.display import Displayed
from rankwise.errors import PlanError, nearest
from rankwise.files import parse_json, read_text, write_text
from rankwise.plan.block_options import BlockOptions
from rankwise.provenance import model_fingerprint
from rankwise.targets import LinearShape, exact_target_modules, linear_shape, unusable_layers

SCHEMA_VERSION = 1
AdapterKind = Literal["lora", "ralora", "lr-lora"]
_LARGEST_SIZE = 2**31 - 1
Count = Annotated[int, Field(gt=0, le=_LARGEST_SIZE)]
"""A whole number that no layer exceeds; files could hold one that no float can."""
_FORBID = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class ModulePlan:
    """The adapter of one module.

    Attributes:
        d_in: Input features.
        d_out: Output features.
        rank: LoRA rank, or the rank of each diagonal block.
        blocks: Diagonal blocks n; 1 is plain LoRA. Divides d_in and d_out.
        gid: GID the blocks were chosen by, where one was measured.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _FORBID

    d_in: Count
    d_out: Count
    rank: Count
    blocks: Count = 1
    gid: FiniteFloat | None = None

    def __post_init__(self) -> None:
        if self.rank < 1 or self.blocks < 1:
            raise PlanError(f"rank={self.rank} and blocks={self.blocks} must be at least 1.")
        if self.blocks & (self.blocks - 1) or self.d_in % self.blocks or self.d_out % self.blocks:
            raise PlanError(
                f"blocks={self.blocks} must be a power of two that divides d_in={self.d_in} and "
                f"d_out={self.d_out}."
            )
        if self.rank > min(self.d_in, self.d_out):
            raise PlanError(
                f"rank={self.rank} exceeds min(d_in, d_out)={min(self.d_in, self.d_out)}."
            )

    @property
    def shape(self) -> LinearShape:
        """The layer's dimensions."""
        return LinearShape(self.d_in, self.d_out)

    @property
    def parameters(self) -> int:
        """Trainable parameters `r (d_in + d_out)`, whatever the number of blocks."""
        return self.rank * (self.d_in + self.d_out)


@dataclass(frozen=True)
class RankPlan(Displayed):
    """Ranks and blocks for every adapted module of one model, with where they came from.

    Attributes:
        method: Name of the method that made the plan.
        adapter: `"lora"` for plain LoRA, `"ralora"` for block-diagonal adapters, `"lr-lora"` for
            LR-LoRA, whose functions' parameters, 2K a module, are not counted here.
        r_ref: Reference rank: the LoRA rank with the same budget.
        alpha: LoRA alpha; every module is scaled by `alpha / r_ref`, unless `block_options` says
            otherwise.
        budget: Trainable parameters allowed; None where the method sets no hard budget.
        modules: Module name -> its adapter, in model order.
        model: Name of the model.
        model_fingerprint: Fingerprint of the profiled model, or None if none was profiled.
        provenance: The profile's provenance and the method's options.
        left_out: Modules that were looked at and get no adapter, rank 0.
        look_alikes: Other modules of the model whose names end in the name of a module of this
            plan; PEFT would match them too if it were given a list of names.
        next_rank: Parameters of the cheapest further rank that the bounds allow, where the budget
            is hard; None if there is none.
        full: Whether every module has the largest rank that the bounds allow.
        largest_total: Most parameters that whole ranks within bounds and budget can take, where
            that was searched for.
        captured: Part of the measured gradient energy `sum sigma^2` that updates of these ranks
            can hold, for plain LoRA.
        captured_by_uniform: The same of uniform ranks within the same budget.
        block_options: How block-diagonal adapters are scaled and drawn.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _FORBID

    method: str
    adapter: AdapterKind
    r_ref: Count
    alpha: FiniteFloat
    budget: PositiveInt | None
    modules: dict[str, ModulePlan]
    model: str = ""
    model_fingerprint: str | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    left_out: dict[str, LinearShape] = field(default_factory=dict)
    look_alikes: list[str] = field(default_factory=list)
    next_rank: PositiveInt | None = None
    full: bool = False
    largest_total: NonNegativeInt | None = None
    captured: FiniteFloat | None = None
    captured_by_uniform: FiniteFloat | None = None
    block_options: BlockOptions = field(default_factory=BlockOptions)
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        if not self.modules:
            raise PlanError("a plan needs at least one module.")
        if self.r_ref < 1:
            raise PlanError(f"r_ref={self.r_ref} must be at least 1.")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise PlanError(f"alpha={self.alpha} must be a positive number.")
        most = max(module.blocks for module in self.modules.values())
        if self.adapter != "ralora" and most > 1:
            raise PlanError(
                f"adapter {self.adapter!r} has one block per module, and this plan by "
                f"{self.method} up to {most}; use adapter 'ralora', or plan with lora, lora-gid, "
                "gard, water-fill or ls-lora."
            )
        if self.adapter != "ralora" and self.block_options != BlockOptions():
            raise PlanError(
                f"{self.block_options} is for block-diagonal adapters; a plan with adapter "
                f"{self.adapter!r} takes the defaults of scaling, rank_scaling and init_fan_in."
            )
        for name, shape in self.left_out.items():
            if name in self.modules:
                raise PlanError(f"module {name} is both adapted and left out; remove one of them.")
            if not all(0 < d <= _LARGEST_SIZE for d in (shape.d_in, shape.d_out)):
                raise PlanError(
                    f"left_out: module {name} has d_in={shape.d_in} and d_out={shape.d_out}; both "
                    "must be positive sizes of a layer."
                )
        if self.budget is not None and self.parameters > self.budget:
            raise PlanError(
                f"the plan takes {self.parameters} parameters, over its budget of {self.budget}."
            )

    @cached_property
    def parameters(self) -> int:
        """Trainable parameters of all adapters."""
        return sum(module.parameters for module in self.modules.values())

    @property
    def even_rank(self) -> float:
        """The rank of plain LoRA on all modules that were looked at, of as many parameters."""
        shapes = [*(module.shape for module in self.modules.values()), *self.left_out.values()]
        return self.parameters / sum(shape.rank_cost for shape in shapes)

    @property
    def scaling(self) -> float:
        """`alpha / r_ref`: the factor s of LoRA; `block_options` says what blocks make of it."""
        return self.alpha / self.r_ref

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON, atomically.

        Raises:
            FileError: The file cannot be written; an earlier one is untouched.
        """
        write_text(Path(path), json.dumps(asdict(self), indent=2, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> RankPlan:
        """Read a saved plan.

        Raises:
            FileError: Missing, malformed, of another schema, or with values that are not allowed.
        """
        path = Path(path)
        text = read_text(path, "rank plan")
        return parse_json(text, cls, path=path, what="rank plan", version=SCHEMA_VERSION)

    def check_fits(self, model: nn.Module, *, allow_other_base: bool = False) -> None:
        """Refuse a model that the plan was not made for.

        Args:
            model: The model to be adapted, without adapters.
            allow_other_base: Accept other weights in the same shapes, say a continued checkpoint
                or a quantised copy.

        Raises:
            PlanError: A module is missing, has another shape or cannot carry an adapter, or the
                weights are another model's.
        """
        modules = dict(model.named_modules())
        linear = {name for name, module in modules.items() if linear_shape(module) is not None}
        for name, planned in self.modules.items():
            shape = linear_shape(modules[name]) if name in modules else None
            if shape is None:
                raise PlanError(
                    f"the plan was made for another model: it adapts {name!r}, which is no linear "
                    f"layer of this {type(model).__name__}; {nearest(name, linear)}"
                )
            if shape != planned.shape:
                raise PlanError(
                    f"the plan was made for another model: {name} is {shape.d_out} x {shape.d_in} "
                    f"here and {planned.d_out} x {planned.d_in} in the plan. Plan again."
                )
        for name, reason in unusable_layers(model, linear).items():
            if name in self.modules:
                raise PlanError(
                    f"the plan adapts {name}, which cannot carry an adapter: it is {reason}. Plan "
                    "again without it."
                )
        if self.model_fingerprint is None or allow_other_base:
            return
        found = model_fingerprint(model)
        if found != self.model_fingerprint:
            raise PlanError(
                f"the plan was made for another model: profiled {self.model} with fingerprint "
                f"{self.model_fingerprint}, this one has {found}. Profile this model, or pass "
                "allow_other_base=True (--allow-other-base) to use the plan anyway."
            )

    def target_modules(self, model: nn.Module) -> list[str] | str:
        """A PEFT `target_modules` value that matches exactly the planned modules."""
        return exact_target_modules(list(self.modules), [n for n, _ in model.named_modules()])

    def to_lora_config(self, **options: Any) -> LoraConfig:
        """The plan as a plain `peft.LoraConfig`, for any tool that reads one.

        Ranks go into `rank_pattern` and the constant scaling into `alpha_pattern`, one anchored
        and escaped key per module, because PEFT reads keys as regular expressions on suffixes.
        `target_modules` is a list of full names, or, where PEFT would find such a name at the end
        of another module's, a regular expression that matches the planned modules only.

        Args:
            **options: Forwarded to `LoraConfig`, for example `lora_dropout` or `task_type`.

        Raises:
            PlanError: The plan has adapters that LoRA cannot express.
        """
        if self.adapter != "lora":
            kind = "block-diagonal" if self.adapter == "ralora" else "elementwise"
            raise PlanError(
                f"a {self.adapter} plan has {kind} adapters, which LoraConfig cannot express; use "
                "rankwise.attach(model, plan)."
            )
        alphas = {name: self.scaling * module.rank for name, module in self.modules.items()}
        uneven = {name: m.rank for name, m in self.modules.items() if m.rank != self.r_ref}
        return LoraConfig(
            r=self.r_ref,
            lora_alpha=_plain(self.alpha),  # type: ignore[arg-type]  # PEFT takes floats too
            target_modules=exact_target_modules(
                list(self.modules), [*self.modules, *self.left_out, *self.look_alikes]
            ),
            rank_pattern={_exactly(name): rank for name, rank in uneven.items()},
            alpha_pattern={_exactly(name): _plain(alphas[name]) for name in uneven},
            **options,
        )

    def diff(self, other: RankPlan) -> str:
        """A table of the modules that the two plans treat differently, this one's side first."""
        from rankwise.plan.words import diff

        return diff(self, other)

    def verdict(self) -> str:
        """One line: what the plan does, compared with uniform ranks of the same total."""
        from rankwise.plan.words import verdict

        return verdict(self)

    def to_markdown(self) -> str:
        """The plan as a block for a model card: verdict, totals, provenance and table."""
        from rankwise.plan.words import markdown

        return markdown(self)

    def __str__(self) -> str:
        from rankwise.plan.words import table

        return table(self)


def _exactly(name: str) -> str:
    return "^" + re.escape(name)


def _plain(number: float) -> float | int:
    """An int where the number is whole, as PEFT's configs write alphas."""
    return int(number) if float(number).is_integer() else number


def check_is_plan(value: object) -> None:
    """Refuse what is no plan, such as a method, a profile or a path.

    Raises:
        PlanError: It is none.
    """
    if not isinstance(value, RankPlan):
        raise PlanError(
            "a rank plan is needed, which plan(profile) of a method makes or RankPlan.load(path) "
            f"reads, not a {type(value).__name__}."
        )


def module_plans(
    shapes: Mapping[str, LinearShape],
    ranks: Mapping[str, int],
    blocks: Mapping[str, int],
    gid: Mapping[str, float],
) -> dict[str, ModulePlan]:
    """Assemble per-module numbers; a module of rank 0 carries no adapter and is left out."""
    return {
        name: ModulePlan(
            d_in=shape.d_in,
            d_out=shape.d_out,
            rank=ranks[name],
            blocks=blocks.get(name, 1),
            gid=gid.get(name),
        )
        for name, shape in shapes.items()
        if ranks[name] > 0
    }
