r"""Which scale block-diagonal updates should have: a sweep that can be stopped and resumed.

    python scripts/block_scaling.py MODEL OUT.jsonl \
        --task gsm8k=train.jsonl:question:answer --task arc=train.json:instruction:output \
        [--steps 100] [--seeds 0 1 2] [--lrs 5e-4 1e-3 2e-3 4e-3] [--blocks 1 2 8 32 gid]

A cell is scaling x init_fan_in x learning rate x n x seed x task: uniform n, or each layer's own
by GID (`rankwise.RaLora`). One JSON line is added for every finished run, with the held-out loss;
cells that OUT.jsonl already holds are not run again, so the same command continues where it was
stopped, and a second one with more seeds or steps adds to the file. Held-out sequences are a
shuffled 5 % of the training file, the same every time: test sets stay out of it. Every line says
what model and data it was made with; a file of others is refused (lines that do not say it are
taken as they are), and so is `--summary` of one with several sizes or batches. `--summary`
prints tables instead: losses by learning rate, and each setting against LoRA, paired by seed.

n = 1 has one scaling and one init, which is plain LoRA; it runs once per learning rate and seed.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, get_cosine_schedule_with_warmup

import rankwise as rw
from rankwise.allocation import dividing_blocks
from rankwise.experiments.statistics import summarise
from rankwise.files import read_json_lines
from rankwise.provenance import git_commit, model_fingerprint, versions
from rankwise.tables import markdown_table
from rankwise.training.config import DataConfig
from rankwise.training.data import TokenData, load_token_data
from rankwise.training.evaluate import held_out_loss


@dataclass(frozen=True)
class Cell:
    """One run of the sweep; two runs with equal cells are the same run."""

    task: str
    blocks: str
    scaling: str
    init_fan_in: str
    lr: float
    seed: int
    steps: int
    batch_size: int
    max_length: int
    r: int
    alpha: float


def cells(options: argparse.Namespace) -> Iterator[Cell]:
    """Every run asked for, seeds outermost, so that an early stop leaves whole tables."""
    tasks = [task.split("=", 1)[0] for task in options.task]
    for seed, task, lr, blocks in itertools.product(
        options.seeds, tasks, options.lrs, options.blocks
    ):
        both = [("paper", "full")] if blocks == "1" else itertools.product(
            options.scalings, options.inits
        )  # fmt: skip
        for scaling, init in both:
            yield Cell(
                task, blocks, scaling, init, lr, seed, options.steps, options.batch_size,
                options.max_length, options.r, options.alpha,
            )  # fmt: skip


def finished(path: Path) -> dict[Cell, dict[str, Any]]:
    """Results by cell."""
    return {Cell(**row.pop("cell")): row for row in read_json_lines(path)}


def refuse_others(done: dict[Cell, dict[str, Any]], sources: dict[str, dict[str, Any]]) -> None:
    """Stop where finished runs of a task are not of its source."""
    for cell, row in done.items():
        found, wanted = row.get("source"), sources.get(cell.task)
        if None not in (found, wanted) and found != wanted:
            raise SystemExit(f"{cell}: made with {found}, not with {wanted}; name another OUT.")


class Task:
    """A task's data, and the profile that its block counts by GID come from, made once."""

    def __init__(self, text: str, model: str, options: argparse.Namespace) -> None:
        self.name, source = text.split("=", 1)
        train, prompt, completion = source.rsplit(":", 2)
        config = DataConfig(
            train=train,
            prompt_column=prompt,
            completion_column=completion,
            max_length=options.max_length,
            max_held_out=options.held_out,
        )
        self.data: TokenData = load_token_data(config, AutoTokenizer.from_pretrained(model), seed=0)
        self.source = {
            "model": model_fingerprint(AutoModelForCausalLM.from_pretrained(model)),
            "data": hashlib.sha256(Path(train).read_bytes()).hexdigest()[:16],
            "held_out": options.held_out,
            "profile_batches": options.profile_batches,
        }
        self.folder = Path(f"{options.out}.{self.name}.profile")
        self.options = options

    def profile(self, base: nn.Module) -> rw.GradientProfile:
        """The saved profile, or a new one."""
        if not self.folder.exists():
            loader = self.data.loader(self.options.batch_size, seed=0)
            rw.profile_gradients(base, loader, batches=self.options.profile_batches).save(
                self.folder
            )
        return rw.GradientProfile.load(self.folder)


