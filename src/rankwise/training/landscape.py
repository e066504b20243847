"""The loss around a solution, on a plane of two random directions: `rankwise landscape`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn

from rankwise.adapters import load_adapter
from rankwise.artifacts import RECORD_FILE
from rankwise.errors import ConfigError, DataError, nearest
from rankwise.profiling.batches import with_progress
from rankwise.provenance import DataFingerprint, model_fingerprint, versions
from rankwise.records import RunRecord
from rankwise.run_files import LANDSCAPE_FILE, Landscape, save_run_file
from rankwise.training.config import validate
from rankwise.training.data import load_token_data
from rankwise.training.evaluate import summed_loss
from rankwise.training.run_folder import ADAPTER_FOLDER, MODEL_FOLDER
from rankwise.training.train import load_model

Normalisation = Literal["norm", "filter"]
Batches = Sequence[Mapping[str, Any]]
Notify = Callable[[str], None]


@dataclass(frozen=True)
class LandscapeSettings:
    """Where to look, and how closely.

    Attributes:
        points: Points of the grid along each direction; odd, so that the solution is one of them.
        span: The grid goes from -span to span; 1 is one length of a direction, which is that of
            the trained parameters.
        normalisation: How a Gaussian direction gets its length. `"norm"`: the whole of it has the
            norm of all trained parameters (LR-LoRA, Appendix H.1), and the two are orthogonal.
            `"filter"`: each of its rows has the norm of the same row of the parameters (Li et al.,
            2018, "Visualizing the loss landscape of neural nets").
        batches: Held-out batches, the first ones.
        batch_size: Sequences in each.
        seed: Of the directions.
    """

    points: int = 11
    span: float = 1.0
    normalisation: Normalisation = "norm"
    batches: int = 1
    batch_size: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("points", 3), ("batches", 1), ("batch_size", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least {least}.")
        if self.points % 2 == 0:
            raise ConfigError(
                f"points={self.points} must be odd, so that the solution is on the grid."
            )
        if not 0 < self.span < math.inf:
            raise ConfigError(f"span={self.span} must be a positive number.")
        if self.normalisation not in get_args(Normalisation):
            hint = nearest(self.normalisation, get_args(Normalisation))
            raise ConfigError(f"normalisation={self.normalisation!r}; {hint}")


def run_landscape(
    run: Path, settings: LandscapeSettings, *, out: Path | None = None, notify: Notify
) -> Landscape:
    """The loss around a run's solution, written to `landscape.json` in its folder.

    Args:
        run: A folder that `rankwise train` wrote; its model and held-out data must still be there.
        settings: Where to look.
        out: Another file to write.
        notify: Called with a line of text, first with what it will cost.

    Raises:
        RankwiseError: The run, its model or its data cannot be read; nothing is written.
    """
    record = RunRecord.load(run / RECORD_FILE)
    config = validate(record.config, str(run / RECORD_FILE))
    model, tokenizer = load_model(
        str(run / MODEL_FOLDER) if config.is_full else config.model, config.dtype
    )
    data = load_token_data(config.data, tokenizer, seed=config.seed)
    if data.description()["held_out"] != record.data.get("held_out"):
        raise DataError(
            f"{config.data.held_out or config.data.train}: the held-out text is no longer that of "
            f"{run}; put the data back as it was"
            + (
                ", or train again: packing kept less of rows of prompt and completion before."
                if config.data.packing
                else "."
            )
        )
    trained = model.requires_grad_(True) if config.is_full else _adapted(model, run, record)
    loader = data.held_out_loader(settings.batch_size)
    found = loss_landscape(
        trained,
        list(islice(loader, settings.batches)),
        settings,
        fingerprint=record.model_fingerprint,
        notify=notify,
    )
    save_run_file(found, out or run / LANDSCAPE_FILE)
    return found


def _adapted(model: nn.Module, run: Path, record: RunRecord) -> PeftModel:
    """The base model with the run's adapter, ready to train further."""
    if model_fingerprint(model) != record.model_fingerprint:
        raise ConfigError(
            f"model={record.config.get('model')!r} is no longer the model that {run} was trained "
            "on; put that one there."
        )
    return load_adapter(model, run / ADAPTER_FOLDER, trainable=True)


