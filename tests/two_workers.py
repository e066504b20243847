"""One of two processes that train one model; run as a script by test_workers.py."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

import rankwise as rw
from dynamic_runs import WATER, adamw, attached
from rankwise.dynamic import DynamicRanks
from tiny_models import token_batch


def joined(step: int) -> list[dict[str, torch.Tensor]]:
    """The two halves of a batch, of as many labels each."""
    return [token_batch([9, 6], seed=2 * step + worker) for worker in (0, 1)]


def train(worker: int, fault: str) -> tuple[dict[str, object], list[torch.Tensor]]:
    """Six steps with two events; what came of them, and the adapter."""
    model, plan = attached(dtype=torch.float64)
    if fault == "plan" and worker == 1:
        plan = replace(plan, budget=plan.parameters + 1000)
    optimizer = adamw(model)
    options = rw.DynamicOptions(interval=3, window=2)
    ranks = DynamicRanks(model, plan, WATER, options, optimizer=optimizer)
    wrapped = DistributedDataParallel(model)
    outcome: dict[str, object] = {}
    try:
        for step in range(6):
            with ranks.observe():
                wrapped(**joined(step)[worker]).loss.backward()
            if fault == "data" and worker == 1 and step == 4:
                # a gradient of data that the reducer never saw
                next(p for p in model.parameters() if p.grad is not None).grad[0] += 1e-3
            optimizer.step()
            ranks.step()
            optimizer.zero_grad()
    except rw.RankwiseError as error:
        outcome["error"] = str(error)
    outcome["events"] = [[e.step, m.module, m.after] for e in ranks.events for m in e.moves]
    outcome["ranks"] = ranks.state.ranks
    return outcome, [p.detach() for p in model.parameters() if p.requires_grad]


def main(folder: Path, worker: int) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=worker, world_size=2)
    runs = {fault: train(worker, fault) for fault in ("none", "plan", "data")}
    dist.destroy_process_group()
    torch.save(runs["none"][1], folder / f"{worker}.pt")
    outcomes = {fault: outcome for fault, (outcome, _) in runs.items()}
    (folder / f"{worker}.json").write_text(json.dumps(outcomes))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
