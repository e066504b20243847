r"""LR-LoRA's ablations at small scale: one table a group, several seeds, resumable.

    python scripts/lr_lora_ablations.py MODEL OUT.jsonl --train train.tsv \
        [--groups init bases ...] [--steps 50] [--seeds 0 1 2] [--lr 3e-3] [--batch-size 16] \
        [--depth 3]

MODEL is a BERT-like encoder (a local transformers folder or a hub id), of which the first layers
get a new linear head on the mean of their outputs; train.tsv has sentences and labels (SST-2,
CoLA). Every run trains some seconds and is judged on 256 training sentences that are held out. One
JSON line is added for each finished run; runs that OUT.jsonl already holds are not repeated, and a
file of another model or other data is refused.
`--summary` prints the tables as Markdown instead.

All runs use one learning rate, chosen for no setting in particular, and too few steps to say which
setting trains best in the end: the tables show that every setting runs and how it starts.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModel, get_constant_schedule_with_warmup
from transformers.modeling_outputs import SequenceClassifierOutput

import rankwise as rw
from rankwise.adapters import LrLoraLinear
from rankwise.experiments.tasks import ClassificationTask, TaskData
from rankwise.files import read_json_lines
from rankwise.placement import Layers, Part
from rankwise.provenance import git_commit, hardware, model_fingerprint, versions

Options = dict[str, Any]
DEFAULT: Options = {}
LORA: Options = {"adapter": "lora"}
GROUPS: Mapping[str, tuple[str, Mapping[str, Options]]] = {
    "init": (
        "start (table 3, and the two faults of the printed recipe)",
        {
            "live (default)": DEFAULT,
            "paper": {"init": "paper"},
            "grid_shift": {"init": "grid_shift"},
            "small": {"init": "small"},
            "paper, one learning rate": {"init": "paper", "amplitude_ratio": 1.0},
            "live, one learning rate": {"amplitude_ratio": 1.0},
            "LoRA": LORA,
        },
    ),
    "constant": (
        "with and without the constant f(0)",
        {
            "with (default)": DEFAULT,
            "without": {"constant": False},
            "without, one learning rate": {"constant": False, "amplitude_ratio": 1.0},
            "LoRA": LORA,
        },
    ),
    "rank": (
        "base rank (table 12)",
        {
            f"r = {r}{' (default)' if r == 8 else ''}": {} if r == 8 else {"r": r}
            for r in (2, 4, 8, 16)
        }
        | {f"LoRA, r = {r}": LORA if r == 8 else LORA | {"r": r} for r in (2, 4, 8, 16)},
    ),
    "bases": (
        "basis at equal parameters (table 13)",
        {
            "sinc (default)": DEFAULT,
            **{b: {"basis": b} for b in ("rbf", "spline", "fourier", "polynomial")},
            "sine, omega 100 (SineLoRA)": {"basis": "sine"},
        },
    ),
    "grids": (
        "grid (tables 14 and 16)",
        {
            "uniform (default)": DEFAULT,
            **{g: {"grid": g} for g in ("chebyshev", "random", "learned")},
        },
    ),
    "points": (
        "grid points K (table 15)",
        {
            f"K = {k}{' (default)' if k == 50 else ''}": {} if k == 50 else {"points": k}
            for k in (8, 50, 100)
        },
    ),
    "scales": (
        "bandwidths and amplitudes at the start (tables 17 and 18)",
        {
            "w = 1, learned (default)": DEFAULT,
            "w = 1, fixed": {"bandwidth": "fixed"},
            "w = 2": {"bandwidth_init": 2.0},
            "w = 4": {"bandwidth_init": 4.0},
            "amplitudes N(0, 0.1)": {"init": "small"},
            "amplitudes N(0, 1)": {"init": "small", "amplitude_std": 1.0},
        },
    ),
    "placement": (
        "adapted modules (tables 19 and 23)",
        {
            "all (default)": DEFAULT,
            **{part: {"part": part} for part in ("attention", "mlp", "qkv")},
            **{f"{layers} layers": {"layers": layers} for layers in ("odd", "even", "first_last")},
            "LoRA, all": LORA,
            **{f"LoRA, {part}": LORA | {"part": part} for part in ("attention", "mlp", "qkv")},
            **{f"LoRA, {layers} layers": LORA | {"layers": layers} for layers in ("odd", "even")},
        },
    ),
    "sharing": (
        "what modules share of f (table 20)",
        {
            "nothing (default)": DEFAULT,
            **{s: {"share": s} for s in ("bandwidth", "amplitude", "all")},
        },
    ),
}
PERTURBED = {
    f"{name}, {size:.0%}": (name, size)
    for name in ("lrlora_amplitude", "lrlora_bandwidth", "lrlora_A", "lrlora_B")
    for size in (0.01, 0.1, 0.5)
}
"""Noise on trained parameters, in units of each tensor's root mean square (table 21)."""