def loss_landscape(
    model: nn.Module,
    batches: Batches,
    settings: LandscapeSettings,
    *,
    fingerprint: str,
    notify: Notify,
    progress: bool = True,
) -> Landscape:
    """The mean loss at `theta + a d1 + b d2` for every a and b of the grid.

    theta are the parameters that require a gradient; they are as before afterwards, also after an
    error, and so is the model's mode.

    Args:
        model: Its trained parameters are where the plane goes through.
        batches: Keyword arguments of its forward, with labels.
        settings: Grid and directions.
        fingerprint: Of the base model, to be noted down.
        notify: Called with what it will cost.
        progress: Whether to show a bar on a terminal.

    Raises:
        ConfigError: Nothing is trainable.
        DataError: No token carries a label.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ConfigError("model: has no trainable parameter, so there is no direction to go.")
    at = [float(value) for value in np.linspace(-settings.span, settings.span, settings.points)]
    at[settings.points // 2] = 0.0
    origin = [p.detach().clone() for p in parameters]
    passes = settings.points**2 * len(batches)
    notify(
        f"{settings.points} x {settings.points} points, {len(batches)} batches each: {passes:,} "
        "forward passes"
    )
    started = time.perf_counter()
    _, tokens = summed_loss(model, batches)
    notify(f"about {(time.perf_counter() - started) * settings.points**2:.0f} s")
    directions = random_directions(origin, settings.seed, settings.normalisation)
    plane = _Plane(parameters, origin, directions)
    try:
        rows = _walk(model, batches, plane, at, progress)
    finally:
        plane.move_to_(0.0, 0.0)
    first, second = directions
    return Landscape(
        at=at,
        loss=rows,
        normalisation=settings.normalisation,
        seed=settings.seed,
        parameters=sum(p.numel() for p in parameters),
        parameter_norm=math.sqrt(_inner(origin, origin)),
        direction_norms=(math.sqrt(_inner(first, first)), math.sqrt(_inner(second, second))),
        cosine=_inner(first, second)
        / (math.sqrt(_inner(first, first) * _inner(second, second)) or 1.0),
        batches=len(batches),
        batch_size=settings.batch_size,
        tokens=tokens,
        data_fingerprint=_fingerprint(batches),
        model_fingerprint=fingerprint,
        forward_passes=passes,
        seconds=round(time.perf_counter() - started, 3),
        versions=versions(),
    )


def random_directions(
    origin: Sequence[Tensor], seed: int, normalisation: Normalisation
) -> tuple[list[Tensor], list[Tensor]]:
    """Two Gaussian directions in the space of the parameters, as long as these: see the settings.

    A vector counts as one row; rows of block-diagonal factors are those of their blocks.
    """
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(2):
        direction = [
            torch.randn(p.shape, generator=generator).to(p.device, p.dtype) for p in origin
        ]
        if normalisation == "filter":
            direction = [_with_rows_of(d, p) for d, p in zip(direction, origin, strict=True)]
        made.append(direction)
    first, second = made
    if normalisation == "norm":
        share = _inner(first, second) / _inner(first, first)
        second = [d - share * e for d, e in zip(second, first, strict=True)]
        length = math.sqrt(_inner(origin, origin))
        first, second = (
            [d * (length / math.sqrt(_inner(direction, direction))) for d in direction]
            for direction in (first, second)
        )
    return first, second


def _with_rows_of(direction: Tensor, parameter: Tensor) -> Tensor:
    wanted = parameter.norm(dim=-1, keepdim=True)
    return direction * (wanted / direction.norm(dim=-1, keepdim=True))


def _inner(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    return sum(float((a.double() * b.double()).sum()) for a, b in zip(left, right, strict=True))


@dataclass(frozen=True)
class _Plane:
    """Parameters, where they were, and two directions to move them along."""

    parameters: Sequence[nn.Parameter]
    origin: Sequence[Tensor]
    directions: tuple[list[Tensor], list[Tensor]]

    @torch.no_grad()
    def move_to_(self, a: float, b: float) -> None:
        """Set the parameters to a point; (0, 0) is the origin to the bit."""
        for parameter, start, first, second in zip(
            self.parameters, self.origin, *self.directions, strict=True
        ):
            parameter.copy_(start)
            if a:
                parameter.add_(first, alpha=a)
            if b:
                parameter.add_(second, alpha=b)


def _walk(
    model: nn.Module, batches: Batches, plane: _Plane, at: Sequence[float], progress: bool
) -> list[list[float | None]]:
    """The mean loss at every point of the grid, None where it is not finite."""
    losses: list[float | None] = []
    places = [(a, b) for b in at for a in at]
    shown = with_progress(places, len(places), "walking over the plane", progress)
    with closing(shown):
        for a, b in shown:
            plane.move_to_(a, b)
            total, tokens = summed_loss(model, batches)
            losses.append(total / tokens if math.isfinite(total) else None)
    return [losses[i : i + len(at)] for i in range(0, len(losses), len(at))]


def _fingerprint(batches: Batches) -> str:
    digest = DataFingerprint()
    for batch in batches:
        digest.update(batch)
    return digest.hexdigest()
