"""One of two processes that train one model; run as a script by dynamic/test_workers.py."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

import rankwise as rw
import rankwise.dynamic.callback as callback_module
from dynamic_runs import WATER, adamw, attached, trainer_run
from rankwise.dynamic import DynamicRanks
from rankwise.dynamic.saved import read_saved
from rankwise.methods import Method
from rankwise.plan import ModulePlan, RankPlan
from tiny_models import tiny_llama, token_batch

METHODS: dict[str, Method] = {
    "water-fill": WATER,
    "gard": rw.Gard(r=4, r_max=8, energy=0.5),
    "ls-lora": rw.LsLora(r=4),
    "lora-gid": rw.LoraGid(r=4, r_max=8),
    "compose": rw.Compose(r=4, r_max=8, statistic="gram", estimator="stable-rank"),
}
OUR_ADAPTERS = ("ralora", "lr-lora")
STEPS, INTERVAL, WINDOW, SAVED_AT = 8, 4, 3, 6
"""Events after steps 4 and 8; step 6 begins a window."""
NAN_AT = 5
"""The index of the step whose batch is not finite in runs that say so."""
Start = Callable[[torch.nn.Module], torch.nn.Module]


def halves(step: int) -> list[dict[str, torch.Tensor]]:
    """The two halves of a batch, of as many labels each."""
    return [token_batch([9, 6], seed=2 * step + worker) for worker in (0, 1)]


def joined(step: int) -> dict[str, torch.Tensor]:
    """The whole batch."""
    parts = halves(step)
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def start(method: Method, budget: int | None = None) -> tuple[DynamicRanks, torch.optim.Optimizer]:
    """A model, its optimizer and its ranks, the same in every process."""
    model, plan = attached(dtype=torch.float64)
    optimizer = adamw(model)
    options = rw.DynamicOptions(interval=INTERVAL, window=WINDOW, beta=0.0)
    plan = plan if budget is None else replace(plan, budget=budget)
    return DynamicRanks(model, plan, method, options, optimizer=optimizer), optimizer


def train(
    ranks: DynamicRanks,
    optimizer: torch.optim.Optimizer,
    worker: int | None = None,
    steps: range = range(STEPS),
    disturb: Callable[[int, torch.Tensor], torch.Tensor] | None = None,
) -> dict[str, Any]:
    """A plain loop on this worker's half of every batch, or on all; what came of it."""
    model = ranks.model if worker is None else DistributedDataParallel(ranks.model)
    outcome: dict[str, Any] = {}
    try:
        for step in steps:
            with ranks.observe():
                batch = joined(step) if worker is None else halves(step)[worker]
                loss = model(**batch).loss
                (loss if disturb is None else disturb(step, loss)).backward()
            if disturb is not None and not all(
                p.grad.isfinite().all() for p in ranks.model.parameters() if p.grad is not None
            ):
                optimizer.zero_grad()
            optimizer.step()
            ranks.step()
            optimizer.zero_grad()
    except rw.RankwiseError as error:
        outcome["error"] = str(error)
    outcome["events"] = [
        [e.step, e.batches, e.dropped, m.module, m.after] for e in ranks.events for m in e.moves
    ]
    outcome["ranks"] = ranks.state.ranks
    return outcome


def weights(ranks: DynamicRanks) -> list[torch.Tensor]:
    """The adapter."""
    return [p.detach() for p in ranks.model.parameters() if p.requires_grad]


def save(path: Path, ranks: DynamicRanks, optimizer: torch.optim.Optimizer) -> None:
    """A checkpoint of a plain loop."""
    saved = json.loads(json.dumps(asdict(ranks.saved())))
    tensors = {"weights": weights(ranks), "optimizer": optimizer.state_dict()}
    torch.save({"saved": saved, "window": ranks.window.arrays(), **tensors}, path)


def load(path: Path, ranks: DynamicRanks, optimizer: torch.optim.Optimizer) -> None:
    """Continue from it."""
    found = torch.load(path, weights_only=True)
    with torch.no_grad():
        for mine, theirs in zip(weights(ranks), found["weights"], strict=True):
            mine.copy_(theirs)
    optimizer.load_state_dict(found["optimizer"])
    ranks.restore(read_saved(found["saved"], path), found["window"])


def nan_for(worker: int | None) -> Callable[[int, torch.Tensor], torch.Tensor]:
    """Spoils one batch, on worker 1 alone where there are several."""
    return lambda step, loss: loss * (float("nan") if step == NAN_AT and worker != 0 else 1.0)


def every_method(folder: Path, worker: int) -> dict[str, Any]:
    """Each method's ranks, and its weights in a file."""
    found = {}
    for name, method in METHODS.items():
        ranks, optimizer = start(method)
        found[name] = train(ranks, optimizer, worker)
        torch.save(weights(ranks), folder / f"{name}.{worker}.pt")
    return found


