"""Loading adapters from strangers: everything is checked before anything is allocated.

Nothing in the folder is executed, imported, followed or matched as a regular expression. Names and
shapes come from the header of the safetensors file; which modules are adapted follows from the
tensors' names, not from the configuration's patterns.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from rankwise.adapters.base_fingerprint import FINGERPRINT_KEY, remember_base_
from rankwise.adapters.block_diagonal import RaLoraConfig
from rankwise.adapters.lr_lora_config import LrLoraConfig
from rankwise.adapters.saved_config import (
    WHAT,
    OurConfig,
    Saved,
    SavedConfig,
    SavedLora,
    peft_config,
    read_config,
)
from rankwise.adapters.transfer import BASES
from rankwise.adapters.whole_modules import trained_whole
from rankwise.errors import FileError, nearest
from rankwise.files import read_tensors
from rankwise.provenance import model_fingerprint
from rankwise.targets import LinearShape, exact_target_modules, linear_shape

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
_SAVED_TWICE = ".modules_to_save."
"""PEFT saves biases of such a module under its own name as well, and reads them from there only."""
_HEADS = ("classifier", "score")
"""What PEFT adds to `modules_to_save` of every classifier, whichever of them the model has."""
_DTYPES = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class _Weights:
    """What the header of the weights says: name -> shape, and the fingerprint of the base."""

    path: Path
    shapes: dict[str, tuple[int, ...]]
    base_fingerprint: str | None = None

    def fail(self, problem: str) -> FileError:
        return FileError(f"adapter weights {self.path}: {problem}")


def load_adapter(
    model: nn.Module,
    folder: str | Path,
    *,
    adapter_name: str = "default",
    trainable: bool = False,
    allow_other_base: bool = False,
) -> PeftModel:
    """Attach a saved block-diagonal, LR-LoRA or plain LoRA adapter that may come from a stranger.

    Use this rather than `PeftModel.from_pretrained` for files that you did not write: names,
    shapes, dtypes and numbers are checked against the model before anything is allocated. Biases
    that the adapter trained become the model's, as in PEFT. Links are followed only within the
    folder and, in a Hugging Face hub cache, to its own blobs.

    Args:
        model: The base model, without adapters; it is modified in place.
        folder: A local folder with `adapter_config.json` and `adapter_model.safetensors`.
        adapter_name: Name of the adapter.
        trainable: Whether to go on training.
        allow_other_base: Accept a model that is not the one the adapter was trained on.

    Raises:
        FileError: Something is missing, malformed, unknown, or does not fit the model; the model is
            as it was.
    """
    folder = Path(folder)
    if isinstance(model, PeftModel) or hasattr(model, "peft_config"):
        raise FileError(f"adapter {folder}: the model has adapters already; load the base again.")
    path = _file(folder, CONFIG_FILE)
    saved = read_config(path)
    weights = _read_header(_file(folder, WEIGHTS_FILE))
    _check_base(model, saved, path)
    if not allow_other_base:
        _check_fingerprint(model, saved, weights, path)
    shapes = {n: s for n, m in model.named_modules() if (s := linear_shape(m)) is not None}
    kind = saved.peft_type.lower()
    names = _adapted_modules(weights, shapes, kind)
    _check_targets(saved, names, path)
    config = peft_config(saved, names, path, trainable)
    if weights.base_fingerprint:
        remember_base_(config, weights.base_fingerprint)
    _check_task(model, saved, names, path)
    expected = _expected_shapes(config, {name: shapes[name] for name in names})
    whole = _whole_modules(model, saved, path)
    expected |= {
        f"{PREFIX}{name}.{key}": shape for name, own in whole.items() for key, shape in own.items()
    }
    expected |= _biases(model, saved, names, list(whole), weights)
    _check_shapes(weights, expected)
    tensors = _read_tensors(weights)
    for name in [name for name in tensors if _SAVED_TWICE in name]:
        del tensors[name]
    config.target_modules = exact_target_modules(names, [n for n, _ in model.named_modules()])
    with torch.random.fork_rng(devices=[]):  # PEFT draws an adapter before it is overwritten
        adapted = get_peft_model(model, config, adapter_name=adapter_name)
    left: Any = set_peft_model_state_dict(adapted, tensors, adapter_name=adapter_name)
    if left.unexpected_keys:  # the shapes were checked, so that none should be left
        raise weights.fail(f"has {left.unexpected_keys[0]!r}, for which PEFT finds no place.")
    return adapted if trainable else adapted.eval()


def _file(folder: Path, name: str) -> Path:
    """A file of the folder, which is neither a link out of it nor a pickle."""
    if "\0" in str(folder):
        raise FileError(f"adapter folder {str(folder)!r}: a name cannot contain NUL.")
    path = folder / name
    if path.is_symlink() and not _stays_inside(path):
        raise FileError(
            f"{path}: is a symbolic link out of the folder, to {path.readlink()}; copy the file it "
            "points to."
        )
    if not path.is_file():
        pickles = [p.name for p in folder.glob("*") if p.suffix in (".bin", ".pt", ".pth", ".pkl")]
        hint = f" {pickles[0]} is a pickle, which is never opened." if pickles else ""
        raise FileError(
            f"{path}: no such file; name a folder with {CONFIG_FILE} and {WEIGHTS_FILE}.{hint}"
        )
    return path


def _stays_inside(link: Path) -> bool:
    """Whether a link ends in its own folder, or in the blobs of the hub cache the folder is in."""
    # unlike Path.resolve, realpath makes nothing of links in a circle
    folder, target = (Path(os.path.realpath(path)) for path in (link.parent, link))
    if target.parent == folder:
        return True
    # MODEL/snapshots/REVISION/[SUBFOLDER/]FILE -> MODEL/blobs/HASH
    snapshots = next((p for p in folder.parents if p.name == "snapshots"), None)
    return snapshots is not None and target.parent == snapshots.parent / "blobs"


def _read_header(path: Path) -> _Weights:
    """Names, shapes and dtypes; safetensors bounds the header and refuses overlaps and gaps."""
    shapes = {}
    try:
        with safe_open(path, framework="pt") as tensors:
            fingerprint = (tensors.metadata() or {}).get(FINGERPRINT_KEY)
            for name in tensors.keys():  # noqa: SIM118
                part = tensors.get_slice(name)
                if part.get_dtype() not in _DTYPES:
                    raise FileError(
                        f"adapter weights {path}: {name!r} is {part.get_dtype()}; adapters are "
                        f"{', '.join(_DTYPES)}."
                    )
                shapes[name] = tuple(part.get_shape())
    except (SafetensorError, OSError, ValueError, OverflowError) as error:
        if isinstance(error, FileError):
            raise
        raise FileError(
            f"adapter weights {path}: not a whole safetensors file ({error})."
        ) from error
    return _Weights(path, shapes, fingerprint)


def _check_base(model: nn.Module, saved: Saved, path: Path) -> None:
    """Classes and modules that the configuration asks to import may only be the model's own."""
    mapping = saved.auto_mapping or {}
    here = {
        "base_model_class": type(model).__name__,
        "parent_library": type(model).__module__,
        "unsloth_fixed": None,
    }
    for key, value in mapping.items():
        if value is not None and value != here.get(key):
            raise FileError(
                f"{WHAT} {path}: auto_mapping asks to import {key}={value!r}, which rankwise "
                f"never does; the model is a {type(model).__name__}. Set auto_mapping to null."
            )