def plan_of(cell: Cell, base: nn.Module, task: Task) -> rw.RankPlan:
    """The plan of a cell; every plan has LoRA's parameters."""
    if cell.blocks == "gid":
        return rw.RaLora(r=cell.r, alpha=cell.alpha).plan(task.profile(base))
    shapes = rw.find_targets(base)
    modules = {
        name: rw.ModulePlan(
            shape.d_in,
            shape.d_out,
            cell.r,
            dividing_blocks(int(cell.blocks), shape.d_in, shape.d_out),
        )
        for name, shape in shapes.items()
    }
    return rw.RankPlan(
        method=f"n = {cell.blocks}", adapter="ralora", r_ref=cell.r, alpha=cell.alpha,
        budget=None, modules=modules,
    )  # fmt: skip


def run(cell: Cell, model: str, task: Task) -> dict[str, Any]:
    """Train one cell; returns what is written down."""
    started = time.perf_counter()
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    plan = plan_of(cell, base, task)
    torch.manual_seed(cell.seed)
    adapted = rw.attach(base, plan, scaling=cell.scaling, init_fan_in=cell.init_fan_in)
    parameters = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=cell.lr, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, round(0.03 * cell.steps), cell.steps)
    held_out = task.data.held_out_loader(cell.batch_size)
    losses = []
    for step, batch in enumerate(itertools.islice(batches(task, cell), cell.steps)):
        loss = adapted.train()(**batch, use_cache=False).loss
        if not math.isfinite(float(loss.detach())):
            return {"diverged": step, "held_out": None, "seconds": time.perf_counter() - started}
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return {
        "held_out": held_out_loss(adapted, held_out, step=cell.steps).loss,
        "train": statistics.mean(losses[-10:]),
        "parameters": sum(p.numel() for p in parameters),
        "mean_blocks": statistics.mean(m.blocks for m in plan.modules.values()),
        "seconds": round(time.perf_counter() - started, 1),
    }


def batches(task: Task, cell: Cell) -> Iterator[dict[str, Any]]:
    """The data over and over, in an order of the seed's."""
    for epoch in itertools.count():
        yield from task.data.loader(cell.batch_size, seed=1000 * cell.seed + epoch)


Setting = tuple[str, str, str]
"""Blocks, scaling and init."""
LORA: Setting = ("1", "paper", "full")


def summary(done: dict[Cell, dict[str, Any]]) -> str:
    """Two tables in Markdown for every task and length."""
    parts = []
    for task, steps in sorted({(cell.task, cell.steps) for cell in done}):
        losses: dict[Setting, dict[float, dict[int, float]]]
        losses = defaultdict(lambda: defaultdict(dict))
        for cell, row in done.items():
            if (cell.task, cell.steps) == (task, steps):
                key = cell.blocks, cell.scaling, cell.init_fan_in
                held_out = row["held_out"]
                losses[key][cell.lr][cell.seed] = math.inf if held_out is None else held_out
        parts += [f"### {task}, {steps} steps", _by_rate(losses), _against_lora(losses)]
    return "\n\n".join(parts)


def _by_rate(losses: dict[Setting, dict[float, dict[int, float]]]) -> str:
    """Mean held-out loss, its standard deviation and the number of seeds, by learning rate."""
    rates = sorted({rate for by_rate in losses.values() for rate in by_rate})
    rows = []
    for setting, by_rate in sorted(losses.items()):
        cells = [_spread([*by_rate[rate].values()]) if rate in by_rate else "" for rate in rates]
        rows.append([*setting, *cells])
    return markdown_table(["n", "scaling", "init", *(f"lr {rate:g}" for rate in rates)], rows)


