"""From the engines' results to what a profile keeps of them."""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterable, Mapping

import torch
from torch import Tensor

from rankwise.errors import ProfileError
from rankwise.profiling.batches import Job
from rankwise.profiling.profile import GradientProfile, ModuleStatistics, ProfileProvenance
from rankwise.profiling.statistics import ModuleResult, sensitivity
from rankwise.spectra import singular_values
from rankwise.targets import linear_weight

logger = logging.getLogger(__name__)


class Found:
    """Results as they come from an engine, reduced to what a profile keeps."""

    def __init__(self, job: Job, *, keep_gradients: bool) -> None:
        self._job = job
        self._keep_gradients = keep_gradients
        self.modules: dict[str, ModuleStatistics] = {}
        self.spectra: dict[str, Tensor] = {}
        self.gradients: dict[str, Tensor] = {}
        self.gram: dict[str, Tensor] = {}
        self.convergence: dict[str, Tensor] = {}

    def add_all(self, results: Generator[tuple[str, ModuleResult], None, str]) -> str:
        """Add every result; returns what the generator returns."""
        while True:
            try:
                name, result = next(results)
            except StopIteration as end:
                return str(end.value)
            self.add(name, result)

    def add(self, name: str, result: ModuleResult) -> None:
        """Turn one module's result into statistics, giving up its gradient."""
        shape = self._job.selected[name]
        gradient = result.gradient
        if gradient is None:
            gradient = torch.zeros(shape.d_out, shape.d_in)
        self.spectra[name] = singular_values(gradient)
        norm = float(self.spectra[name].norm())
        weight = linear_weight(self._job.model.get_submodule(name))
        self.modules[name] = ModuleStatistics(
            d_in=shape.d_in,
            d_out=shape.d_out,
            gradient_norm=norm,
            sensitivity=sensitivity(weight, gradient.to(weight.device)),
            batches=result.batches,
            rows=result.rows,
            zero_batches=result.zero_batches,
            fisher=result.fisher,
        )
        if norm == 0:
            logger.warning("%s: its gradient is zero on every batch", name)
        if result.gram is not None:
            self.gram[name] = result.gram
        if result.gids:
            self.convergence[name] = torch.tensor(result.gids, dtype=torch.float64)
        if self._keep_gradients:
            self.gradients[name] = gradient.cpu()

    def profile(self, provenance: ProfileProvenance) -> GradientProfile:
        """The profile, with the modules in model order."""
        if all(entry.gradient_norm == 0 for entry in self.modules.values()):
            raise ProfileError(
                "the gradient of every target is zero; check that the loss depends on the model."
            )
        names = self._job.selected
        return GradientProfile(
            {name: self.modules[name] for name in names},
            {name: self.spectra[name] for name in names},
            provenance,
            gradients=_in_order(self.gradients, names),
            gram=_in_order(self.gram, names),
            convergence=_in_order(self.convergence, names),
        )


def _in_order(arrays: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor] | None:
    return {name: arrays[name] for name in names} if arrays else None
