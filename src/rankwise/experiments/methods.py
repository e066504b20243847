"""The methods of an experiment by name: baselines, ours, and those that are not available."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import nn

from rankwise.adapters import LrLoraConfig, RaLoraConfig
from rankwise.dynamic import DynamicOptions, rule_of
from rankwise.errors import ConfigError, PlanError, nearest
from rankwise.experiments.baselines import BASELINES, NOT_AVAILABLE, SIZE_OPTIONS
from rankwise.experiments.contestants import Contestant, Planned, Sized, Unavailable, Whole
from rankwise.experiments.ours import lr_lora, melora
from rankwise.experiments.sizing import Baseline, Job, Size, set_option
from rankwise.methods import METHODS
from rankwise.targets import LinearShape
from rankwise.training.options import make_method

_DYNAMIC, _EARLY = "-dynamic", "-early-dynamic"
_OWN_KEYS = ("name", "label", "learning_rate", "alpha_over_r")

CONTROLS: Mapping[str, Mapping[str, str]] = {
    "gradient-norm": {"estimator": "gradient-norm"},
    "depth": {"estimator": "depth"},
    "random": {"estimator": "random"},
}
"""Names for the controls of rank allocation among `Compose`'s settings."""


@dataclass(frozen=True)
class Entry:
    """A method as an experiment names it.

    Attributes:
        name: Of the method.
        label: As tables call it.
        options: As the file gives them, without name and label.
        contestant: What runs.
        learning_rate: Fixed by the file; None to choose it on the grid.
    """

    name: str
    label: str
    options: Mapping[str, Any]
    contestant: Contestant
    learning_rate: float | None = None

    @property
    def slug(self) -> str:
        """The label as file names have it."""
        return re.sub(r"[^a-z0-9.+=]+", "-", self.label.lower()).strip("-")

    @property
    def reason(self) -> str | None:
        """Why it cannot be run, if it cannot."""
        return self.contestant.reason if isinstance(self.contestant, Unavailable) else None


def make_entry(method: str | Mapping[str, Any]) -> Entry:
    """A method from its name, or from a mapping with `name`, options and perhaps a `label`.

    Raises:
        ConfigError: The name or an option is unknown, or a value is not allowed.
    """
    options = {"name": method} if isinstance(method, str) else dict(method)
    given = {key: options.pop(key, None) for key in _OWN_KEYS}
    name, label, rate = given["name"], given["label"], given["learning_rate"]
    if not isinstance(name, str) or name not in known_methods():
        raise ConfigError(f"{name!r} is not a method; {nearest(str(name), known_methods())}")
    if rate is not None and not (isinstance(rate, int | float) and rate > 0):
        raise ConfigError(f"{name}.learning_rate={rate!r} must be a positive number.")
    scale = 2.0 if given["alpha_over_r"] is None else given["alpha_over_r"]
    if not isinstance(scale, int | float) or isinstance(scale, bool) or scale <= 0:
        raise ConfigError(f"{name}.alpha_over_r={scale!r} must be a positive number.")
    contestant = _contestant(name, dict(options), float(scale))
    if label is None:
        shown = ", ".join(f"{key}={value}" for key, value in options.items())
        label = f"{name} ({shown})" if options else name
    kept = options | ({} if scale == 2.0 else {"alpha_over_r": scale})
    entry = Entry(name, str(label), kept, contestant, rate)
    if not isinstance(label, str) or not entry.slug:
        raise ConfigError(f"{name}.label={label!r} must hold letters or digits.")
    return entry


def known_methods() -> list[str]:
    """Every name that an experiment may use."""
    ours = [name for name in METHODS if name != "lora"]
    moving = [name for name in (*ours, *CONTROLS) if _can_move(name)]
    return [
        *BASELINES,
        *("full", "zero-shot", "head-only", "lr-lora", "sinelora", "melora"),
        *ours,
        *CONTROLS,
        *(name + suffix for name in moving for suffix in (_DYNAMIC, _EARLY)),
        *NOT_AVAILABLE,
    ]


def _can_move(name: str) -> bool:
    try:
        rule_of(make_method("compose" if name in CONTROLS else name, {}))
    except PlanError:
        return False
    return True


def _contestant(name: str, options: dict[str, Any], scale: float) -> Contestant:
    if name in NOT_AVAILABLE:
        return Unavailable(NOT_AVAILABLE[name])
    if name in ("full", "zero-shot", "head-only"):
        _refuse_options(name, options)
        if scale != 2.0:
            raise ConfigError(f"{name}.alpha_over_r: it has no alpha.")
        return Whole(name)
    if name in BASELINES:
        return _sized(BASELINES[name], options, scale)
    if name in ("lr-lora", "sinelora"):
        settings = {"basis": "sine"} | options if name == "sinelora" else options
        return Sized(lr_lora(name, settings, scale), ours=name == "lr-lora")
    if name == "melora":
        return Sized(melora(name, options, scale))
    return _planned(name, options, scale)


