"""One YAML file describes a run; every key is checked, and can be overridden by `key=value`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from peft import LoraConfig
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from rankwise.adapters import LrLoraConfig, RaLoraConfig
from rankwise.adapters.options import check_positive
from rankwise.adapters.param_groups import AMPLITUDE_RATIO
from rankwise.dynamic import DynamicOptions, rule_of
from rankwise.errors import ConfigError, PlanError, nearest
from rankwise.files import describe, read_text
from rankwise.methods import Method
from rankwise.training.options import FULL, build, make_method
from rankwise.training.yaml_text import parse_assignment, parse_yaml

_RATIO_KEY = "amplitude_ratio"
_DYNAMIC = "-dynamic"
_ADAPTERS: Mapping[str, type[LoraConfig | LrLoraConfig | RaLoraConfig]] = {
    "lora": LoraConfig,
    "lr-lora": LrLoraConfig,
    "ralora": RaLoraConfig,
}
_BY_PLAN = {
    *("r", "alpha", "lora_alpha", "blocks", "target_modules", "rank_pattern", "alpha_pattern"),
    *("blocks_pattern", "dropout", "lora_dropout", "base_fingerprint"),
}
"""Options of adapters that the plan and `training` decide."""
Dtype = Literal["float32", "bfloat16", "float16"]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class DataConfig(_Section):
    """Where the text comes from and how it is cut.

    A row holds either `text`, or `prompt` and `completion`; with a completion, only its tokens
    count towards the loss.
    """

    train: str = Field(description="a .jsonl, .json, .csv or .parquet file, or a hub data set id")
    held_out: str | None = Field(
        default=None, description="likewise; without it, held_out_fraction of train is held out"
    )
    subset: str | None = Field(default=None, description="configuration name of a hub data set")
    train_split: str = Field(default="train", description="split of a hub data set to train on")
    held_out_split: str = Field(default="test", description="split of a hub data set to hold out")
    held_out_fraction: float = Field(default=0.05, gt=0, lt=1)
    text_column: str = "text"
    prompt_column: str = "prompt"
    completion_column: str = "completion"
    start: str = Field(
        default="",
        description="read in front of every row and not learned, such as a line break; for models "
        "whose tokenizer adds no first token",
    )
    max_length: int = Field(default=512, ge=2, description="tokens per sequence")
    packing: bool = Field(
        default=False,
        description="join texts and cut them into full sequences, instead of truncating each",
    )
    max_rows: int | None = Field(default=None, ge=1, description="use only the first rows to train")
    max_held_out: int | None = Field(
        default=None, ge=1, description="use only the first held-out sequences"
    )


class ProfileConfig(_Section):
    """How gradients are measured before training; ignored by methods that need no profile."""

    batches: int | None = Field(default=None, ge=1, description="default: 8, and 32 for gard")
    batch_size: int | None = Field(default=None, ge=1, description="default: training.batch_size")
    train_mode: bool = Field(default=False, description="profile with dropout on")


class TrainingConfig(_Section):
    """Optimizer and schedule, carried out by TRL's SFTTrainer."""

    steps: int | None = Field(default=None, ge=1, description="optimizer steps; default: epochs")
    epochs: float = Field(default=1.0, gt=0)
    batch_size: int = Field(default=8, ge=1)
    gradient_accumulation: int = Field(default=1, ge=1)
    learning_rate: float = Field(default=2e-4, gt=0)
    scheduler: Literal["cosine", "linear", "constant"] = Field(
        default="cosine", description="cosine falls to 10 % of the learning rate"
    )
    warmup: float = Field(default=0.03, ge=0, lt=1, description="share of the steps")
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, ge=0)
    dropout: float = Field(default=0.0, ge=0, lt=1, description="of the adapters")
    gradient_checkpointing: bool = False
    fuse_lora: bool = Field(
        default=True,
        description="plain LoRA in few passes over memory, see `rankwise.fuse_lora_`",
    )
    evaluate_every: int | None = Field(
        default=None, ge=1, description="steps between held-out evaluations; default: a fifth"
    )
    evaluation_batch_size: int = Field(default=8, ge=1)
    log_every: int = Field(default=5, ge=1)
    report_to: list[str] = Field(default_factory=list, description="as in transformers")


class TrackConfig(_Section):
    """Which gradients to follow while training, and how often; see `training.tracking`."""

    every: int = Field(default=5, ge=1, description="optimizer steps from one to the next")
    modules: str | list[str] | None = Field(
        default=None, description="as targets; default: those of the first and the last layer"
    )


