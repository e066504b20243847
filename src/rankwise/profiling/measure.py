"""Profiling a model: batches in, statistics of every target's gradient out."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from itertools import islice
from pathlib import PurePath
from typing import Any, Literal, get_args

import torch
from torch import nn

from rankwise.errors import ProfileError, nearest
from rankwise.profiling.batches import Batch, Job, Ledger, check_statistics
from rankwise.profiling.hooks import hook_engine
from rankwise.profiling.loss import LossFunction, model_loss
from rankwise.profiling.profile import GradientProfile, ProfileProvenance
from rankwise.profiling.reduce import Found
from rankwise.profiling.statistics import ModuleResult, Statistic
from rankwise.profiling.sweep import UnsuitableError, sweep_engine
from rankwise.provenance import model_fingerprint, versions
from rankwise.targets import find_targets

Engine = Literal["auto", "hooks", "sweep"]
"""How gradients are reached: see `profile_gradients`."""

logger = logging.getLogger(__name__)


def profile_gradients(
    model: nn.Module,
    batches_of: Iterable[Mapping[str, Any]],
    targets: str | Sequence[str] = "all-linear",
    *,
    batches: int = 8,
    loss_fn: LossFunction = model_loss,
    train_mode: bool = False,
    statistics: Sequence[Statistic] = ("mean",),
    keep_gradients: bool = False,
    engine: Engine = "auto",
    progress: bool = True,
) -> GradientProfile:
    """Measure the gradient of every target layer on the user's own data, without training.

    For each target with weight `W (d_out, d_in)`: the mean gradient
    `G = sum_b n_b G_b / sum_b n_b` over N batches with `n_b` labelled items (RaLoRA Algorithm 1),
    its singular values, its Frobenius norm, and the sensitivity `mean(|W * G|)` (RaLoRA Eq. 5).
    A batch whose loss or gradient holds a NaN or an infinity anywhere is dropped for every module,
    and named in the provenance; what holding back a batch costs in memory is said at
    `StreamingStatistics`. With `"gram"` the gradients of all M batches are kept until the last, of
    one layer by the sweep and of every layer by hooks, each as the smaller of a fp32 matrix of the
    weight's size and its input and output gradient.
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
        statistics: What to measure in the same pass besides the mean gradient, always measured:
            `"gram"`: the exact Gram matrix `C_ab = <G_a, G_b> / M` of the M = N batch gradients
            (GARD 3.2), each batch as it is, unweighted and uncentred;
            `"fisher"`: the empirical Fisher information's mean entry (RaLoRA Eq. 29),
            `mean_s mean_ij (d L_s / d W_ij)^2` with `L_s` the loss *summed* over the labelled items
            of sample s, its negative log-likelihood; inputs must have the samples first;
            `"convergence"`: the GID of the mean over the first 1, 2, 4, ..., N batches.
        keep_gradients: Keep `G` itself in the profile (fp32, as large as the target weights).
        engine: `"hooks"` measures any model and loss in one backward pass a batch. `"sweep"` goes
            through a transformers stack layer by layer, so that only one layer's gradients are
            alive (see `rankwise.profiling.sweep`); it is compared with hooks on one batch first and
            gives way to them, with a message, where it does not fit. `"auto"`: the sweep for
            `"gram"`, else hooks. The sweep takes all batches from the loader first and calls
            `loss_fn` twice more on one of them.
        progress: Show a progress bar on the terminal.

    Returns:
        The profile, on the CPU.

    Raises:
        TargetError: The targets match nothing usable.
        ProfileError: No batch, no labels, every gradient zero, an unknown statistic or engine, more
            than a tenth of the batches dropped (names a module and a batch), a model wrapped in
            DataParallel, or too little memory (names the settings that need less).
    """
    if isinstance(model, nn.DataParallel):
        raise ProfileError(
            "DataParallel splits batches where hooks do not follow; pass model.module, on one "
            "device, or run one process a device (torchrun) with a share of the data each and "
            "GradientProfile.merge."
        )
    if batches < 1:
        raise ProfileError(f"batches={batches}: at least one batch is needed.")
    selected = find_targets(model, targets)
    wanted = check_statistics(statistics)
    if engine not in get_args(Engine):
        raise ProfileError(f"engine={engine!r}; {nearest(engine, get_args(Engine))}")
    job = Job(model, selected, loss_fn, wanted, batches, train_mode, progress)
    started = time.perf_counter()
    ledger = Ledger(batches)
    found = Found(job, keep_gradients=keep_gradients)
    with (
        _memory_errors_explained(),
        torch.enable_grad(),
        _mode(model, train=train_mode),
        _random_state_kept(),
    ):
        results = _run_engine(job, islice(iter(batches_of), batches), ledger, engine)
        with closing(results):
            used = found.add_all(results)
    provenance = ProfileProvenance(
        model=model_name(model),
        model_fingerprint=model_fingerprint(model),
        data_fingerprint=ledger.data.hexdigest(),
        batches=len(ledger.items),
        batch_sizes=ledger.rows,
        batch_items=ledger.items,
        dropped_batches=sorted(ledger.dropped),
        unlabelled_batches=ledger.unlabelled,
        tokens=sum(ledger.items),
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        train_mode=train_mode,
        engine=used,
        seconds=round(time.perf_counter() - started, 3),
        versions=versions(),
    )
    return found.profile(provenance)


def _run_engine(
    job: Job, batches: Iterable[Batch], ledger: Ledger, engine: str
) -> Generator[tuple[str, ModuleResult], None, str]:
    """Give out the modules' results, some perhaps twice; returns the engine that made them."""
    if engine == "hooks" or (engine == "auto" and "gram" not in job.wanted):
        yield from hook_engine(job, batches, ledger)
        return "hooks"
    taken = list(batches)
    try:
        yield from sweep_engine(job, taken, ledger)
    except UnsuitableError as reason:
        level = logging.INFO if engine == "auto" else logging.WARNING
        logger.log(level, "the layer sweep does not fit: %s; measuring by hooks instead", reason)
    else:
        return "sweep"
    ledger.reset()
    yield from hook_engine(job, taken, ledger)
    return "hooks"


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


@contextmanager
def _memory_errors_explained() -> Iterator[None]:
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # on a GPU torch.OutOfMemoryError, on a CPU a plain RuntimeError of the allocator
        known = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not (known or "can't allocate memory" in str(error)):
            raise
        raise ProfileError(
            "out of memory while profiling; the model is as it was. Less is needed with a smaller "
            "batch, shorter sequences, fewer targets, engine='sweep', without keep_gradients, or "
            "with the model in bfloat16."
        ) from error


def model_name(model: nn.Module) -> str:
    """The hub id or the folder's name: a full local path says more of a user than of a model."""
    name = str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")
    return PurePath(name).name if PurePath(name).is_absolute() else name or type(model).__name__
