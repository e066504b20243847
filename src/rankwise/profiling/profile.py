"""What profiling found: a profile that can be saved, read by a person, and planned from."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, ClassVar

import torch
from pydantic import ConfigDict, Field, FiniteFloat, NonNegativeInt, PositiveInt
from safetensors.torch import save_file
from torch import Tensor, nn

from rankwise.display import Displayed
from rankwise.errors import FileError, ProfileError
from rankwise.files import new_folder, parse_json, read_tensors, read_text
from rankwise.profiling.staging import prefixes
from rankwise.spectra import effective_rank, energy_crossing, gram_eigenvalues
from rankwise.tables import layer_table
from rankwise.targets import LinearShape
from rankwise.tensor_files import ArrayLayout, LazyTensors, TensorWriter, layout_of

SCHEMA_VERSION = 2
PROFILE_FILE = "profile.json"
SETTLED = 0.1
"""Largest change of the mean GID in the last doubling of a profile that is big enough."""
_SPECTRA_FILE = "spectra.safetensors"
GRADIENTS_FILE = "gradients.safetensors"
_GRAM_FILE = "gram.safetensors"
_CONVERGENCE_FILE = "convergence.safetensors"
PROFILE_FILES = frozenset(
    {PROFILE_FILE, _SPECTRA_FILE, GRADIENTS_FILE, _GRAM_FILE, _CONVERGENCE_FILE}
)
"""All that a profile's folder may hold; with anything else in it, it is not replaced."""
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
        zero_batches: How many of `batches` gave a gradient of exactly zero.
        fisher: Mean entry of the empirical Fisher information, if it was measured.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _FORBID

    d_in: PositiveInt
    d_out: PositiveInt
    gradient_norm: Annotated[FiniteFloat, Field(ge=0)]
    sensitivity: Annotated[FiniteFloat, Field(ge=0)]
    batches: NonNegativeInt
    rows: NonNegativeInt
    zero_batches: NonNegativeInt = 0
    fisher: Annotated[FiniteFloat, Field(ge=0)] | None = None

    @property
    def has_gradient(self) -> bool:
        """Whether any batch gave it a gradient; an unused expert has none."""
        return self.gradient_norm > 0

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
        batches: N, the number of batches averaged, also M, the side of the Gram matrices.
        batch_sizes: Rows of each of them.
        tokens: Labelled items over all batches.
        dtype: Parameter dtype of the model; the statistics are fp32 or wider.
        train_mode: Whether dropout was on.
        seconds: Wall time of the profiling.
        versions: Packages that can change the result.
        batch_items: Labelled items of each batch averaged, their weights in the mean.
        dropped_batches: Indices in the loader of batches with a NaN or an infinity.
        unlabelled_batches: Indices in the loader of batches without a labelled item.
        engine: How gradients were reached, "hooks" or "sweep".
        model_parameters: Parameters of the model; None in profiles that did not count them.
        look_alikes: Other modules of the model whose names end in the name of a target.
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
    batch_items: list[PositiveInt] = field(default_factory=list)
    dropped_batches: list[NonNegativeInt] = field(default_factory=list)
    unlabelled_batches: list[NonNegativeInt] = field(default_factory=list)
    engine: str = "hooks"
    model_parameters: PositiveInt | None = None
    look_alikes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _ProfileDocument:
    __pydantic_config__: ClassVar[ConfigDict] = _FORBID

    schema_version: int
    provenance: ProfileProvenance
    modules: dict[str, ModuleStatistics]


