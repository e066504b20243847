"""What `rankwise profile` does: load, say how much memory it takes, measure, save, show."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from rankwise.files import check_replaceable
from rankwise.profile_tables import column_values, compare_profiles, profile_table
from rankwise.profiling import Engine, GradientProfile, Statistic, profile_gradients
from rankwise.profiling.memory import available_memory, estimate_memory
from rankwise.profiling.profile import PROFILE_FILE, PROFILE_FILES
from rankwise.training.config import RunConfig
from rankwise.training.data import load_token_data
from rankwise.training.train import load_model


@dataclass(frozen=True)
class ProfileSettings:
    """What to measure, and what of it to show.

    Attributes:
        batches: N, over all workers.
        batch_size: Sequences in a batch.
        statistics: Besides the mean.
        engine: As for `profile_gradients`.
        keep_gradients: Whether the folder holds the mean gradients, too.
        column: What the table shows: see `rankwise.profile_tables`.
        compare: An earlier profile to hold the new one against.
    """

    batches: int
    batch_size: int
    statistics: Sequence[Statistic] = ()
    engine: Engine = "auto"
    keep_gradients: bool = False
    column: str = "gid"
    compare: Path | None = None


def run_profile(
    config: RunConfig, settings: ProfileSettings, notify: Callable[[str], None]
) -> str | None:
    """Profile the configured model on the configured data into `config.output`.

    Under torchrun the batches are divided among the workers.

    Args:
        config: Model, targets, dtype, seed, data and the folder to write.
        settings: What to measure and show.
        notify: Called with a line of text before the work begins.

    Returns:
        The text to show; None on every worker but the first.

    Raises:
        RankwiseError: Any bad input; nothing is written then.
    """
    out = Path(config.output)
    check_replaceable(out, marker=PROFILE_FILE, written=PROFILE_FILES)
    earlier = None if settings.compare is None else GradientProfile.load(settings.compare)
    if earlier is not None:
        column_values(earlier, settings.column)  # before hours of work
    model, tokenizer = load_model(config.model, config.dtype)
    tokens = load_token_data(config.data, tokenizer, seed=config.seed)
    with _process_group() as (rank, workers):
        estimate = estimate_memory(
            model,
            config.targets,
            batches=-(-settings.batches // workers),
            tokens=settings.batch_size * config.data.max_length,
            samples=settings.batch_size,
            statistics=settings.statistics,
            engine=settings.engine,
        )
        if rank == 0:
            notify(f"memory: {estimate}")
            warning = estimate.warning(available_memory(next(model.parameters()).device))
            if warning is not None:
                notify(f"warning: {warning}")
        measured = profile_gradients(
            model,
            tokens.loader(settings.batch_size, seed=config.seed),
            config.targets,
            batches=settings.batches,
            statistics=["mean", *settings.statistics],
            engine=settings.engine,
            keep_gradients=settings.keep_gradients,
            out=out,
        )
    return _shown(measured, earlier, settings.column) if rank == 0 else None


def _shown(measured: GradientProfile, earlier: GradientProfile | None, column: str) -> str:
    parts = [str(measured) if column == "gid" else profile_table(measured, column)]
    if measured.convergence is not None:
        parts.append(measured.convergence_verdict())
    if earlier is not None:
        parts.append(compare_profiles(earlier, measured, column))
    return "\n\n".join(parts)


@contextmanager
def _process_group() -> Iterator[tuple[int, int]]:
    """The group of the workers that torchrun started: this one's rank, and how many there are."""
    if int(os.environ.get("WORLD_SIZE", "1") or 1) == 1 or dist.is_initialized():
        yield (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        return
    dist.init_process_group()
    try:
        yield dist.get_rank(), dist.get_world_size()
    finally:
        dist.destroy_process_group()