@dataclass(frozen=True)
class Cell:
    """One run; two runs with equal cells are the same run."""

    options: str
    seed: int
    steps: int
    lr: float
    batch_size: int
    depth: int


class MeanPooled(nn.Module):
    """An encoder's first layers, the mean of its outputs and a new linear head."""

    def __init__(self, model: str, depth: int, labels: int) -> None:
        super().__init__()
        self.encoder = AutoModel.from_pretrained(model, dtype=torch.float32)
        self.encoder.encoder.layer = self.encoder.encoder.layer[:depth]
        self.classifier = nn.Linear(self.encoder.config.hidden_size, labels)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Any:
        """Loss and logits."""
        hidden = self.encoder(input_ids, attention_mask=attention_mask).last_hidden_state
        shares = attention_mask / attention_mask.sum(dim=1, keepdim=True)
        logits = self.classifier((hidden * shares[..., None]).sum(dim=1))
        loss = nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def cells(arguments: argparse.Namespace) -> Iterator[Cell]:
    """Every run asked for, once, seeds outermost, so that an early stop leaves whole tables."""
    for seed in arguments.seeds:
        seen = set()
        for group in arguments.groups:
            for options in GROUPS[group][1].values():
                text = json.dumps(options, sort_keys=True)
                if text not in seen:
                    seen.add(text)
                    yield cell_of(arguments, text, seed)


def cell_of(arguments: argparse.Namespace, options: str, seed: int) -> Cell:
    """A run with the settings asked for."""
    common = (arguments.steps, arguments.lr, arguments.batch_size, arguments.depth)
    return Cell(options, seed, *common)


def finished(path: Path) -> dict[Cell, dict[str, Any]]:
    """Results by cell."""
    return {Cell(**row.pop("cell")): row for row in read_json_lines(path)}


def adapted(base: nn.Module, options: Options, lr: float) -> tuple[PeftModel, list[dict[str, Any]]]:
    """The model with its adapters, and the optimizer's groups."""
    options = dict(options)
    part: Part = options.pop("part", "all")
    layers: Layers = options.pop("layers", "all")
    adapter, ratio = options.pop("adapter", "lr-lora"), options.pop("amplitude_ratio", None)
    body = {name: shape for name, shape in rw.find_targets(base).items() if ".layer." in name}
    names = rw.placed_modules(body, part, layers=layers, edge=1)
    targets = {name: body[name] for name in names}
    plan = rw.Lora(r=options.pop("r", 8)).plan(targets)
    model = get_peft_model(
        base,
        rw.adapters.adapter_config(
            plan, adapter=adapter, modules_to_save=["classifier"], **options
        ),
    )
    if adapter == "lora":
        return model, [{"params": [p for p in model.parameters() if p.requires_grad], "lr": lr}]
    ratios = {} if ratio is None else {"amplitude_ratio": ratio}
    return model, rw.lr_lora_param_groups(model, lr, **ratios)


def train(task: ClassificationTask, data: TaskData, cell: Cell) -> dict[str, Any]:
    """One run: its held-out figures and what it cost."""
    torch.manual_seed(cell.seed)
    base = MeanPooled(task.model, cell.depth, task.labels)
    model, groups = adapted(base, json.loads(cell.options), cell.lr)
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    schedule = get_constant_schedule_with_warmup(optimizer, 5)
    draw = torch.Generator().manual_seed(cell.seed)
    model.train()
    started = time.perf_counter()
    for _ in range(cell.steps):
        rows = torch.randint(len(data.train), (cell.batch_size,), generator=draw)
        loss = model(**data.collate([data.train[i] for i in rows.tolist()])).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    seconds = time.perf_counter() - started
    loss_and_accuracy = held_out(model, data)
    layers = [m for m in model.modules() if isinstance(m, LrLoraLinear)]
    passes = [
        sum(part) for part in zip(*(la.lrlora_passes["default"] for la in layers), strict=True)
    ]
    result = {
        "loss": loss_and_accuracy[0],
        "accuracy": loss_and_accuracy[1],
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "seconds": round(seconds, 2),
        "factorised": round(passes[1] / sum(passes), 4) if passes else None,
    }
    if cell.options == "{}":
        result["perturbed"] = perturbed(model, data, layers, cell.seed)
    return result


@torch.no_grad()
def held_out(model: nn.Module, data: TaskData) -> tuple[float, float]:
    """Mean loss and accuracy on the held-out sentences."""
    model.eval()
    losses, right = 0.0, 0
    for batch in data.batches(data.validation, 64):
        output = model(**batch)
        losses += float(output.loss) * len(batch["labels"])
        right += int((output.logits.argmax(-1) == batch["labels"]).sum())
    return losses / len(data.validation), right / len(data.validation)