@dataclass(frozen=True)
class GradientProfile(Displayed):
    """Statistics of every target's gradient, with what they were measured on.

    Attributes:
        modules: Scalars per module, in model order.
        singular_values: Spectrum of each module's mean gradient, fp64, largest first.
        provenance: Model, data, N, tokens, dtype, versions.
        gradients: The mean gradients themselves, fp32 `(d_out, d_in)`, if they were kept. Of a
            loaded profile each is read from the disk when it is asked for.
        gram: Gram matrix `C (M, M)` of each module's batch gradients, `<G_a, G_b> / M`, fp64,
            uncentred, if it was measured.
        convergence: GID of each module's mean over the first 1, 2, 4, ..., N batches
            (`convergence_batches`), if it was measured.
    """

    modules: Mapping[str, ModuleStatistics]
    singular_values: Mapping[str, Tensor]
    provenance: ProfileProvenance
    gradients: Mapping[str, Tensor] | None = None
    gram: Mapping[str, Tensor] | None = None
    convergence: Mapping[str, Tensor] | None = None

    @cached_property
    def gid(self) -> dict[str, float]:
        """Gradient intrinsic dimensionality of each module: `effective_rank` of its spectrum."""
        return {name: effective_rank(values) for name, values in self.singular_values.items()}

    @property
    def convergence_batches(self) -> list[int]:
        """How many batches each column of `convergence` averages: 1, 2, 4, ..., N."""
        return prefixes(self.provenance.batches)

    def energy_ranks(self, energy: float = 0.9, *, centred: bool = False) -> dict[str, int]:
        """Energy rank of each module's batch gradients (GARD 3.2): see `energy_rank`.

        It counts independent batch gradients, at most M; the GID counts directions of one matrix.

        Args:
            energy: Part of the energy to be held.
            centred: Of `H C H`, `H = I - 11'/M`, which leaves out the gradients' common mean.

        Raises:
            ProfileError: The profile holds no Gram matrices.
        """
        crossings = self.energy_crossings(energy, centred=centred)
        return {name: math.ceil(crossing) for name, crossing in crossings.items()}

    def energy_crossings(self, energy: float = 0.9, *, centred: bool = False) -> dict[str, float]:
        """Fractional energy ranks, which order modules of equal rank: see `energy_crossing`."""
        if self.gram is None:
            raise ProfileError(
                "this profile holds no Gram matrices; profile with statistics=('mean', 'gram')."
            )
        grams = {name: centred_gram(c) if centred else c for name, c in self.gram.items()}
        return {name: energy_crossing(gram_eigenvalues(c), energy) for name, c in grams.items()}

    @classmethod
    def merge(cls, profiles: Sequence[GradientProfile], model: nn.Module) -> GradientProfile:
        """One profile from those of several shards of the data, as if measured at once.

        Mean gradients are averaged by labelled items, Fisher information by samples, counts added;
        spectra, norms and sensitivities are computed anew. What pairs batches of different shards
        is in none of them: Gram matrices and convergence are left out, with a warning; workers of
        one `torch.distributed` group measure both (`profile_gradients(distributed=...)`). The data
        fingerprint is that of the shards' fingerprints.

        Args:
            profiles: At least one, each with `keep_gradients=True`, of the same model and targets.
            model: The model they were measured on, for the sensitivity.

        Raises:
            ProfileError: They hold no gradients, or differ in model, modules, dtype or mode.
        """
        from rankwise.profiling.merge import merge_profiles

        return merge_profiles(profiles, model)

    def convergence_verdict(self) -> str:
        """Whether more batches would still change the GIDs much, in words.

        The mean GID over modules after 1, 2, 4, ..., N batches; it is settled when the last
        doubling changed it by less than `SETTLED`. A random gradient's GID grows with every batch,
        so a profile that is not settled measures the batches as much as the model.

        Raises:
            ProfileError: The profile holds no convergence curve.
        """
        if self.convergence is None:
            raise ProfileError(
                "this profile holds no convergence curve; profile with "
                "statistics=('mean', 'convergence')."
            )
        means = torch.stack(list(self.convergence.values())).mean(0).tolist()
        curve = ", ".join(f"{mean:.1f}" for mean in means)
        counts = ", ".join(map(str, self.convergence_batches))
        text = f"mean GID {curve} after {counts} batches"
        if len(means) < 2 or not means[-2]:
            return f"{text}: profile more, one measurement tells no trend"
        change = means[-1] / means[-2] - 1
        verdict = "profiled enough" if abs(change) < SETTLED else "profile more"
        return f"{text}; the last step changed it by {change:+.1%}: {verdict}"

    def save(self, folder: str | Path) -> None:
        """Write `profile.json` and the arrays beside it, all or nothing.

        Args:
            folder: Created, or replaced if it holds an earlier profile and nothing else.

        Raises:
            FileError: It holds something else or cannot be written; nothing was changed.
        """
        with new_folder(Path(folder), marker=PROFILE_FILE, written=PROFILE_FILES) as new:
            self.write_into(new)

    def write_into(self, folder: Path) -> None:
        """Write the files of a profile into an existing folder, gradients one at a time."""
        document = _ProfileDocument(SCHEMA_VERSION, self.provenance, dict(self.modules))
        text = json.dumps(asdict(document), indent=2, allow_nan=False)
        (folder / PROFILE_FILE).write_text(text + "\n", encoding="utf-8")
        save_file(dict(self.singular_values), folder / _SPECTRA_FILE)
        for file, arrays in ((_GRAM_FILE, self.gram), (_CONVERGENCE_FILE, self.convergence)):
            if arrays is not None:
                contiguous = {name: array.contiguous() for name, array in arrays.items()}
                save_file(contiguous, folder / file)
        if self.gradients is not None:
            writer = TensorWriter(folder / GRADIENTS_FILE, layout_of(self.gradients))
            try:
                for name, gradient in self.gradients.items():
                    writer.write(name, gradient)
            except BaseException:
                writer.abandon()
                raise
            writer.close()

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
        modules, n = document.modules, document.provenance.batches
        if not modules:
            raise FileError(f"profile {path}: names no module; profile again.")
        spectra = _read(
            folder / _SPECTRA_FILE, {k: (m.shape.max_rank,) for k, m in modules.items()}
        )
        _check_sign(spectra, folder / _SPECTRA_FILE, "singular value")
        shapes = {name: (m.d_out, m.d_in) for name, m in modules.items()}
        gradients = read_gradients(folder, shapes)
        gram = _read_if_there(folder / _GRAM_FILE, dict.fromkeys(modules, (n, n)))
        _check_symmetry(gram or {}, folder / _GRAM_FILE)
        curve = dict.fromkeys(modules, (len(prefixes(n)),))
        convergence = _read_if_there(folder / _CONVERGENCE_FILE, curve)
        _check_sign(convergence or {}, folder / _CONVERGENCE_FILE, "dimension")
        return cls(modules, spectra, document.provenance, gradients, gram, convergence)

    def __str__(self) -> str:
        p = self.provenance
        title = f"gradient intrinsic dimensionality of {p.model}"
        caption = (
            f"{len(self.modules)} modules; N = {p.batches} batches, {p.tokens} tokens, {p.dtype}"
        )
        without = sum(not entry.has_gradient for entry in self.modules.values())
        if without:
            caption += f"; {without} modules without gradient"
        if p.dropped_batches:
            caption += f"; {len(p.dropped_batches)} batches dropped for a NaN or an infinity"
        cells = {name: f"{value:.1f}" for name, value in self.gid.items()}
        return layer_table(cells, title=title, caption=caption)