def _sized(baseline: Baseline, options: dict[str, Any], scale: float) -> Sized:
    """A baseline, its options checked against the configuration they will be set on."""
    job = Job(nn.Identity(), {"x": LinearShape(64, 64)}, 1024, [], 100)  # type: ignore[arg-type]
    config = baseline.config(job, baseline.solve(job.targets, job.budget))
    known = sorted(set(vars(config)) - SIZE_OPTIONS)
    for key, value in options.items():
        if key not in known:
            raise ConfigError(f"{baseline.name}.{key}: no such option; {nearest(key, known)}")
        set_option(config, key, value, where=baseline.name)
    if scale != 2.0:
        if not hasattr(config, "lora_alpha") and not hasattr(config, "alpha"):
            raise ConfigError(f"{baseline.name}.alpha_over_r: it has no alpha.")
        baseline = replace(baseline, config=_rescaled(baseline, scale / 2.0))
    return Sized(baseline, options)


def _rescaled(baseline: Baseline, factor: float) -> Any:
    def config(job: Job, size: Size) -> Any:
        made: Any = baseline.config(job, size)
        name = "lora_alpha" if hasattr(made, "lora_alpha") else "alpha"  # of GraLoRA and ours
        setattr(made, name, getattr(made, name) * factor)
        if patterns := getattr(made, "alpha_pattern", None):
            made.alpha_pattern = {key: value * factor for key, value in patterns.items()}
        return made

    return config


def _planned(name: str, options: dict[str, Any], scale: float) -> Planned:
    """One of `METHODS`, with what its name and options say of adapter and movement."""
    base = name.removesuffix(_EARLY).removesuffix(_DYNAMIC)
    dynamic = options.pop("dynamic", None)
    if base != name:
        dynamic = dynamic or {}
    elif dynamic is not None:
        raise ConfigError(f"{name}.dynamic: name the method {name}-dynamic.")
    settings = dict(options)
    if base in CONTROLS:
        base, settings = "compose", dict(CONTROLS[base]) | settings
    adapter = settings.pop("adapter", None)
    if adapter == "ralora" and base == "water-fill":
        base, settings = "compose", {"rule": "water-fill", "r_min": 0} | settings
    method_fields = {field.name for field in fields(METHODS[base])}
    if "adapter" in method_fields and adapter is not None:
        settings["adapter"] = adapter
    elif adapter not in (None, METHODS[base].adapter, "lr-lora"):
        raise ConfigError(f"{name}.adapter={adapter!r} must be 'lr-lora' or left out.")
    kind = (
        adapter or METHODS[base].adapter if base != "compose" else settings.get("adapter", "lora")
    )
    carried = {key: settings.pop(key) for key in list(settings) if key not in method_fields}
    _check_adapter_options(name, kind, carried, method_fields)
    if dynamic is not None and adapter not in (None, "lora"):
        raise ConfigError(f"{name}.adapter={adapter!r}: ranks move in plain LoRA only.")
    if "r" in settings or "alpha" in settings:
        raise ConfigError(f"{name}: the budget sets r and alpha; use budgets and alpha_over_r.")
    made = Planned(
        base,
        settings,
        adapter=adapter if adapter == "lr-lora" else None,
        adapter_options=carried,
        dynamic=dynamic,
        early=name.endswith(_EARLY),
        alpha_over_r=scale,
        ours=name.removesuffix(_EARLY).removesuffix(_DYNAMIC) not in CONTROLS,
    )
    made.method(8, budget=1)
    _check_dynamic(made, name)
    return made


def _check_adapter_options(
    name: str, kind: str, options: Mapping[str, Any], method_fields: set[str]
) -> None:
    cls: Any = {"ralora": RaLoraConfig, "lr-lora": LrLoraConfig}.get(kind)
    allowed = set() if cls is None else {f.name for f in fields(cls)} - SIZE_OPTIONS
    for key in options:
        if key not in allowed:
            known = (method_fields | allowed | {"adapter", "dynamic"}) - {"r", "alpha"}
            raise ConfigError(f"{name}.{key}: no such option; {nearest(key, known)}")
    if cls is not None:
        try:
            cls(target_modules=["x"], **options)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{name}: {error}") from error


def _check_dynamic(made: Planned, name: str) -> None:
    if made.dynamic is None:
        return
    known = [field.name for field in fields(DynamicOptions)]
    for key in made.dynamic:
        if key not in known:
            raise ConfigError(f"{name}.dynamic.{key}: no such option; {nearest(key, known)}")
    try:
        made.dynamic_options(1000)
        rule_of(made.method(8, budget=1))
    except PlanError as error:
        raise ConfigError(f"{name}: {error}") from error


def _refuse_options(name: str, options: Mapping[str, Any]) -> None:
    if options:
        raise ConfigError(f"{name} has no options, but {', '.join(options)} was given.")