def _check_fingerprint(model: nn.Module, saved: Saved, weights: _Weights, path: Path) -> None:
    """Block-diagonal adapters have it in the configuration, plain LoRA beside the tensors."""
    trained_on = getattr(saved, "base_fingerprint", None) or weights.base_fingerprint
    if trained_on is None:
        return
    if not re.fullmatch(r"[0-9a-f]{16}", trained_on):
        raise FileError(f"{WHAT} {path}: base_fingerprint={trained_on[:40]!r} is no fingerprint.")
    found = model_fingerprint(model)
    if found != trained_on:
        raise FileError(
            f"{WHAT} {path}: the adapter was trained on a model with fingerprint {trained_on}, "
            f"this one has {found}. Load the right base, or pass allow_other_base=True "
            "(--allow-other-base) to use it anyway."
        )


def _adapted_modules(weights: _Weights, shapes: Mapping[str, LinearShape], kind: str) -> list[str]:
    """Modules that the file has both factors for, in the model's order."""
    halves: dict[str, set[str]] = {}
    for name in weights.shapes:
        for half in "AB":
            ending = f".{kind}_{half}.weight"
            if name.startswith(PREFIX) and name.endswith(ending):
                halves.setdefault(name.removeprefix(PREFIX).removesuffix(ending), set()).add(half)
    for module, found in halves.items():
        if module not in shapes:
            raise weights.fail(
                f"has factors for {module!r}, which is no linear layer of the model; "
                f"{nearest(module, shapes)}"
            )
        if found != {"A", "B"}:
            (missing,) = {"A", "B"} - found
            raise weights.fail(f"lacks {PREFIX}{module}.{kind}_{missing}.weight.")
    if not halves:
        raise weights.fail(f"holds no tensor named {PREFIX}MODULE.{kind}_A.weight.")
    return [name for name in shapes if name in halves]


