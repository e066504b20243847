"""Which modules of a model get an adapter, and their shapes.

The only file that interprets module names. `find_targets` follows PEFT's conventions (a list
matches suffixes, a string is a full-match regular expression), and says of every linear layer it
leaves out why it was left out.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from peft.utils import resolve_quantization_backend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rankwise.errors import TargetError, nearest
from rankwise.quantised import keep_layout_

ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class LinearShape:
    """Dimensions of a linear map `y = W x` with `W (d_out, d_in)`."""

    d_in: int
    d_out: int

    @property
    def rank_cost(self) -> int:
        """Trainable parameters of one unit of LoRA rank: `d_in + d_out`."""
        return self.d_in + self.d_out

    @property
    def max_rank(self) -> int:
        """The largest rank an update of this layer can have: `min(d_in, d_out)`."""
        return min(self.d_in, self.d_out)


@dataclass(frozen=True)
class LayerPosition:
    """Where a module sits in a stack of layers, read from its name.

    `model.layers.3.mlp.up_proj` is `mlp.up_proj` of layer 3 in the stack `model.layers`; a module
    outside any stack has an empty stack and no index.
    """

    stack: str
    index: int | None
    kind: str


def layer_position(name: str) -> LayerPosition:
    """Split a module name at its first number, the index of its layer."""
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part.isdecimal() and i + 1 < len(parts):
            return LayerPosition(".".join(parts[:i]), int(part), ".".join(parts[i + 1 :]))
    return LayerPosition("", None, name)


@dataclass(frozen=True)
class Targets(Mapping[str, LinearShape]):
    """The selected modules in model order, and the reason each left-out linear layer was left out.

    Behaves as a mapping from full module name to `LinearShape`.
    """

    shapes: Mapping[str, LinearShape]
    left_out: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    look_alikes: tuple[str, ...] = ()
    """Other modules of the model, of any kind, whose names end in the name of a target."""

    def __getitem__(self, name: str) -> LinearShape:
        return self.shapes[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def __str__(self) -> str:
        reasons: dict[str, list[str]] = {}
        for name, reason in self.left_out.items():
            reasons.setdefault(reason, []).append(name)
        lines = [f"{len(self)} target modules"]
        for reason, names in reasons.items():
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            lines.append(f"left out: {shown} ({reason})")
        return "\n".join(lines)


def linear_shape(module: nn.Module) -> LinearShape | None:
    """The shape of a linear layer, or None for any other module.

    Quantised layers store packed weights, so `in_features`/`out_features` are read rather than the
    weight; a transformers `Conv1D` stores its weight as `(d_in, d_out)`.
    """
    if isinstance(module, Conv1D):
        d_in, d_out = module.weight.shape
        return LinearShape(d_in=int(d_in), d_out=int(d_out))
    if isinstance(module, nn.Linear):
        return LinearShape(d_in=module.in_features, d_out=module.out_features)
    return None


def linear_weight(module: nn.Module) -> Tensor:
    """The weight of a linear layer as `(d_out, d_in)`, dequantised where it is quantised."""
    keep_layout_(module)
    # torchao's backend wants to know how to quantise again, which nobody does here
    backend = resolve_quantization_backend(module, get_apply_tensor_subclass=_not_quantised_again)
    if backend is not None:
        return backend.get_base_weight(module)
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.detach().T if isinstance(module, Conv1D) else weight.detach()


def _not_quantised_again() -> object:
    raise NotImplementedError("a weight is read here, never written")


def find_targets(model: nn.Module, targets: str | Sequence[str] = ALL_LINEAR) -> Targets:
    """Select the linear layers that are to carry an adapter.

    Args:
        model: Any module; transformers models are understood best. It must not carry adapters yet.
        targets: `"all-linear"` for every linear layer but the output head, task heads and
            embeddings; a list of names, each matching a module of that name or a name that ends in
            `.name`; or any other string, a regular expression that must match the full name.

    Returns:
        The selected modules with their shapes, in model order, and what was left out and why.

    Raises:
        TargetError: Nothing matches, or a match is not a linear layer, is tied to an embedding, or
            the model already carries adapters.
    """
    _refuse_adapted(model)
    modules = dict(model.named_modules())
    shapes = {name: shape for name, m in modules.items() if (shape := linear_shape(m)) is not None}
    for name in shapes:
        keep_layout_(modules[name])
    unusable = unusable_layers(model, shapes)
    if targets == ALL_LINEAR:
        left_out = _heads(model, shapes) | unusable
        left_out |= {
            f"{name}.{parameter}": "a stack of expert matrices, not a linear layer"
            for name, parameter in _expert_parameters(model)
        }
        chosen = {name: shape for name, shape in shapes.items() if name not in left_out}
        if not chosen:
            raise TargetError(
                f"targets='all-linear' matches no linear layer of {type(model).__name__}: "
                f"{len(shapes)} were found and all are heads or unusable; name the modules instead."
            )
        return Targets(chosen, MappingProxyType(left_out), _look_alikes(model, chosen))

    matched = _matched_names(targets, modules)
    _refuse_unsupported(matched, modules, shapes, unusable)
    chosen = {name: shapes[name] for name in modules if name in matched and name in shapes}
    if isinstance(targets, str):
        unmatched = [] if chosen else [targets]
    else:
        unmatched = [target for target in targets if not _ending_in(target, chosen)]
    if unmatched:
        named = _no_full_match if isinstance(targets, str) else _no_match
        raise named(unmatched[0], shapes)
    left_out = {name: "not named in targets" for name in shapes if name not in chosen}
    return Targets(chosen, MappingProxyType(left_out), _look_alikes(model, chosen))


def exact_target_modules(names: Sequence[str], model_names: Sequence[str]) -> list[str] | str:
    """A PEFT `target_modules` value that matches exactly `names` among `model_names`.

    A list of full names is what people expect to read, but PEFT also matches names that *end* in
    `.name`; where that would catch another module, a full-match regular expression is returned.
    """
    if not look_alikes(names, model_names):
        return list(names)
    return "(?:" + "|".join(re.escape(name) for name in names) + ")"


def count_parameters(model: nn.Module) -> int:
    """Parameters of a model, tied ones once, quantised linear layers as if they were not."""
    total, seen = 0, set()
    for module in model.modules():
        shape = linear_shape(module)
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            whole = shape is not None and name == "weight"
            total += shape.d_in * shape.d_out if shape and whole else parameter.numel()
    return total


def look_alikes(names: Iterable[str], others: Iterable[str]) -> list[str]:
    """Those of `others`, `names` themselves left aside, that end in `.` and one of `names`."""
    wanted = set(names)
    return [
        other
        for other in others
        if other not in wanted
        and any(other.split(".", i)[-1] in wanted for i in range(1, other.count(".") + 1))
    ]


def _look_alikes(model: nn.Module, chosen: Iterable[str]) -> tuple[str, ...]:
    return tuple(look_alikes(chosen, [name for name, _ in model.named_modules()]))


def _matched_names(targets: str | Sequence[str], modules: Mapping[str, nn.Module]) -> set[str]:
    if isinstance(targets, str):
        try:
            pattern = re.compile(targets)
        except re.error as error:
            raise TargetError(
                f"targets={targets!r} is not a regular expression ({error}); a string must match "
                "the full module name, a list of strings matches the ends of names."
            ) from error
        return {name for name in modules if pattern.fullmatch(name)}
    if not targets or not all(isinstance(target, str) and target for target in targets):
        raise TargetError(
            f"targets={targets!r} must be 'all-linear', a regular expression, or a non-empty list "
            "of module names."
        )
    return {name for target in targets for name in _ending_in(target, modules)}


def _ending_in(target: str, names: Iterable[str]) -> set[str]:
    return {name for name in names if name == target or name.endswith("." + target)}


def _no_match(target: str, shapes: Mapping[str, LinearShape]) -> TargetError:
    kinds = {name.rsplit(".", 1)[-1] for name in shapes}
    return TargetError(
        f"targets: {target!r} matches no linear layer of this model; "
        f"{nearest(target, kinds)} ('all-linear' selects every layer but the heads.)"
    )


def _no_full_match(pattern: str, shapes: Mapping[str, LinearShape]) -> TargetError:
    example = next((name for name in shapes if re.search(pattern, name)), None)
    if example is None:
        return _no_match(pattern, shapes)
    return TargetError(
        f"targets: {pattern!r} matches no full name of a linear layer; a string is a regular "
        f"expression of whole names, such as {example!r}. Write '.*({pattern}).*' for all that "
        "contain it, or a list, whose items match the ends of names."
    )


def _refuse_adapted(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if hasattr(module, "base_layer"):
            raise TargetError(
                f"{name or type(model).__name__} already carries an adapter; pass the base model "
                "(model.unload() removes adapters)."
            )


def _refuse_unsupported(
    matched: set[str],
    modules: Mapping[str, nn.Module],
    shapes: Mapping[str, LinearShape],
    unusable: Mapping[str, str],
) -> None:
    for name in sorted(matched):
        module = modules[name]
        if name in unusable:
            raise TargetError(
                f"{name} cannot carry an adapter: it is {unusable[name]}; leave it out."
            )
        has_weights = any(True for _ in module.parameters(recurse=False))
        if name not in shapes and has_weights:
            raise TargetError(
                f"{name} is a {type(module).__name__}; only Linear and Conv1D layers can carry an "
                "adapter. Leave it out of targets."
            )


def _heads(model: nn.Module, shapes: Mapping[str, LinearShape]) -> dict[str, str]:
    """Output and task heads: the output embedding, and what lies outside the transformers body."""
    reasons: dict[str, str] = {}
    get_output = getattr(model, "get_output_embeddings", None)
    head = get_output() if callable(get_output) else None
    body = getattr(model, "base_model", model)
    inside = {id(module) for module in body.modules()} if isinstance(body, nn.Module) else set()
    for name, module in model.named_modules():
        if name not in shapes:
            continue
        if head is not None and module is head:
            reasons[name] = "the output head"
        elif inside and id(module) not in inside:
            reasons[name] = "a task head, outside the model body"
    return reasons


def unusable_layers(model: nn.Module, shapes: Collection[str]) -> dict[str, str]:
    """Which of these linear layers no adapter can serve, and why, as in "it is ...".

    Weights tied to an embedding, into which merging would write for it too; of several layers with
    one weight all but the first, which counts for them; and weights read without a forward.
    """
    reasons: dict[str, str] = {}
    owners: dict[int, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and (weight := _own_weight(module)) is not None:
            owners.setdefault(id(weight), name)
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            reasons[f"{name}.out_proj"] = "read by MultiheadAttention without calling it"
        if _is_mamba_mixer(module):
            # transformers computes with the weight of one, its CUDA kernels with both; PEFT's LoRA
            # refuses the other
            for part in ("dt_proj", "out_proj"):
                reasons[f"{name}.{part}"] = "read by a Mamba mixer without calling it"
        weight = _own_weight(module)
        if name in shapes and weight is not None:
            owner = owners.setdefault(id(weight), name)
            if owner != name:
                reasons[name] = f"tied: it shares its weight with {owner}"
    return {name: reason for name, reason in reasons.items() if name in shapes}


def _own_weight(module: nn.Module) -> Tensor | None:
    """The parameter; a parametrised weight is another tensor each time it is asked for."""
    return module._parameters.get("weight")


def _is_mamba_mixer(module: nn.Module) -> bool:
    kind = type(module).__name__
    return "Mamba" in kind and kind.endswith("Mixer")


def _expert_parameters(model: nn.Module) -> Iterator[tuple[str, str]]:
    for name, module in model.named_modules():
        for parameter_name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim != 3 or isinstance(module, nn.modules.conv._ConvNd):
                continue
            if len(parameter) > 1:  # one alone is a class token or a table of positions
                yield name, parameter_name