@torch.no_grad()
def perturbed(
    model: nn.Module, data: TaskData, layers: list[LrLoraLinear], seed: int
) -> dict[str, float]:
    """Held-out loss with noise on one kind of parameters at a time."""
    found = {}
    for label, (container, size) in PERTURBED.items():
        draw = torch.Generator().manual_seed(seed)
        kept = []
        for layer in layers:
            weight = getattr(layer, container)["default"].weight
            kept.append((weight, weight.clone()))
            scale = size * weight.square().mean().sqrt()
            weight += scale * torch.randn(weight.shape, generator=draw)
        found[label] = held_out(model, data)[0]
        for weight, original in kept:
            weight.copy_(original)
    return found


def spread(values: list[float | None], digits: int) -> str:
    """Mean and standard deviation over the seeds that did not diverge, and how many did."""
    finite = [value for value in values if value is not None]
    diverged = len(values) - len(finite)
    if not finite:
        return f"{diverged} diverged"
    text = f"{statistics.fmean(finite):.{digits}f}"
    if len(finite) > 1:
        text += f" ± {statistics.stdev(finite):.{digits}f}"
    return f"{text}, {diverged} diverged" if diverged else text


def summary(arguments: argparse.Namespace) -> str:
    """All tables, of finished runs with the settings asked for."""
    done = finished(arguments.out)
    lines = []
    for group in arguments.groups:
        title, variants = GROUPS[group]
        lines += [f"## {title[0].upper()}{title[1:]}", ""]
        lines += ["| setting | held-out loss | accuracy | parameters | factorised | seeds |"]
        lines += ["|---|---|---|---|---|---|"]
        for label, options in variants.items():
            rows = of_settings(done, arguments, options)
            if rows:
                share = rows[0]["factorised"]
                shares = [r["factorised"] for r in rows if r["factorised"] is not None]
                mean = "" if share is None else f"{statistics.fmean(shares):.0%}"
                lines += [
                    f"| {label} | {spread([r['loss'] for r in rows], 3)} "
                    f"| {spread([100 * r['accuracy'] for r in rows], 1)} "
                    f"| {rows[0]['parameters']:,} | {mean} | {len(rows)} |"
                ]
        lines += [""]
    lines += ["## Noise on the trained parameters (table 21)", ""]
    lines += [
        "| noise, relative to the root mean square | held-out loss | change |",
        "|---|---|---|",
    ]
    rows = of_settings(done, arguments, DEFAULT)
    for label in PERTURBED if rows else ():
        losses = [r["perturbed"][label] for r in rows]
        changes = [r["perturbed"][label] - r["loss"] for r in rows if r["loss"] is not None]
        change = f"{statistics.fmean(changes):+.3f}" if changes else ""
        lines += [f"| {label} | {spread(losses, 3)} | {change} |"]
    return "\n".join(lines)


def of_settings(
    done: Mapping[Cell, dict[str, Any]], arguments: argparse.Namespace, options: Options
) -> list[dict[str, Any]]:
    """Finished runs of one setting, by seed."""
    text = json.dumps(options, sort_keys=True)
    wanted = [cell_of(arguments, text, seed) for seed in arguments.seeds]
    return [done[cell] for cell in wanted if cell in done]


def main() -> None:
    """Run what is missing, or print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--train", help="a .tsv file of sentences and labels")
    parser.add_argument("--groups", nargs="+", choices=list(GROUPS), default=list(GROUPS))
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--depth", type=int, default=3, help="keep the encoder's first layers only")
    parser.add_argument("--limit", type=int, help="stop after so many runs")
    parser.add_argument("--summary", action="store_true")
    arguments = parser.parse_args()
    if arguments.summary:
        print(summary(arguments))
        return
    if arguments.train is None:
        parser.error("--train is needed to run anything")
    task = ClassificationTask(
        model=arguments.model,
        train=arguments.train,
        test=arguments.train,
        max_length=24,
        validation_rows=256,
        max_test=1,
    )
    data, done = task.load(), finished(arguments.out)
    source = {
        "model": model_fingerprint(AutoModel.from_pretrained(arguments.model)),
        "data": hashlib.sha256(Path(arguments.train).read_bytes()).hexdigest()[:16],
    }
    if any(row.get("source", source) != source for row in done.values()):
        raise SystemExit(f"{arguments.out} was made with another model or other data; name a new.")
    wanted = [cell for cell in cells(arguments) if cell not in done][: arguments.limit]
    for number, cell in enumerate(wanted, 1):
        row = train(task, data, cell)
        if not math.isfinite(row["loss"]):
            row["loss"] = None
        print(
            f"{number} of {len(wanted)}: {cell.options} seed {cell.seed}: {row['loss']}", flush=True
        )
        facts = {"versions": versions(), "hardware": hardware(), "commit": git_commit()}
        facts["source"] = source
        with arguments.out.open("a") as file:
            file.write(json.dumps({"cell": asdict(cell), **row, **facts}) + "\n")


if __name__ == "__main__":
    main()