def _check_targets(saved: SavedConfig, names: list[str], path: Path) -> None:
    """What the configuration calls by name must have tensors; regular expressions are not run."""
    called = {
        "target_modules": saved.target_modules if isinstance(saved.target_modules, list) else (),
        "rank_pattern": () if isinstance(saved, SavedLora) else saved.rank_pattern,
    }
    for option, keys in called.items():
        for key in keys:
            if not any(name == key or name.endswith("." + key) for name in names):
                raise FileError(
                    f"{WHAT} {path}: {option} has {key!r}, for which there are no weights."
                )


def _check_task(model: nn.Module, saved: SavedConfig, names: list[str], path: Path) -> None:
    """What PEFT would find out only when it has changed the model."""
    generates = saved.task_type in ("CAUSAL_LM", "SEQ_2_SEQ_LM")
    if generates and not hasattr(model, "prepare_inputs_for_generation"):
        raise FileError(
            f"{WHAT} {path}: task_type={saved.task_type!r}, and a {type(model).__name__} does not "
            "generate text; load the model that the adapter is for, or set task_type to null."
        )
    for name, entry in trained_whole(names, saved.modules_to_save, saved.task_type).items():
        raise FileError(
            f"{WHAT} {path}: {name} has factors, and modules_to_save or task_type has it trained "
            f"whole as {entry!r}; it cannot be both."
        )


