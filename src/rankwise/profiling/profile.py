"""What profiling found: a profile that can be saved, read by a person, and planned from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, ClassVar

import torch
from pydantic import ConfigDict, Field, FiniteFloat, NonNegativeInt, PositiveInt
from safetensors.torch import save_file
from torch import Tensor

from rankwise.errors import FileError
from rankwise.files import new_folder, parse_json, read_tensors, read_text
from rankwise.spectra import effective_rank
from rankwise.tables import layer_table
from rankwise.targets import LinearShape

SCHEMA_VERSION = 1
PROFILE_FILE = "profile.json"
_SPECTRA_FILE = "spectra.safetensors"
_GRADIENTS_FILE = "gradients.safetensors"
_FORBID = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class ModuleStatistics:
    """Scalars of one module's mean gradient `G (d_out, d_in)`.

    Attributes:
        d_in: Input features.
        d_out: Output features.
        gradient_norm: Frobenius norm of G, in loss per unit of weight.
        sensitivity: `mean(|W * G|)`, in loss (RaLoRA Eq. 5).
        batches: How many batches reached the module.
        rows: How many input rows (tokens, padding included) it saw.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _FORBID

    d_in: PositiveInt
    d_out: PositiveInt
    gradient_norm: Annotated[FiniteFloat, Field(ge=0)]
    sensitivity: Annotated[FiniteFloat, Field(ge=0)]
    batches: NonNegativeInt
    rows: NonNegativeInt

    @property
    def shape(self) -> LinearShape:
        """The layer's dimensions."""
        return LinearShape(self.d_in, self.d_out)


@dataclass(frozen=True)
class ProfileProvenance:
    """What was measured, and on what: without these a GID is not a result.

    Attributes:
        model: Hub id, folder name or class of the model.
        model_fingerprint: See `rankwise.provenance.model_fingerprint`.
        data_fingerprint: Hash of the batches seen.
        batches: N, the number of batches averaged.
        batch_sizes: Rows of each batch.
        tokens: Labelled items over all batches.
        dtype: Parameter dtype of the model; the statistics are fp32 or wider.
        train_mode: Whether dropout was on.
        seconds: Wall time of the profiling.
        versions: Packages that can change the result.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _FORBID

    model: str
    model_fingerprint: str
    data_fingerprint: str
    batches: PositiveInt
    batch_sizes: list[PositiveInt]
    tokens: PositiveInt
    dtype: str
    train_mode: bool
    seconds: FiniteFloat
    versions: dict[str, str]


@dataclass(frozen=True)
class _ProfileDocument:
    __pydantic_config__: ClassVar[ConfigDict] = _FORBID

    schema_version: int
    provenance: ProfileProvenance
    modules: dict[str, ModuleStatistics]


@dataclass(frozen=True)
class GradientProfile:
    """Statistics of every target's gradient, with what they were measured on.

    Attributes:
        modules: Scalars per module, in model order.
        singular_values: Spectrum of each module's mean gradient, fp64, largest first.
        provenance: Model, data, N, tokens, dtype, versions.
        gradients: The mean gradients themselves, fp32 `(d_out, d_in)`, if they were kept.
    """

    modules: Mapping[str, ModuleStatistics]
    singular_values: Mapping[str, Tensor]
    provenance: ProfileProvenance
    gradients: Mapping[str, Tensor] | None = None

    @cached_property
    def gid(self) -> dict[str, float]:
        """Gradient intrinsic dimensionality of each module: `effective_rank` of its spectrum."""
        return {name: effective_rank(values) for name, values in self.singular_values.items()}

    def save(self, folder: str | Path) -> None:
        """Write `profile.json` and the arrays beside it, all or nothing.

        Args:
            folder: Created, or replaced if it holds an earlier profile.

        Raises:
            FileError: It holds something else or cannot be written; nothing was changed.
        """
        document = _ProfileDocument(SCHEMA_VERSION, self.provenance, dict(self.modules))
        with new_folder(Path(folder), marker=PROFILE_FILE) as new:
            text = json.dumps(asdict(document), indent=2, allow_nan=False)
            (new / PROFILE_FILE).write_text(text + "\n", encoding="utf-8")
            save_file(dict(self.singular_values), new / _SPECTRA_FILE)
            if self.gradients is not None:
                contiguous = {name: g.contiguous() for name, g in self.gradients.items()}
                save_file(contiguous, new / _GRADIENTS_FILE)

    @classmethod
    def load(cls, folder: str | Path) -> GradientProfile:
        """Read a saved profile, checking every array against its module's shape.

        Raises:
            FileError: A file is missing, malformed, of another schema, or holds wrong arrays.
        """
        folder = Path(folder)
        path = folder / PROFILE_FILE
        text = read_text(path, "profile")
        document = parse_json(
            text, _ProfileDocument, path=path, what="profile", version=SCHEMA_VERSION
        )
        spectra = read_tensors(folder / _SPECTRA_FILE, "spectra")
        expected = {name: (m.shape.max_rank,) for name, m in document.modules.items()}
        _check_arrays(spectra, expected, folder / _SPECTRA_FILE)
        for name, values in spectra.items():
            if bool((values < 0).any()):
                raise FileError(
                    f"{folder / _SPECTRA_FILE}: array of module {name} has a negative singular "
                    "value; profile again."
                )
        gradients = None
        if (folder / _GRADIENTS_FILE).exists():
            gradients = read_tensors(folder / _GRADIENTS_FILE, "gradients")
            expected_2d = {name: (m.d_out, m.d_in) for name, m in document.modules.items()}
            _check_arrays(gradients, expected_2d, folder / _GRADIENTS_FILE)
            gradients = {name: gradients[name] for name in document.modules}
        ordered = {name: spectra[name] for name in document.modules}
        return cls(document.modules, ordered, document.provenance, gradients)

    def __str__(self) -> str:
        p = self.provenance
        title = f"gradient intrinsic dimensionality of {p.model}"
        caption = (
            f"{len(self.modules)} modules; N = {p.batches} batches, {p.tokens} tokens, {p.dtype}"
        )
        cells = {name: f"{value:.1f}" for name, value in self.gid.items()}
        return layer_table(cells, title=title, caption=caption)


def _check_arrays(
    arrays: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], path: Path
) -> None:
    for name, shape in expected.items():
        if name not in arrays:
            raise FileError(f"{path}: holds no array for module {name}; profile again.")
        found = arrays[name]
        if tuple(found.shape) != shape:
            raise FileError(
                f"{path}: array of module {name} has shape {tuple(found.shape)}, expected {shape}; "
                "profile again."
            )
        if not found.is_floating_point() or not bool(torch.isfinite(found).all()):
            raise FileError(f"{path}: array of module {name} is not finite; profile again.")
    for name in arrays:
        if name not in expected:
            raise FileError(f"{path}: holds an array for an unknown module {name!r}.")
