"""A trained adapter as the report shows it: the singular values of its learned updates."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rankwise.adapters.literal_patterns import literal_patterns
from rankwise.adapters.scaling import update_scaling
from rankwise.artifacts import read_adapter_config
from rankwise.errors import FileError
from rankwise.files import read_tensors
from rankwise.plan.block_options import BLOCK_CHOICES
from rankwise.report.lr_updates import lr_parts, lr_updates
from rankwise.report.sampling import POINTS, places, sampled
from rankwise.report.views import ModuleUpdate, UpdateView
from rankwise.run_files import Analysis
from rankwise.spectra import effective_rank, singular_values, stable_rank
from rankwise.targets import LinearShape, layer_position

WEIGHTS_FILE = "adapter_model.safetensors"
LARGEST = 1e9
"""No alpha and no rank reaches it; beyond some of them lies what no float holds."""
_Scaling = Callable[[str, int, int], float]
_FACTOR = re.compile(r"(?:base_model\.model\.)?(.+)\.((?:ra)?lora)_([AB])\.weight")


def view_of_adapter(
    folder: Path, order: Sequence[str] = (), analysis: Analysis | None = None
) -> UpdateView:
    """The learned updates of a LoRA, RaLoRA or LR-LoRA adapter.

    Args:
        folder: What `save_pretrained` wrote.
        order: Module names in model order, as far as they are known.
        analysis: What the run recorded of its LR-LoRA updates, if it did.

    Raises:
        FileError: A file is missing, malformed or not finite, or the update is neither `s B A` nor
            `s f(B A)`.
    """
    config = read_adapter_config(folder)
    kind = str(config.get("peft_type", "")).lower()
    tensors = read_tensors(folder / WEIGHTS_FILE, "adapter weights")
    if kind == "lrlora":
        spectra, modules, other = _lr_lora(config, tensors, analysis or Analysis(), folder)
    else:
        spectra, modules, other = _low_rank(config, kind, tensors, folder)
    known = {name: i for i, name in enumerate(order)}
    names = sorted(modules, key=lambda name: (known.get(name, len(known)), _natural(name)))
    return UpdateView(
        label=f"{kind} adapter",
        kind=kind,
        base=_without_folders(str(config.get("base_model_name_or_path") or "")),
        modules={name: modules[name] for name in names},
        sampled_at={
            str(count): list(places(count)) for count in sorted({len(s) for s in spectra.values()})
        },
        median_spectra=_medians({name: spectra[name] for name in names}),
        other_tensors=other,
    )


_Found = tuple[dict[str, Tensor], dict[str, ModuleUpdate], int]


def _low_rank(
    config: Mapping[str, Any], kind: str, tensors: Mapping[str, Tensor], folder: Path
) -> _Found:
    """Spectra and numbers of `s B A` by module, and how many tensors are no factor."""
    scaling = _scaling(config, kind, folder)
    factors: dict[str, dict[str, Tensor]] = {}
    other = 0
    for key, tensor in tensors.items():
        match = _FACTOR.fullmatch(key)
        if match is None or match[2] != kind:
            other += 1
        else:
            factors.setdefault(match[1], {})[match[3]] = tensor
    if not factors:
        raise FileError(f"{folder / WEIGHTS_FILE}: holds no {kind} factors of linear layers.")
    spectra: dict[str, Tensor] = {}
    modules: dict[str, ModuleUpdate] = {}
    for name in factors:
        a, b = _pair(factors[name], name, folder)
        blocks, rank, width = a.shape
        spectra[name] = update_spectrum(a, b) * scaling(name, blocks, rank)
        shape = LinearShape(blocks * width, blocks * b.shape[1])
        modules[name] = _module(shape, rank, blocks, spectra[name])
    return spectra, modules, other


def _lr_lora(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], analysis: Analysis, folder: Path
) -> _Found:
    """The same of `s f(B A)`, which has as many singular values as its smaller side."""
    parts = lr_parts(tensors)
    if not parts:
        raise FileError(f"{folder / WEIGHTS_FILE}: holds no lrlora factors of linear layers.")
    spectra: dict[str, Tensor] = {}
    modules: dict[str, ModuleUpdate] = {}
    for name, update in lr_updates(config, parts, folder):
        spectra[name] = singular_values(update)
        shape = LinearShape(update.shape[1], update.shape[0])
        recorded = analysis.conditioning.get(name, {})
        modules[name] = replace(
            _module(shape, len(parts[name]["A"]), 1, spectra[name]),
            condition_number=recorded.get("condition_number"),
            precise_directions=recorded.get("directions_at_1e-6"),
        )
    return spectra, modules, len(tensors) - sum(len(own) for own in parts.values())


def update_spectrum(
    a: Float[Tensor, "n r d_in_n"], b: Float[Tensor, "n d_out_n r"]
) -> Float[Tensor, " k"]:
    """Singular values of `blockdiag(B_1 A_1, ..., B_n A_n)` that can be non-zero, largest first.

    Those of a block are those of `R_B R_A'`, with `B = Q_B R_B` and `A' = Q_A R_A`: an r x r matrix
    instead of a d_out x d_in one.
    """
    r_b = torch.linalg.qr(b.double(), mode="r").R
    r_a = torch.linalg.qr(a.double().mT, mode="r").R
    values: Tensor = torch.linalg.svdvals(r_b @ r_a.mT)
    return values.flatten().sort(descending=True).values


def _module(shape: LinearShape, rank: int, blocks: int, spectrum: Tensor) -> ModuleUpdate:
    return ModuleUpdate(
        d_in=shape.d_in,
        d_out=shape.d_out,
        rank=rank,
        blocks=blocks,
        update_norm=float(spectrum.norm()),
        update_stable_rank=stable_rank(spectrum),
        update_rank=effective_rank(spectrum),
        singular_values=sampled(spectrum.numpy()),
    )


def _scaling(config: Mapping[str, Any], kind: str, folder: Path) -> _Scaling:
    """The factor s of an update from its module's name, blocks and rank, as PEFT reads a config."""
    if kind not in ("lora", "ralora"):
        raise FileError(
            f"{folder}: is an adapter of type {kind or 'unknown'!r}; the report reads the updates "
            "of lora, ralora and lrlora."
        )
    if config.get("use_dora"):
        raise FileError(f"{folder}: is a DoRA adapter, whose update is not s B A.")
    alpha = config.get("alpha" if kind == "ralora" else "lora_alpha")
    r, patterns = config.get("r"), config.get("alpha_pattern") or {}
    if not (_positive(alpha) and _positive(r) and isinstance(patterns, dict)):
        raise FileError(
            f"{folder}: its configuration names no positive alpha and r below {LARGEST:.0e}."
        )
    assert isinstance(alpha, int | float) and isinstance(r, int | float)
    if kind == "ralora":
        options = {key: config.get(key, allowed[0]) for key, allowed in BLOCK_CHOICES.items()}
        for key, allowed in BLOCK_CHOICES.items():
            if options[key] not in allowed:
                raise FileError(f"{folder}: {key}={options[key]!r} is not known.")
        return lambda name, blocks, rank: update_scaling(
            alpha,
            rank=rank,
            r_ref=r,  # type: ignore[arg-type]  # whole in every file that PEFT wrote
            blocks=blocks,
            by=options["rank_scaling"],
            scaling=options["scaling"],
        )

    alpha_of = literal_patterns(patterns, alpha, f"{folder}: alpha_pattern")

    def scaling(name: str, blocks: int, rank: int) -> float:
        own = alpha_of(name)
        if not _positive(own):
            raise FileError(
                f"{folder}: alpha_pattern gives {name} an alpha of {str(own)[:20]}, which is no "
                f"positive number below {LARGEST:.0e}."
            )
        return float(own) / (math.sqrt(rank) if config.get("use_rslora") else rank)

    return scaling


