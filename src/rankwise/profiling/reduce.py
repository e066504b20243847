"""From the engines' results to what a profile keeps of them."""

from __future__ import annotations

import logging
import operator
from collections.abc import Generator, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from threading import Lock

import torch
from torch import Tensor

from rankwise.errors import ProfileError
from rankwise.profiling.batches import Job
from rankwise.profiling.parallel import map_in_order
from rankwise.profiling.precision import autocast_off
from rankwise.profiling.profile import GradientProfile, ModuleStatistics, ProfileProvenance
from rankwise.profiling.staging import TokenGradient
from rankwise.profiling.statistics import ModuleResult, sensitivity
from rankwise.spectra import singular_values, token_gram
from rankwise.targets import linear_weight

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Reduced:
    """What a profile keeps of one module."""

    name: str
    statistics: ModuleStatistics
    spectrum: Tensor
    gram: Tensor | None
    convergence: Tensor | None


class Found:
    """Results as they come from an engine, reduced to what a profile keeps.

    Spectra are computed on the CPU's cores, a module each, while the next results are fetched; as
    many gradients wait as there are threads.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._gram_of_inputs = _LastTokenGram()
        self.modules: dict[str, ModuleStatistics] = {}
        self.spectra: dict[str, Tensor] = {}
        self.gram: dict[str, Tensor] = {}
        self.convergence: dict[str, Tensor] = {}

    def add_all(self, results: Generator[tuple[str, ModuleResult], None, str]) -> str:
        """Add every result; returns what the generator returns."""
        returned: list[str] = []

        def given() -> Generator[tuple[str, ModuleResult], None, None]:
            returned.append((yield from results))

        on_cpu = next(self._job.model.parameters()).device.type == "cpu"
        workers = torch.get_num_threads() if on_cpu else 1
        with closing(map_in_order(self._reduce, given(), workers)) as all_reduced:
            for reduced in all_reduced:
                if not reduced.statistics.has_gradient:
                    logger.warning("%s: its gradient is zero on every batch", reduced.name)
                self._add(reduced)
        return returned[0]

    def _add(self, reduced: _Reduced) -> None:
        self.modules[reduced.name] = reduced.statistics
        self.spectra[reduced.name] = reduced.spectrum
        if reduced.gram is not None:
            self.gram[reduced.name] = reduced.gram
        if reduced.convergence is not None:
            self.convergence[reduced.name] = reduced.convergence

    @autocast_off()
    def _reduce(self, named: tuple[str, ModuleResult]) -> _Reduced:
        """One module's statistics; runs beside others."""
        name, result = named
        shape = self._job.selected[name]
        gradient = result.gradient
        if gradient is None:
            gradient = torch.zeros(shape.d_out, shape.d_in)
        try:
            if isinstance(gradient, TokenGradient):
                spectrum = gradient.singular_values(self._gram_of_inputs.of(gradient.inputs))
            else:
                spectrum = singular_values(gradient)
        except ProfileError as error:
            raise ProfileError(f"module {name}: {error}") from error
        weight = linear_weight(self._job.model.get_submodule(name))
        statistics = ModuleStatistics(
            d_in=shape.d_in,
            d_out=shape.d_out,
            gradient_norm=float(spectrum.norm()),
            sensitivity=sensitivity(weight, gradient),
            batches=result.batches,
            rows=result.rows,
            zero_batches=result.zero_batches,
            fisher=result.fisher,
        )
        gids = torch.tensor(result.gids, dtype=torch.float64) if result.gids else None
        return _Reduced(name, statistics, spectrum, result.gram, gids)

    def profile(self, provenance: ProfileProvenance) -> GradientProfile:
        """The profile, with the modules in model order."""
        if not any(entry.has_gradient for entry in self.modules.values()):
            raise ProfileError(
                "the gradient of every target is zero; check that the loss depends on the model."
            )
        names = self._job.selected
        return GradientProfile(
            {name: self.modules[name] for name in names},
            {name: self.spectra[name] for name in names},
            provenance,
            gram=_in_order(self.gram, names),
            convergence=_in_order(self.convergence, names),
        )


class _LastTokenGram:
    """The Gram matrix of the last inputs' tokens: q, k and v, or gate and up, follow each other."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._inputs: tuple[Tensor, ...] = ()
        self._gram_of_inputs = torch.empty(0, 0)

    def of(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """Of the inputs, one below the other."""
        with self._lock:
            same = len(inputs) == len(self._inputs)
            if not (same and all(map(operator.is_, inputs, self._inputs))):
                self._inputs, self._gram_of_inputs = inputs, token_gram(torch.cat(inputs))
            return self._gram_of_inputs


def _in_order(arrays: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor] | None:
    return {name: arrays[name] for name in names} if arrays else None