def our_adapter(kind: str, worker: int | None) -> list[torch.Tensor]:
    """Adapters with backward passes of their own under DDP, or in one process on all batches."""
    torch.manual_seed(0)
    base = tiny_llama().double()
    targets = rw.find_targets(base)
    if kind == "ralora":
        modules = {n: ModulePlan(s.d_in, s.d_out, 2, 2) for n, s in targets.items()}
        model = rw.attach(base, RankPlan("by hand", "ralora", 2, 4.0, None, modules))
    else:
        model = rw.attach(base, rw.Lora(r=4).plan(targets), adapter="lr-lora")
    model = model.double()
    optimizer = adamw(model)
    trained = model if worker is None else DistributedDataParallel(model)
    for step in range(4):
        trained(**(joined(step) if worker is None else halves(step)[worker])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach() for p in model.parameters() if p.requires_grad]


def our_adapters(folder: Path, worker: int) -> dict[str, Any]:
    """Their weights, in a file each."""
    for kind in OUR_ADAPTERS:
        torch.save(our_adapter(kind, worker), folder / f"{kind}.{worker}.pt")
    return {}


def faults(folder: Path, worker: int) -> dict[str, Any]:
    """A worker with another plan, one whose weights went astray, one whose batch is NaN."""
    plain, _ = start(WATER)
    ranks, optimizer = start(WATER, plain.controller.budget + 1000 * worker)
    found = {"plan": train(ranks, optimizer, worker)}
    ranks, optimizer = start(WATER)
    first = weights(ranks)[0]

    def astray(step: int, loss: torch.Tensor) -> torch.Tensor:
        if step == 4 and worker == 1:
            first[0] += 1e-3  # what the reducer never sees
        return loss

    found["data"] = train(ranks, optimizer, worker, disturb=astray)
    for name in ("gard", "water-fill"):
        ranks, optimizer = start(METHODS[name])
        found[f"nan {name}"] = train(ranks, optimizer, worker, disturb=nan_for(worker))
    return found


def resumed(folder: Path, worker: int) -> dict[str, Any]:
    """A run of two that saves in a window, and runs of two that go on from one process's files."""
    found = {}
    for name in ("gard", "water-fill"):
        ranks, optimizer = start(METHODS[name])
        train(ranks, optimizer, worker, range(SAVED_AT))
        try:
            ranks.saved()
        except rw.RankwiseError as error:
            found[f"{name} not joined"] = str(error)
        ranks.join()
        if worker == 0:
            save(folder / f"{name}.two.pt", ranks, optimizer)
        ranks, optimizer = start(METHODS[name])
        load(folder / f"{name}.one.pt", ranks, optimizer)
        found[name] = train(ranks, optimizer, worker, range(SAVED_AT, STEPS))
    return found


def trainer(folder: Path, worker: int) -> dict[str, Any]:
    """Trainer's own DDP, saving in a window; a resumed run must end as the whole one."""
    found: dict[str, Any] = {"written": []}
    write = callback_module.write_window

    def counted(checkpoint: Path, arrays: Any) -> None:
        found["written"].append(checkpoint.name)
        write(checkpoint, arrays)

    callback_module.write_window = counted
    for name, checkpoint in (("whole", None), ("resumed", "checkpoint-4")):
        run, callback = trainer_run(folder / "trainer", **trainer_settings(2))
        run.train(resume_from_checkpoint=checkpoint and str(folder / "trainer" / checkpoint))
        found[name] = callback.ranks.state.ranks
        torch.save(weights(callback.ranks), folder / f"trainer.{name}.{worker}.pt")
    return found


def trainer_settings(batch_size: int) -> dict[str, Any]:
    """Of a run that saves at steps 4, in a window, and 6."""
    return {
        "method": METHODS["gard"], "dropout": 0.0, "compact": False, "max_steps": 6,
        "per_device_train_batch_size": batch_size, "save_strategy": "steps", "save_steps": 2,
        "options": {"interval": 5, "window": 3, "beta": 0.0},
    }  # fmt: skip


def sharded(folder: Path, worker: int) -> dict[str, Any]:
    """FSDP2 around a dynamic model."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, plan = attached()
    ranks = DynamicRanks(model, plan, WATER)
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    try:
        ranks.watch(adamw(model))
    except rw.RankwiseError as error:
        return {"error": str(error)}
    return {}


def widowed(folder: Path, worker: int) -> dict[str, Any]:
    """Worker 1 ends without a word in the step of an event."""
    ranks, optimizer = start(WATER)

    def end(step: int, loss: torch.Tensor) -> torch.Tensor:
        if step == INTERVAL - 1 and worker == 1:
            optimizer.register_step_post_hook(lambda *_: os._exit(9))
        return loss

    return train(ranks, optimizer, worker, disturb=end)


def main(folder: Path, worker: int, port: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(worker), "LOCAL_RANK": str(worker), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    dist.init_process_group("gloo")
    for scenario in (every_method, our_adapters, faults, resumed, trainer, sharded, widowed):
        outcome = scenario(folder, worker)
        (folder / f"{scenario.__name__}.{worker}.json").write_text(json.dumps(outcome))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