def centred_gram(gram: Tensor) -> Tensor:
    """`H C H` with `H = I - 11'/M`: the Gram matrix of the gradients less their plain mean."""
    return gram - gram.mean(0, keepdim=True) - gram.mean(1, keepdim=True) + gram.mean()


def _read(path: Path, expected: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    arrays = read_tensors(path, path.stem)
    _check_layout(layout_of(arrays), expected, path)
    for name, array in arrays.items():
        if not bool(torch.isfinite(array).all()):
            raise FileError(f"{path}: array of module {name} is not finite; profile again.")
    return {name: arrays[name] for name in expected}


def read_gradients(folder: Path, expected: Mapping[str, tuple[int, ...]]) -> LazyTensors | None:
    """The gradients of a saved profile, if it holds them; their values are read when asked for.

    Raises:
        FileError: The file is malformed, or its arrays are not those expected.
    """
    path = folder / GRADIENTS_FILE
    if not path.exists():
        return None
    gradients = LazyTensors(path, path.stem)
    _check_layout(gradients.layout, expected, path)
    return gradients.in_order(expected)


def _read_if_there(path: Path, expected: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor] | None:
    return _read(path, expected) if path.exists() else None


def _check_sign(arrays: Mapping[str, Tensor], path: Path, what: str) -> None:
    for name, values in arrays.items():
        if bool((values < 0).any()):
            raise FileError(f"{path}: array of module {name} has a negative {what}; profile again.")


def _check_symmetry(grams: Mapping[str, Tensor], path: Path) -> None:
    for name, gram in grams.items():
        slack = 1e-9 * float(gram.abs().max())
        if float((gram - gram.T).abs().max()) > slack or float(gram.diagonal().min()) < 0:
            raise FileError(
                f"{path}: array of module {name} is no Gram matrix: it is not symmetric or has a "
                "negative square; profile again."
            )


def _check_layout(
    layout: Mapping[str, ArrayLayout], expected: Mapping[str, tuple[int, ...]], path: Path
) -> None:
    for name, shape in expected.items():
        if name not in layout:
            raise FileError(f"{path}: holds no array for module {name}; profile again.")
        found = layout[name]
        if found.shape != shape:
            raise FileError(
                f"{path}: array of module {name} has shape {found.shape}, expected {shape}; "
                "profile again."
            )
        if found.dtype is None or not found.dtype.is_floating_point:
            raise FileError(f"{path}: array of module {name} holds no floats; profile again.")
    for name in layout:
        if name not in expected:
            raise FileError(f"{path}: holds an array for an unknown module {name!r}.")