class AnalysisConfig(_Section):
    """What is recorded of the adapters while they train, in `analysis.json`."""

    steps: list[Annotated[int, Field(ge=0)]] | None = Field(
        default=None,
        description="optimizer steps; 0 is before training; default: four with LR-LoRA, else none",
    )
    modules: list[str] | None = Field(
        default=None,
        description="whose functions and spectra are kept; default: the first, middle and last",
    )


class RunConfig(_Section):
    """Everything one run needs."""

    model: str = Field(description="a local transformers folder or a hub id")
    data: DataConfig
    output: str = Field(description="folder for adapter, plan, profile and record")
    method: dict[str, Any] = Field(
        default_factory=lambda: {"name": "ralora"}, description="name and its options"
    )
    adapter: dict[str, Any] = Field(
        default_factory=dict,
        description="another kind of adapter with the method's ranks, and its options: "
        "`kind=lr-lora points=50`; default: the method's own",
    )
    dynamic: dict[str, Any] | None = Field(
        default=None,
        description="options of ranks that move while training, see `rankwise.DynamicOptions`; {} "
        "for the defaults; a method named NAME-dynamic is NAME with these",
    )
    targets: str | list[str] = "all-linear"
    plan: str | None = Field(default=None, description="a saved plan, instead of profiling")
    allow_other_base: bool = Field(
        default=False, description="take the plan for other weights of the same shapes"
    )
    dtype: Dtype = "float32"
    seed: int = Field(default=0, ge=0, lt=2**32)
    profile: ProfileConfig = ProfileConfig()
    training: TrainingConfig = TrainingConfig()
    track: TrackConfig | None = Field(
        default=None,
        description="follow the gradients' dimensions while training: `gid`, or a mapping of "
        "`every` and `modules`",
    )
    analysis: AnalysisConfig = AnalysisConfig()

    @field_validator("track", mode="before")
    @classmethod
    def _track_by_name(cls, value: object) -> object:
        return {} if value == "gid" else value

    @model_validator(mode="after")
    def _method_is_known(self) -> RunConfig:
        if self.is_full:
            self._check_full()
        else:
            self.make_method()
            self.make_dynamic()
            self.adapter_options()
            self._check_plan()
        return self

    @property
    def is_full(self) -> bool:
        """Whether every weight trains, without adapters."""
        return self.method.get("name") == FULL

    def _check_full(self) -> None:
        more = [key for key in self.method if key != "name"]
        if more:
            raise ConfigError(f"method.{more[0]}: {FULL} has no options.")
        if self.dynamic is not None or self.plan is not None or self.adapter:
            raise ConfigError(
                f"method.name={FULL!r}: has no ranks; leave out dynamic, plan and adapter."
            )
        if self.dtype != "float32":
            raise ConfigError(
                f"dtype={self.dtype!r}: AdamW's steps vanish in 16-bit weights; {FULL} needs "
                "dtype=float32."
            )
        if self.analysis.steps or self.analysis.modules:
            raise ConfigError(
                f"analysis: records adapters, which method.name={FULL!r} has none of; leave it out."
            )

    def _check_plan(self) -> None:
        """A plan has its ranks: only ranks that move from there on follow a method's options."""
        options = [key for key in self.method if key != "name"]
        if self.plan is not None and options and self.make_dynamic() is None:
            raise ConfigError(
                f"method.{options[0]}={self.method[options[0]]!r}: is not used beside "
                f"plan={self.plan!r}, which has its ranks; leave out one of the two."
            )

    def make_method(self) -> Method:
        """The method with its options."""
        options = dict(self.method)
        name = options.pop("name", None)
        return make_method(name.removesuffix(_DYNAMIC) if isinstance(name, str) else name, options)

    def make_dynamic(self) -> DynamicOptions | None:
        """When and how far ranks move while training; None if they do not.

        Raises:
            ConfigError: An option is unknown or not allowed, or the method's ranks cannot move.
        """
        named = str(self.method.get("name")).endswith(_DYNAMIC)
        if self.dynamic is None and not named:
            return None
        known = [field.name for field in fields(DynamicOptions)]
        for key in self.dynamic or {}:
            if key not in known:
                raise ConfigError(f"dynamic.{key}: no such option; {nearest(str(key), known)}")
        try:
            rule_of(self.make_method())
        except PlanError as error:
            raise ConfigError(f"dynamic: {error}") from error
        return build(DynamicOptions, self.dynamic or {}, "dynamic")

    def adapter_options(self) -> dict[str, Any]:
        """What `rankwise.attach` is told beside the plan.

        Raises:
            ConfigError: The kind or an option is unknown or not allowed, or ranks are to move.
        """
        if not self.adapter:
            return {}
        options = dict(self.adapter)
        kind = options.pop("kind", None)
        if not isinstance(kind, str) or kind not in _ADAPTERS:
            raise ConfigError(f"adapter.kind={kind!r}; {nearest(str(kind), _ADAPTERS)}")
        if kind != "lora" and self.make_dynamic() is not None:
            raise ConfigError(f"adapter.kind={kind!r}: only plain LoRA has ranks that move.")
        method = self.make_method()
        blocks = method.adapter == "ralora" and getattr(method, "n_max", 0) != 1
        if kind != "ralora" and self.plan is None and blocks:
            raise ConfigError(
                f"adapter.kind={kind!r}: has one block per module, and method.name={method.name!r} "
                "makes more; set method.name to lora, lora-gid, gard, water-fill or ls-lora, or "
                "method.n_max=1."
            )
        if kind == "lr-lora":
            options.pop(_RATIO_KEY, None)
        cls = _ADAPTERS[kind]
        known = [field.name for field in fields(cls) if field.name in cls.__annotations__]
        for key in options:
            if key in _BY_PLAN or key not in known:
                allowed = [name for name in known if name not in _BY_PLAN]
                raise ConfigError(f"adapter.{key}: not an option; {nearest(str(key), allowed)}")
        try:
            check_positive(_RATIO_KEY, self.amplitude_ratio)
            cls(target_modules=["-"], **options)
        except (TypeError, ValueError, ArithmeticError) as error:
            raise ConfigError(f"adapter: {error}") from error
        return {"adapter": kind, **options}

    @property
    def amplitude_ratio(self) -> float:
        """Learning rate of LR-LoRA's amplitudes in units of the others'."""
        ratio: float | None = self.adapter.get(_RATIO_KEY)
        return AMPLITUDE_RATIO if ratio is None else ratio


