"""One of two processes that profile together: runs every scenario and writes what came out.

Started as `python worker_process.py RANK PORT FOLDER`; `test_distributed.py` reads the results.
"""

from __future__ import annotations

import contextlib
import datetime
import io
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

import rankwise.cli
import rankwise.profiling.measure as measure_module
from rankwise.errors import RankwiseError
from rankwise.profiling import BatchLoss, GradientProfile, model_loss, profile_gradients
from rankwise.profiling.sweep import UnsuitableError
from tiny_models import ARCHITECTURES, Batch, tiny_llama, token_batch

ALL = ("gram", "fisher", "convergence")
ROWS = [[9, 6], [5, 4, 7], [3], [8, 8], [2, 6, 6]]
MARK = 13
"""Length of sequences that `marked_llama` spoils."""


def batches_for(architecture: str) -> list[Batch]:
    make_batch = ARCHITECTURES[architecture][1]
    return [make_batch(rows, seed=i) for i, rows in enumerate(ROWS)]


def marked_llama() -> nn.Module:
    """A model whose lowest layer gives a NaN for sequences of `MARK` tokens."""
    model = tiny_llama()

    def poison(_module: nn.Module, _inputs: object, output: Tensor) -> None:
        if output.shape[1] == MARK and output.requires_grad:
            output.register_hook(lambda gradient: gradient * torch.nan)

    model.get_submodule("model.layers.0.mlp.up_proj").register_forward_hook(poison)
    return model


def twelve_batches(*bad: int) -> list[Batch]:
    return [token_batch([MARK if i in bad else 4 + i % 3, 5], seed=i) for i in range(12)]


def unlabelled(batch: Batch) -> Batch:
    return batch | {"labels": torch.full_like(batch["labels"], -100)}


def failing_loss(rank: int, at: int) -> Callable[..., BatchLoss]:
    calls = 0

    def loss_fn(model: nn.Module, batch: Mapping[str, Any]) -> BatchLoss:
        nonlocal calls
        calls += 1
        if dist.is_initialized() and dist.get_rank() == rank and calls == at:
            raise ValueError("a loss that fails")
        return model_loss(model, batch)

    return loss_fn


def run(make: Callable[[], nn.Module], data: Sequence[Batch], **options: Any) -> GradientProfile:
    settings: dict[str, Any] = {"batches": len(data), "keep_gradients": True, "progress": False}
    return profile_gradients(make(), data, **(settings | options))


EQUAL: dict[str, Callable[[], GradientProfile]] = {
    "mean-hooks": lambda: run(tiny_llama, batches_for("llama"), statistics=("fisher",)),
    "all-sweep": lambda: run(tiny_llama, batches_for("llama"), statistics=ALL),
    "all-hooks": lambda: run(
        ARCHITECTURES["gpt2"][0], batches_for("gpt2"), statistics=ALL, engine="hooks"
    ),
    "t5": lambda: run(ARCHITECTURES["t5"][0], batches_for("t5"), statistics=ALL),
    "convergence": lambda: run(
        tiny_llama, twelve_batches(), statistics=("convergence",), engine="sweep"
    ),
    "dropped-hooks": lambda: run(marked_llama, twelve_batches(5), statistics=ALL, engine="hooks"),
    "dropped-sweep": lambda: run(marked_llama, twelve_batches(5), statistics=ALL),
    "mean-sweep": lambda: run(marked_llama, twelve_batches(2), engine="sweep"),
    "unlabelled": lambda: run(
        tiny_llama, [unlabelled(b) if i in (0, 3) else b for i, b in enumerate(twelve_batches())],
        statistics=ALL,
    ),
    "one-batch": lambda: run(tiny_llama, [token_batch([7, 5])], statistics=ALL),
    "short-loader": lambda: run(tiny_llama, batches_for("llama"), batches=9, statistics=ALL),
}  # fmt: skip
"""Name -> a profile, the same under two workers as in one process."""


def sharded(rank: int) -> GradientProfile:
    return run(
        tiny_llama, batches_for("llama")[rank::2], batches=5, statistics=ALL, distributed="sharded"
    )


def sampler(rank: int) -> GradientProfile:
    rows = [token_batch([6], seed=i) for i in range(4)]
    loader = DataLoader(
        rows,  # type: ignore[arg-type]
        batch_size=1,
        collate_fn=lambda items: items[0],
        sampler=DistributedSampler(rows, shuffle=False),  # type: ignore[arg-type]
    )
    return profile_gradients(tiny_llama(), loader, batches=4, keep_gradients=True, progress=False)