def _positive(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and 0 < value < LARGEST


def _pair(factors: Mapping[str, Tensor], name: str, folder: Path) -> tuple[Tensor, Tensor]:
    """`A (n, r, d_in/n)` and `B (n, d_out/n, r)`; plain LoRA has one block."""
    a, b = factors.get("A"), factors.get("B")
    if a is None or b is None:
        raise FileError(f"{folder}: module {name} has only one of its factors A and B.")
    a, b = (factor.unsqueeze(0) if factor.ndim == 2 else factor for factor in (a, b))
    if a.ndim != 3 or b.ndim != 3 or a.shape[0] != b.shape[0] or a.shape[1] != b.shape[2]:
        raise FileError(
            f"{folder}: the factors of {name} do not fit: A is {tuple(a.shape)}, "
            f"B is {tuple(b.shape)}."
        )
    if not (bool(torch.isfinite(a).all()) and bool(torch.isfinite(b).all())):
        raise FileError(f"{folder}: the factors of {name} hold a NaN or an infinity.")
    return a, b


def _medians(spectra: Mapping[str, Tensor]) -> dict[str, list[float]]:
    kinds: dict[str, list[Tensor]] = {}
    for name, spectrum in spectra.items():
        kinds.setdefault(layer_position(name).kind, []).append(spectrum)
    medians = {}
    for kind, members in kinds.items():
        shared = min(POINTS, *(len(member) for member in members))
        stacked = torch.stack([member[:shared] for member in members])
        medians[kind] = [float(value) for value in stacked.quantile(0.5, dim=0)]
    return medians


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts layer 2 before layer 10."""
    return [(int(p), "") if p.isdecimal() else (-1, p) for p in name.split(".")]


def _without_folders(base: str) -> str:
    """A hub id as it is; of a path of somebody's machine only the last part."""
    local = base.startswith(("/", ".", "~")) or "\\" in base or base[1:2] == ":"
    return PurePath(base.replace("\\", "/")).name if local else base
