"""Where mean gradients go that are kept: into memory, or module by module onto the disk."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from rankwise.files import check_replaceable, draft_folder, publish, write_errors_explained
from rankwise.profiling.precision import autocast_off
from rankwise.profiling.profile import (
    GRADIENTS_FILE,
    PROFILE_FILE,
    PROFILE_FILES,
    GradientProfile,
    read_gradients,
)
from rankwise.profiling.staging import dense
from rankwise.profiling.statistics import ModuleResult
from rankwise.targets import Targets
from rankwise.tensor_files import ArrayLayout, TensorWriter


class Keeper:
    """Keeps what was asked for in memory; the base of what writes it."""

    def __init__(self, selected: Targets, *, gradients: bool) -> None:
        self._selected = selected
        self._wanted = gradients
        self._gradients: dict[str, Tensor] = {}

    @autocast_off()
    def keep(self, name: str, result: ModuleResult) -> None:
        """Keep one module's gradient, if gradients are kept; a later one replaces it."""
        if self._wanted:
            shape = self._selected[name]
            gradient = result.gradient
            if gradient is None:
                gradient = torch.zeros(shape.d_out, shape.d_in)
            self._put(name, dense(gradient))

    def finish(self, profile: GradientProfile) -> GradientProfile:
        """The profile with the gradients that were kept."""
        if not self._wanted:
            return profile
        return replace(profile, gradients={name: self._gradients[name] for name in self._selected})

    def _put(self, name: str, gradient: Tensor) -> None:
        self._gradients[name] = gradient.cpu()


class DiskKeeper(Keeper):
    """Writes gradients as they come into a draft that becomes the profile's folder."""

    def __init__(
        self, out: Path, draft: Path, selected: Targets, dtype: torch.dtype, *, gradients: bool
    ) -> None:
        super().__init__(selected, gradients=gradients)
        self._out = out
        self._draft = draft
        self._shapes = {name: (s.d_out, s.d_in) for name, s in selected.items()}
        self._writer = None
        if gradients:
            layout = {name: ArrayLayout(shape, dtype) for name, shape in self._shapes.items()}
            with write_errors_explained(out):
                self._writer = TensorWriter(draft / GRADIENTS_FILE, layout)

    def finish(self, profile: GradientProfile) -> GradientProfile:
        """Write the rest, put the folder in its place, and let gradients be read from there."""
        with write_errors_explained(self._out):
            if self._writer is not None:
                self._writer.close()
            profile.write_into(self._draft)
            # measuring takes long enough for something to be added
            check_replaceable(self._out, marker=PROFILE_FILE, written=PROFILE_FILES)
            publish(self._draft, self._out)
        return replace(profile, gradients=read_gradients(self._out, self._shapes))

    def abandon(self) -> None:
        """Close what is open."""
        if self._writer is not None:
            self._writer.abandon()

    def _put(self, name: str, gradient: Tensor) -> None:
        assert self._writer is not None
        with write_errors_explained(self._out):
            self._writer.write(name, gradient)


@contextmanager
def keeper(
    out: str | Path | None, selected: Targets, dtype: torch.dtype, *, gradients: bool
) -> Iterator[Keeper]:
    """What keeps the gradients; on the disk it leaves nothing unless `finish` was reached.

    Args:
        out: A folder, or None for memory.
        selected: The modules.
        dtype: Of the gradients on the disk.
        gradients: Whether they are kept at all.
    """
    if out is None:
        yield Keeper(selected, gradients=gradients)
        return
    path = Path(out)
    with draft_folder(path, marker=PROFILE_FILE, written=PROFILE_FILES) as draft:
        kept = DiskKeeper(path, draft, selected, dtype, gradients=gradients)
        try:
            yield kept
        finally:
            kept.abandon()