def _expected_shapes(
    config: OurConfig, shapes: Mapping[str, LinearShape]
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the factors, by the configuration and the model."""
    expected: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        d_in, d_out = shape.d_in, shape.d_out
        if isinstance(config, RaLoraConfig):
            n, r = config.blocks_of(name, d_in, d_out), _rank_of(config, name, shape)
            expected[f"{PREFIX}{name}.ralora_A.weight"] = (n, r, d_in // n)
            expected[f"{PREFIX}{name}.ralora_B.weight"] = (n, d_out // n, r)
        elif isinstance(config, LrLoraConfig):
            r = _rank_of(config, name, shape)
            expected[f"{PREFIX}{name}.lrlora_A.weight"] = (r, d_in)
            expected[f"{PREFIX}{name}.lrlora_B.weight"] = (d_out, r)
            for vector, length in _vectors(config).items():
                expected[f"{PREFIX}{name}.lrlora_{vector}.weight"] = (length,)
        else:
            r = config.rank_pattern["^" + re.escape(name)]  # type: ignore[index]
            expected[f"{PREFIX}{name}.lora_A.weight"] = (r, d_in)
            expected[f"{PREFIX}{name}.lora_B.weight"] = (d_out, r)
    return expected


def _rank_of(config: RaLoraConfig | LrLoraConfig, name: str, shape: LinearShape) -> int:
    r = config.rank_of(name)
    if r > shape.max_rank:
        raise FileError(f"rank {r} of {name} exceeds its largest, {shape.max_rank}.")
    return r


def _vectors(config: LrLoraConfig) -> dict[str, int]:
    """The lengths of what is saved of f."""
    basis, found = BASES[config.basis], {}
    if config.basis != "sine":
        found["amplitude"] = basis.amplitudes(config.points)
    if basis.local and config.bandwidth == "learned":
        found["bandwidth"] = config.points
    if basis.local and config.grid == "learned":
        found["grid"] = config.points
    return found


def _whole_modules(
    model: nn.Module, saved: SavedConfig, path: Path
) -> dict[str, dict[str, tuple[int, ...]]]:
    """What `modules_to_save` names: module -> name -> shape; PEFT takes every name that ends so."""
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    endings = saved.modules_to_save or []
    for ending in endings:
        names = [n for n, _ in model.named_modules() if ending and n.endswith(ending)]
        for name in names:
            state = model.get_submodule(name).state_dict()
            found[name] = {key: tuple(tensor.shape) for key, tensor in state.items()}
        if not names and ending not in _HEADS:
            raise FileError(f"{WHAT} {path}: modules_to_save has {ending!r}; no module ends so.")
    if endings and not found:
        raise FileError(f"{WHAT} {path}: modules_to_save={endings}; no module ends so.")
    return found


def _biases(
    model: nn.Module, saved: SavedConfig, names: list[str], whole: list[str], weights: _Weights
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of trained biases, as PEFT saves them: of adapted layers or of all."""
    if saved.bias == "none":
        return {}
    expected: dict[str, tuple[int, ...]] = {}
    adapted = set(names)
    for key, tensor in model.state_dict().items():
        module, _, last = key.rpartition(".")
        if last != "bias":
            continue
        shape = tuple(tensor.shape)
        if module in adapted:
            expected[f"{PREFIX}{module}.base_layer.bias"] = shape
        elif saved.bias == "all":
            expected[f"{PREFIX}{key}"] = shape
            for outer in [name for name in whole if key.startswith(f"{name}.")]:
                inner = key.removeprefix(f"{outer}.")
                expected[f"{PREFIX}{outer}.original_module.{inner}"] = shape
                expected[_saved_twice(weights, f"{PREFIX}{outer}", inner)] = shape
    return expected


def _saved_twice(weights: _Weights, outer: str, inner: str) -> str:
    """The other name of a bias in a module that is saved whole.

    PEFT leaves the adapter's own name in it if the bias is not the module's but that of a part.
    """
    if "." not in inner:
        return f"{outer}{_SAVED_TWICE}{inner}"
    pattern = re.escape(f"{outer}{_SAVED_TWICE}") + r"[^.]+" + re.escape(f".{inner}")
    named = [name for name in weights.shapes if re.fullmatch(pattern, name)]
    return named[0] if named else f"{outer}{_SAVED_TWICE}default.{inner}"


def _check_shapes(weights: _Weights, expected: Mapping[str, tuple[int, ...]]) -> None:
    for name, shape in expected.items():
        if name not in weights.shapes:
            raise weights.fail(f"lacks {name} of shape {shape}.")
        if weights.shapes[name] != shape:
            raise weights.fail(
                f"{name} is {weights.shapes[name]}; by the configuration and the model it should "
                f"be {shape}."
            )
    for name in weights.shapes:
        if name not in expected:
            raise weights.fail(f"has {name!r}, which is unexpected; {nearest(name, expected)}")


def _read_tensors(weights: _Weights) -> dict[str, Tensor]:
    tensors = read_tensors(weights.path, "adapter weights")
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise weights.fail(f"{name} has NaN or infinite values; the training diverged.")
    return tensors