def _against_lora(losses: dict[Setting, dict[float, dict[int, float]]]) -> str:
    """Differences to LoRA, paired by seed: both at LoRA's best rate, and each at its own best.

    The best rate is that of the smallest mean, among the rates with the most seeds.
    """
    if LORA not in losses:
        return "LoRA (n = 1) has not been run."
    at = _best(losses[LORA])
    reference, rows = losses[LORA][at], []
    for setting, by_rate in sorted(losses.items()):
        own = _best(by_rate)
        differences = [
            [loss - reference[seed] for seed, loss in by_rate.get(rate, {}).items()
             if seed in reference and math.isfinite(loss) and math.isfinite(reference[seed])]
            for rate in (at, own)
        ]  # fmt: skip
        rows.append([*setting, _interval(differences[0]), f"{own:g}", _interval(differences[1])])
    columns = ["n", "scaling", "init", f"at LoRA's best, {at:g}", "own best", "there"]
    return markdown_table(columns, rows)


def _best(by_rate: dict[float, dict[int, float]]) -> float:
    most = max(len(by_seed) for by_seed in by_rate.values())
    full = {rate: by_seed for rate, by_seed in by_rate.items() if len(by_seed) == most}
    return min(full, key=lambda rate: statistics.mean(full[rate].values()))


def _spread(values: list[float]) -> str:
    """Mean and spread of the runs that did not diverge, and how many did."""
    finite = [value for value in values if math.isfinite(value)]
    diverged = len(values) - len(finite)
    if not finite:
        return f"{diverged} diverged"
    spread = f" ± {statistics.stdev(finite):.4f}" if len(finite) > 1 else ""
    lost = f", {diverged} diverged" if diverged else ""
    return f"{statistics.mean(finite):.4f}{spread} ({len(finite)}{lost})"


def _interval(differences: list[float]) -> str:
    if not differences:
        return ""
    found = summarise(differences)
    spread = f" [{found.low:+.4f}, {found.high:+.4f}]" if len(differences) > 1 else ""
    return f"{found.mean:+.4f}{spread} ({len(differences)})"


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--task", action="append", default=[], help="NAME=FILE:PROMPT:COMPLETION")
    parser.add_argument("--summary", action="store_true")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--lrs", type=float, nargs="+", default=[5e-4, 1e-3, 2e-3, 4e-3])
    parser.add_argument("--blocks", nargs="+", default=["1", "2", "8", "32", "gid"])
    parser.add_argument("--scalings", nargs="+", default=["paper", "function"])
    parser.add_argument("--inits", nargs="+", default=["full", "block"])
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--held-out", type=int, default=128, help="held-out sequences")
    parser.add_argument("--profile-batches", type=int, default=8)
    parser.add_argument("--r", type=int, default=8)
    parser.add_argument("--alpha", type=float, default=16.0)
    return parser.parse_args()


def main() -> None:
    """Run what is missing."""
    options = arguments()
    done = finished(options.out)
    if options.summary:
        sizes = {(c.r, c.alpha, c.batch_size, c.max_length) for c in done}
        if len(sizes) > 1:
            raise SystemExit(f"{options.out}: holds several sizes or batches: {sorted(sizes)}")
        print(summary(done))
        return
    tasks = {task.name: task for task in (Task(t, options.model, options) for t in options.task)}
    wanted = [cell for cell in cells(options) if cell not in done]
    refuse_others(done, {name: task.source for name, task in tasks.items()})
    facts = {"commit": git_commit(), "versions": versions()}
    print(f"{len(wanted)} runs to do, {len(done)} in {options.out}", flush=True)
    for i, cell in enumerate(wanted, 1):
        task = tasks[cell.task]
        result = run(cell, options.model, task) | {"source": task.source}
        with options.out.open("a") as file:
            file.write(json.dumps({"cell": asdict(cell)} | result | facts) + "\n")
            file.flush()
            os.fsync(file.fileno())
        print(f"{i}/{len(wanted)} {cell}: {result['held_out']}", flush=True)


if __name__ == "__main__":
    main()
