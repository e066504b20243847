"""Profiling a model: batches in, statistics of every target's gradient out."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from rankwise.errors import ProfileError, nearest
from rankwise.out_of_memory import out_of_memory_as
from rankwise.profiling.batches import Batch, Job, Ledger, check_statistics
from rankwise.profiling.hooks import hook_engine
from rankwise.profiling.keep import Keeper, keeper
from rankwise.profiling.loss import LossFunction, model_loss
from rankwise.profiling.profile import GradientProfile, ProfileProvenance
from rankwise.profiling.reduce import Found
from rankwise.profiling.restoring import mode, random_state_kept
from rankwise.profiling.shared import (
    Counts,
    Results,
    Share,
    SharedLedger,
    complete_,
    divided,
    is_sharded,
)
from rankwise.profiling.shared_streams import keeps_batches, stream_maker
from rankwise.profiling.staging import wide_dtype
from rankwise.profiling.statistics import Statistic
from rankwise.profiling.sweep import UnsuitableError, sweep_engine
from rankwise.profiling.workers import Distributed, OthersUnsuitableError, find_workers
from rankwise.provenance import model_fingerprint, versions
from rankwise.targets import Targets, count_parameters, find_targets

Engine = Literal["auto", "hooks", "sweep"]
"""How gradients are reached: see `profile_gradients`."""

logger = logging.getLogger(__name__)

_OUT_OF_MEMORY = (
    "out of memory while profiling; the model is as it was. Less is needed with a smaller batch, "
    "shorter sequences, fewer targets, engine='sweep', without keep_gradients or with out=, or "
    "with the model in bfloat16."
)


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
    out: str | Path | None = None,
    distributed: Distributed = "auto",
) -> GradientProfile:
    """Measure the gradient of every target layer on the user's own data, without training.

    For each target with weight `W (d_out, d_in)`: the mean gradient
    `G = sum_b n_b G_b / sum_b n_b` over N batches with `n_b` labelled items (RaLoRA Algorithm 1),
    its singular values, its Frobenius norm, and the sensitivity `mean(|W * G|)` (RaLoRA Eq. 5).
    A batch whose loss or gradient holds a NaN or an infinity anywhere is dropped for every module,
    and named in the provenance; what holding back a batch costs in memory is said at
    `StreamingStatistics`. With `"gram"` the gradients of all M batches are kept until the last, of
    one layer by the sweep and of every layer by hooks, each as the smaller of a fp32 matrix of the
    weight's size and its input and output gradient; several workers do the same for
    `"convergence"`.
    The weights stay frozen and no optimizer steps; mode, `requires_grad`, hooks, what training mode
    changes in buffers, and random states (torch's, Python's, numpy's, those of a DataLoader and its
    samplers) are as before afterwards, also after an error. Under the caller's autocasting only the
    model and its loss are cast.

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
            gives way to them, with a message, where it does not fit. `"auto"`: the sweep where
            batch gradients are kept, as for `"gram"`, else hooks. The sweep takes all batches from
            the loader first and calls `loss_fn` twice more on one of them.
        progress: Show a progress bar on the terminal.
        out: Folder to save the profile in, as `GradientProfile.save`. Gradients that are kept are
            written there module by module and never held together: the folder is built beside its
            place and put there when all is measured, or removed. Under several workers the first
            one writes, and only its profile has the gradients.
        distributed: What several processes (torchrun, accelerate) do once
            `torch.distributed` is initialised. `"split"`: each loader gives the same batches, and
            worker k of n measures batches k, k + n, ...; that they are the same is checked.
            `"sharded"`: each loader gives its worker's own share, as one that
            `Accelerator.prepare` returned or one with a `DistributedSampler`; `batches` counts
            those of all workers, and batch k of all is the next one of worker `k mod n`.
            `"auto"`: sharded if the loader is known to be, else split. `"off"`: everything in this
            process. Every worker ends with the same profile, bit for bit, which is that of one
            process but for the order of sums (and, with `train_mode`, each worker's own dropout). A
            failure of one worker is an error on all.

    Returns:
        The profile, on the CPU, or with its gradients in `out`.

    Raises:
        TargetError: The targets match nothing usable.
        ProfileError: No batch, no labels, a `BatchLoss.items` that is no count, every gradient
            zero, an unknown statistic or engine, more than a tenth of the batches dropped (names a
            module and a batch), a model wrapped in DataParallel, sharded over workers or with
            offloaded weights, another worker's failure, workers that differ, or too little memory
            (names the settings that need less).
        FileError: `out` cannot be written; what was there is as before.
    """
    workers = find_workers(distributed)
    with workers.failing_together(), out_of_memory_as(ProfileError, _OUT_OF_MEMORY):
        model = _unwrapped(model)
        settings = _Settings(
            find_targets(model, targets),
            check_statistics(statistics),
            _check_engine(engine),
            _check_count(batches),
            train_mode,
        )
        _refuse_offloaded(model, settings.selected)
        workers.check_same(settings.facts(model))
        sharded = distributed == "sharded" or (distributed == "auto" and is_sharded(batches_of))
        share = Share(workers, batches, sharded=sharded)
        ledger = Ledger(batches) if workers.size == 1 else SharedLedger(batches, workers, share)
        first = workers.rank == 0
        job = Job(
            model,
            settings.selected,
            loss_fn,
            settings.wanted,
            share.batches,
            train_mode,
            progress=progress and first,
            workers=workers,
            make_stream=stream_maker(settings.wanted, ledger, keep_gradients=keep_gradients),
        )
        dtype = wide_dtype(next(model.parameters()).dtype)
        kept = keep_gradients and (first or out is None)
        with (
            keeper(out if first else None, job.selected, dtype, gradients=kept) as keep,
            random_state_kept(batches_of),
        ):
            profile = keep.finish(_measure(job, share.of(batches_of), ledger, engine, keep))
        workers.any(True, "the end")  # a disk that is full at the first worker is everyone's error
    return profile


@dataclass(frozen=True)
class _Settings:
    """What is to be measured, checked; every worker's must be the same."""

    selected: Targets
    wanted: frozenset[Statistic]
    engine: str
    batches: int
    train_mode: bool

    def facts(self, model: nn.Module) -> dict[str, Any]:
        """In words, with the model."""
        return {
            "model": model_fingerprint(model),
            "targets": list(self.selected),
            "statistics": sorted(self.wanted),
            "engine": self.engine,
            "batches": self.batches,
            "train_mode": self.train_mode,
        }


def _measure(
    job: Job, batches: Iterable[Batch], ledger: Ledger, engine: str, keep: Keeper
) -> GradientProfile:
    """Run the engine, and turn what it gives into a profile without gradients."""
    started = time.perf_counter()
    found = Found(job)
    with (
        ExitStack() as generators,
        torch.enable_grad(),
        mode(job.model, train=job.train_mode),
    ):
        results = generators.enter_context(closing(_run_engine(job, batches, ledger, engine)))
        results = generators.enter_context(closing(_kept(results, keep)))
        if isinstance(ledger, SharedLedger):
            counts: Counts = {}
            results = divided(results, job.selected, job.workers, counts)
            with closing(results):
                used = found.add_all(results)
            complete_(found, counts, ledger)
        else:
            used = found.add_all(results)
    return found.profile(_provenance(job, ledger, used, time.perf_counter() - started))


def _kept(results: Results, keep: Keeper) -> Results:
    """The results, each offered to the keeper first."""
    while True:
        try:
            name, result = next(results)
        except StopIteration as end:
            return str(end.value)
        keep.keep(name, result)
        yield name, result


def _provenance(job: Job, ledger: Ledger, engine: str, seconds: float) -> ProfileProvenance:
    return ProfileProvenance(
        model=model_name(job.model),
        model_fingerprint=model_fingerprint(job.model),
        data_fingerprint=ledger.data_fingerprint,
        batches=len(ledger.items),
        batch_sizes=ledger.rows,
        batch_items=ledger.items,
        dropped_batches=sorted(ledger.dropped),
        unlabelled_batches=ledger.unlabelled,
        tokens=sum(ledger.items),
        dtype=str(next(job.model.parameters()).dtype).removeprefix("torch."),
        train_mode=job.train_mode,
        engine=engine,
        seconds=round(max(job.workers.gather_values(seconds, "seconds")), 3),
        versions=versions(),
        model_parameters=count_parameters(job.model),
        look_alikes=list(job.selected.look_alikes),
    )


def _run_engine(job: Job, batches: Iterable[Batch], ledger: Ledger, engine: str) -> Results:
    """Give out the modules' results, some perhaps twice; returns the engine that made them."""
    if engine == "hooks" or (engine == "auto" and not keeps_batches(job.wanted, job.workers.size)):
        yield from hook_engine(job, batches, ledger)
        return "hooks"
    taken = list(batches)
    try:
        yield from sweep_engine(job, taken, ledger)
    except (UnsuitableError, OthersUnsuitableError) as reason:
        if isinstance(reason, UnsuitableError):
            job.workers.tell_unsuitable(str(reason))
        level = logging.INFO if engine == "auto" else logging.WARNING
        logger.log(level, "the layer sweep does not fit: %s; measuring by hooks instead", reason)
    else:
        return "sweep"
    ledger.reset()
    yield from hook_engine(job, taken, ledger)
    return "hooks"


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model itself, whose modules have the names that a plan is to use.

    Raises:
        ProfileError: It is no model, or wrapped in what hides its layers or splits its weights.
    """
    if not isinstance(model, nn.Module):
        raise ProfileError(
            f"a model is needed, as from_pretrained() loads it, not a {type(model).__name__}."
        )
    if isinstance(model, nn.DataParallel):
        raise ProfileError(
            "DataParallel splits batches where hooks do not follow; pass model.module, on one "
            "device, or run one process a device: torchrun --nproc-per-node=N."
        )
    if isinstance(model, DistributedDataParallel):
        return _unwrapped(model.module)  # its hooks would average gradients; these are frozen
    for name, parameter in model.named_parameters():
        if type(parameter).__name__ == "DTensor" or type(parameter.data).__name__ == "DTensor":
            raise ProfileError(
                f"parameter {name} is sharded over workers (FSDP2 or tensor parallel); profile "
                "before the model is sharded, each worker with the whole model."
            )
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise ProfileError(
            "the model is wrapped in FullyShardedDataParallel; profile before wrapping it, each "
            "worker with the whole model."
        )
    return model


def _refuse_offloaded(model: nn.Module, selected: Targets) -> None:
    """Refuse targets whose weights are elsewhere, and a model whose place for batches is nowhere.

    Raises:
        ProfileError: Names the parameter.
    """
    first = next(iter(model.named_parameters()))
    within = [
        (f"{name}.{inner}", parameter)
        for name in selected
        for inner, parameter in model.get_submodule(name).named_parameters()
    ]
    for name, parameter in (first, *within):
        if parameter.is_meta:
            raise ProfileError(
                f"parameter {name} is on the meta device, where offloading to the CPU or the disk "
                "leaves it between uses; load the model whole, with no layer offloaded by "
                "device_map and not under init_empty_weights()."
            )


def _check_engine(engine: str) -> str:
    if engine not in get_args(Engine):
        raise ProfileError(f"engine={engine!r}; {nearest(engine, get_args(Engine))}")
    return engine


def _check_count(batches: int) -> int:
    if batches < 1:
        raise ProfileError(f"batches={batches}: at least one batch is needed.")
    return batches


def model_name(model: nn.Module) -> str:
    """The hub id or the folder's name: a full local path says more of a user than of a model."""
    name = str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")
    return PurePath(name).name if PurePath(name).is_absolute() else name or type(model).__name__