def load_config(
    path: Path, overrides: Sequence[str] = (), *, track: str | None = None
) -> RunConfig:
    """Read a run configuration and apply overrides.

    Args:
        path: A YAML file.
        overrides: `section.key=value`, the value in YAML: `training.steps=20`.
        track: `"gid"` switches tracking on, with the file's settings where it has any.

    Raises:
        FileError: The file is missing or unreadable.
        ConfigError: It is not YAML, a key is unknown (the nearest known one is named), or a value
            is not allowed.
    """
    text = read_text(path, "run configuration")
    document = parse_yaml(text, str(path))
    if not isinstance(document, dict):
        raise ConfigError(f"{path}: must hold keys and values, such as 'model: ...'.")
    if track is not None:
        if track != "gid":
            raise ConfigError(f"track={track!r}; gid is what can be followed.")
        if document.get("track") is None:  # a run's own run.yaml says null
            document["track"] = {}
    for override in overrides:
        _override(document, override)
    return validate(document, str(path))


def validate(document: Mapping[str, Any], where: str) -> RunConfig:
    """A configuration from plain values.

    Raises:
        ConfigError: A key is unknown or a value is not allowed.
    """
    refuse_unknown(document, RunConfig, where)
    try:
        return RunConfig.model_validate(document)
    except ValidationError as error:
        raise ConfigError(f"{where}: {describe(error)}") from error


def refuse_unknown(document: object, model: type[BaseModel], where: str, prefix: str = "") -> None:
    """Refuse keys that a section does not have, naming the nearest one.

    Raises:
        ConfigError: There is such a key.
    """
    if not isinstance(document, dict):
        return
    for key, value in document.items():
        if key not in model.model_fields:
            hint = nearest(str(key), model.model_fields)
            raise ConfigError(f"{where}: unknown key {prefix + str(key)!r}; {hint}")
        annotation = model.model_fields[key].annotation
        for section in (annotation, *get_args(annotation)):  # `Section | None` as well
            if isinstance(section, type) and issubclass(section, BaseModel):
                refuse_unknown(value, section, where, f"{prefix}{key}.")


def _override(document: dict[str, Any], assignment: str) -> None:
    key, value = parse_assignment(assignment)
    *sections, last = key.split(".")
    place = document
    for section in sections:
        if place.get(section) is None:
            place[section] = {}
        inner = place[section]
        if not isinstance(inner, dict):
            raise ConfigError(f"{assignment!r}: {section} is not a section of the configuration.")
        place = inner
    place[last] = value