def wrapped(rank: int) -> GradientProfile:
    model = tiny_llama()
    return run(lambda: DistributedDataParallel(model), batches_for("llama"), statistics=ALL)


def one_unsuitable(rank: int) -> GradientProfile:
    """The second worker finds that the sweep does not fit."""
    engine = measure_module.sweep_engine

    def refuse(*arguments: Any) -> Any:
        if rank:
            raise UnsuitableError("the second worker says so")
        return engine(*arguments)

    measure_module.sweep_engine = refuse
    try:
        return run(tiny_llama, batches_for("llama"), statistics=ALL)
    finally:
        measure_module.sweep_engine = engine


def on_disk(rank: int, folder: Path) -> GradientProfile:
    return run(tiny_llama, batches_for("llama"), statistics=ALL, out=folder / "saved")


def by_command(folder: Path) -> str:
    """What `rankwise profile` prints on this worker."""
    options = ["--batches", "3", "--batch-size", "2", "--max-length", "16"]
    paths = [str(folder / "model"), str(folder / "train.jsonl"), "--out", str(folder / "command")]
    with contextlib.redirect_stdout(io.StringIO()) as printed, suppress_exit():
        rankwise.cli.main(["profile", *paths, *options])
    return printed.getvalue()


@contextlib.contextmanager
def suppress_exit() -> Iterator[None]:
    try:
        yield
    except SystemExit as end:
        assert not end.code, end.code


ERRORS: dict[str, Callable[[int], object]] = {
    "loss": lambda rank: run(tiny_llama, batches_for("llama"), loss_fn=failing_loss(1, 2)),
    "loss-sweep": lambda rank: run(
        tiny_llama, batches_for("llama"), statistics=ALL, loss_fn=failing_loss(0, 4)
    ),
    "targets": lambda rank: run(
        tiny_llama, batches_for("llama"), targets=["nothing"] if rank else ["k_proj"]
    ),
    "settings": lambda rank: run(tiny_llama, batches_for("llama"), batches=4 + rank),
    "model": lambda rank: run(lambda: tiny_llama(seed=rank), batches_for("llama")),
    "loader": lambda rank: run(tiny_llama, [token_batch([5 + rank], seed=i) for i in range(4)]),
    "too-many-dropped": lambda rank: run(marked_llama, twelve_batches(1, 4)),
    "zero": lambda rank: run(tiny_llama, [unlabelled(token_batch([5]))] * 4),
    "fsdp": lambda rank: run(lambda: fully_shard(tiny_llama()), batches_for("llama")),
    "disk": lambda rank: run(tiny_llama, batches_for("llama"), out=Path(__file__)),
}
"""Name -> what fails, with an error on both."""


def contents(profile: GradientProfile) -> dict[str, Any]:
    provenance = asdict(profile.provenance)
    seconds = provenance.pop("seconds")
    found: dict[str, Any] = {
        "modules": {name: asdict(module) for name, module in profile.modules.items()},
        "provenance": provenance,
        "seconds": seconds,
    }
    for kind in ("singular_values", "gradients", "gram", "convergence"):
        arrays = getattr(profile, kind)
        found[kind] = None if arrays is None else dict(arrays)
    return found


def main(rank: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=60))
    found: dict[str, Any] = {name: contents(make()) for name, make in EQUAL.items()}
    for make in (sharded, sampler, wrapped, one_unsuitable):
        found[make.__name__] = contents(make(rank))
    found["on_disk"] = contents(on_disk(rank, folder))
    found["cli"] = by_command(folder)
    for name, fail in ERRORS.items():
        try:
            fail(rank)
        except (RankwiseError, ValueError) as error:
            found[name] = f"{type(error).__name__}: {error}"
    # after all these failures the workers are still in step
    found["again"] = contents(EQUAL["mean-hooks"]())
    torch.save(found, folder / f"{rank}.pt")
    try:  # one dies without a word
        run(
            tiny_llama,
            [token_batch([5], seed=i) for i in range(4)],
            loss_fn=(lambda *_: os._exit(3)) if rank else model_loss,
        )
    except RankwiseError as error:
        (folder / "survivor.txt").write_text(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
