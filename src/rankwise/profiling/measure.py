"""Profiling a model: batches in, statistics of every target's gradient out."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from itertools import islice
from pathlib import PurePath
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from rankwise.errors import ProfileError
from rankwise.profiling.capture import capture_gradients
from rankwise.profiling.loss import LossFunction, model_loss
from rankwise.profiling.profile import GradientProfile, ModuleStatistics, ProfileProvenance
from rankwise.profiling.statistics import MeanGradient, sensitivity
from rankwise.provenance import DataFingerprint, model_fingerprint, versions
from rankwise.spectra import singular_values
from rankwise.targets import Targets, find_targets, linear_weight

logger = logging.getLogger(__name__)
T = TypeVar("T")


def profile_gradients(
    model: nn.Module,
    batches_of: Iterable[Mapping[str, Any]],
    targets: str | Sequence[str] = "all-linear",
    *,
    batches: int = 8,
    loss_fn: LossFunction = model_loss,
    train_mode: bool = False,
    keep_gradients: bool = False,
    progress: bool = True,
) -> GradientProfile:
    """Measure the gradient of every target layer on the user's own data, without training.

    For each target with weight `W (d_out, d_in)`: the mean gradient
    `G = sum_b n_b G_b / sum_b n_b` over N batches with `n_b` labelled items (RaLoRA Algorithm 1),
    its singular values, its Frobenius norm, and the sensitivity `mean(|W * G|)` (RaLoRA Eq. 5).
    The weights stay frozen and no optimizer steps; mode, `requires_grad`, hooks and random state
    are as before afterwards, also after an error.

    Args:
        model: A model without adapters, on the device where it is to be run.
        batches_of: A loader, or any iterable of keyword arguments for the model, with labels.
        targets: See `find_targets`.
        batches: N, how many batches to average. GID grows with the data averaged, so a GID means
            little without its N; 8 is rankwise's choice, the paper names none.
        loss_fn: `(model, batch) -> BatchLoss`; default: the model's own loss.
        train_mode: Profile with dropout on, as the released RaLoRA code does; default off.
        keep_gradients: Keep `G` itself in the profile (fp32, as large as the target weights).
        progress: Show a progress bar on the terminal.

    Returns:
        The profile, on the CPU.

    Raises:
        TargetError: The targets match nothing usable.
        ProfileError: No batch, no labels, every gradient zero, or a non-finite gradient.
    """
    if batches < 1:
        raise ProfileError(f"batches={batches}: at least one batch is needed.")
    selected = find_targets(model, targets)
    started = time.perf_counter()
    data = DataFingerprint()
    with torch.enable_grad(), _mode(model, train=train_mode), _random_state_kept():
        statistics = MeanGradient(selected)
        sizes = _accumulate(
            model, batches_of, selected, statistics, data, batches, loss_fn, progress
        )
        measured, spectra, gradients = _finish(
            model, selected, statistics, keep_gradients, progress
        )
    provenance = ProfileProvenance(
        model=model_name(model),
        model_fingerprint=model_fingerprint(model),
        data_fingerprint=data.hexdigest(),
        batches=len(sizes),
        batch_sizes=sizes,
        tokens=statistics.total_count,
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        train_mode=train_mode,
        seconds=round(time.perf_counter() - started, 3),
        versions=versions(),
    )
    return GradientProfile(measured, spectra, provenance, gradients)


def _accumulate(
    model: nn.Module,
    batches_of: Iterable[Mapping[str, Any]],
    selected: Targets,
    statistics: MeanGradient,
    data: DataFingerprint,
    batches: int,
    loss_fn: LossFunction,
    progress: bool,
) -> list[int]:
    """Run the batches through the model; returns the rows of each batch that counted."""
    device = next(model.parameters()).device
    sizes: list[int] = []
    seen = 0
    taken = islice(iter(batches_of), batches)
    shown = _progress(taken, batches, "measuring gradients", progress)
    with capture_gradients(model, selected, statistics.consume), closing(shown):
        for batch in shown:
            seen += 1
            if not isinstance(batch, Mapping):
                raise ProfileError(
                    f"batch {seen - 1} is a {type(batch).__name__}; each batch must be a mapping "
                    "from argument name to tensor, as a collator of transformers gives."
                )
            on_device = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
            loss, count = loss_fn(model, on_device)
            if count == 0:
                logger.warning("batch %d has no labelled item and is skipped", seen - 1)
                continue
            if not loss.requires_grad:
                raise ProfileError(
                    f"the loss of batch {seen - 1} depends on none of the targets, so it has no "
                    "gradient; check that loss_fn does not detach it and that targets are used."
                )
            statistics.begin_batch(count, index=seen - 1)
            loss.backward()
            statistics.end_batch()
            data.update(batch)
            sizes.append(next((v.shape[0] for v in batch.values() if isinstance(v, Tensor)), 1))
    if not seen:
        raise ProfileError("the loader gave no batch; check that the data set is not empty.")
    if not sizes:
        raise ProfileError(f"none of the {seen} batches has a labelled item (all labels are -100).")
    if seen < batches:
        logger.warning("the loader gave %d batches of the %d asked for", seen, batches)
    return sizes


def _finish(
    model: nn.Module,
    selected: Targets,
    statistics: MeanGradient,
    keep_gradients: bool,
    progress: bool,
) -> tuple[dict[str, ModuleStatistics], dict[str, Tensor], dict[str, Tensor] | None]:
    """Turn sums into statistics, one layer at a time, giving up each layer's gradient."""
    measured: dict[str, ModuleStatistics] = {}
    spectra: dict[str, Tensor] = {}
    gradients: dict[str, Tensor] = {}
    layers = _progress(selected.items(), len(selected), "computing spectra", progress)
    with closing(layers):
        for name, shape in layers:
            gradient = statistics.pop(name)
            if gradient is None:
                gradient = torch.zeros(shape.d_out, shape.d_in)
            spectra[name] = singular_values(gradient)
            norm = float(spectra[name].norm())
            weight = linear_weight(model.get_submodule(name))
            measured[name] = ModuleStatistics(
                d_in=shape.d_in,
                d_out=shape.d_out,
                gradient_norm=norm,
                sensitivity=sensitivity(weight, gradient.to(weight.device)),
                batches=statistics.batches[name],
                rows=statistics.rows[name],
            )
            if norm == 0:
                logger.warning("%s: its gradient is zero on every batch", name)
            if keep_gradients:
                gradients[name] = gradient.cpu()
    if all(entry.gradient_norm == 0 for entry in measured.values()):
        raise ProfileError(
            "the gradient of every target is zero; check that the loss depends on the model."
        )
    return measured, spectra, gradients if keep_gradients else None


def _progress(items: Iterable[T], total: int, label: str, shown: bool) -> Generator[T, None, None]:
    """The items under a progress bar, which lives until the generator is exhausted or closed."""
    console = Console(stderr=True)
    yield from track(
        items,
        description=label,
        total=total,
        console=console,
        transient=True,
        disable=not (shown and console.is_terminal),
    )


@contextmanager
def _mode(model: nn.Module, *, train: bool) -> Iterator[None]:
    """Switch every submodule's mode, and give each its own back."""
    before = [(module, module.training) for module in model.modules()]
    try:
        model.train(train)
        yield
    finally:
        for module, training in before:
            module.training = training


@contextmanager
def _random_state_kept() -> Iterator[None]:
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    python_state = random.getstate()  # collators draw from it
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python_state)


def model_name(model: nn.Module) -> str:
    """The hub id or the folder's name: a full local path says more of a user than of a model."""
    name = str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")
    return PurePath(name).name if PurePath(name).is_absolute() else name or type(model).__name__
