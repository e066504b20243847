"""Do ranks follow a shift of the training text, and does it help? Dynamic and static ranks.

    python scripts/distribution_shift.py run gsm8k/train.jsonl --out shift.jsonl
    python scripts/distribution_shift.py summary shift.jsonl

Half of the steps train on the first text (a .jsonl file with "question" and "answer", or "text"),
the other half on Python's standard library. The dynamic run starts from the static plan for the
first text, by GARD or with `--method water-fill`; all plans have the parameters of uniform LoRA.
Every finished part is a line of JSON in the output; a run that was stopped goes on with what is
missing.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import rankwise as rw
from rankwise.experiments.smollm2 import smollm2_folder
from rankwise.experiments.statistics import compare_with, summarise
from rankwise.experiments.stdlib_text import write_stdlib_text
from rankwise.files import read_json_lines, write_text
from rankwise.methods import Method
from rankwise.provenance import git_commit, hardware, versions
from rankwise.training.config import DataConfig
from rankwise.training.data import TokenData, load_token_data
from rankwise.training.evaluate import held_out_loss

LABELS = {"gard": "GARD", "water-fill": "water-fill"}
UNIFORM = "uniform LoRA"
TEXTS = ("first", "second")
Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Settings:
    """One comparison; `model` is a folder, by default SmolLM2-135M-Instruct's."""

    model: str = ""
    steps: int = 60
    rows: int = 1
    length: int = 128
    r: int = 4
    learning_rate: float = 5e-4
    warmup: int = 4
    interval: int = 10
    window: int = 8
    energy: float = 0.9
    delta_max: int = 2
    beta: float = 0.5
    profile_batches: int = 8
    held_out: int = 16
    method: str = "gard"

    @property
    def shift(self) -> int:
        """Steps on the first text."""
        return self.steps // 2

    @property
    def parts(self) -> tuple[str, str, str]:
        """The runs that are compared: dynamic, static, uniform."""
        label = LABELS[self.method]
        return f"dynamic {label}", f"static {label}", UNIFORM

    def make_method(self) -> Method:
        """The method of both the dynamic and the static run."""
        if self.method == "water-fill":
            return rw.WaterFill(r=self.r, r_min=1, r_max=2 * self.r)
        return rw.Gard(r=self.r, r_max=2 * self.r, energy=self.energy, batches=self.profile_batches)

    def options(self) -> rw.DynamicOptions:
        """When and how far ranks move."""
        return rw.DynamicOptions(
            interval=self.interval,
            window=self.window,
            delta_max=self.delta_max,
            beta=self.beta,
        )


class Texts:
    """Both texts, packed into rows."""

    def __init__(self, settings: Settings, first: Path, folder: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(settings.model)
        library = write_stdlib_text(folder, max_bytes=1_000_000)
        plain = folder / "first.jsonl"
        write_text(plain, "".join(json.dumps({"text": t}) + "\n" for t in _texts(first)))
        sources = {
            "first": {"train": str(plain)},
            "second": {"train": str(library.train), "held_out": str(library.held_out)},
        }
        self._settings = settings
        self._data: dict[str, TokenData] = {
            text: load_token_data(
                DataConfig(
                    **files,
                    max_length=settings.length,
                    packing=True,
                    max_held_out=settings.held_out,
                ),
                tokenizer,
                seed=0,
            )
            for text, files in sources.items()
        }

    def batches(self, text: str, seed: int) -> Iterator[Batch]:
        """Training batches in an order of the seed."""
        return iter(self._data[text].loader(self._settings.rows, seed=seed))

    def losses(self, model: torch.nn.Module, step: int) -> dict[str, float]:
        """Held-out loss on each text."""
        return {
            text: held_out_loss(model, data.held_out_loader(4), step=step).loss
            for text, data in self._data.items()
        }


def _texts(path: Path) -> Iterator[str]:
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        yield row["text"] if "text" in row else f"{row['question']}\n{row['answer']}"


def plans_of(settings: Settings, texts: Texts, model: PreTrainedModel, seed: int) -> dict[str, Any]:
    """The static plan for each text, of the untrained model, and where the losses start."""
    found: dict[str, Any] = {"held_out": texts.losses(model, 0)}
    for text in TEXTS:
        profile = rw.profile_gradients(
            model,
            # another order than training's, so that no batch is seen by both
            texts.batches(text, 1000 + seed),
            batches=settings.profile_batches,
            statistics=settings.make_method().statistics,
            progress=False,
        )
        found[text] = asdict(settings.make_method().plan(profile))
    return found


def train(
    settings: Settings,
    texts: Texts,
    model: PreTrainedModel,
    plan: rw.RankPlan,
    seed: int,
    *,
    dynamic: bool,
) -> dict[str, Any]:
    """One run: losses, ranks at the shift and at the end, and what each event moved."""
    torch.manual_seed(seed)
    adapted = rw.attach(model, plan).train()
    parameters = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / settings.warmup)
    )
    ranks = None
    if dynamic:
        ranks = rw.DynamicRanks(
            adapted, plan, settings.make_method(), settings.options(), optimizer=optimizer
        )
    orders = {text: texts.batches(text, seed) for text in TEXTS}
    outcome: dict[str, Any] = {"train": [], "held_out": {}, "ranks": {"start": _ranks(plan)}}
    began = time.perf_counter()
    measured = 0.0
    for step in range(1, settings.steps + 1):
        batch = next(orders[TEXTS[step > settings.shift]])
        if ranks is None:
            loss = adapted(**batch, use_cache=False).loss
            loss.backward()
        else:
            with ranks.observe():
                loss = adapted(**batch, use_cache=False).loss
                loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if ranks is not None:
            ranks.step()
        schedule.step()
        optimizer.zero_grad()
        outcome["train"].append(float(loss.detach()))
        if step in (settings.shift, settings.steps):
            place = "end" if step == settings.steps else "shift"
            outcome["ranks"][place] = _ranks(plan if ranks is None else ranks.plan)
            started = time.perf_counter()
            outcome["held_out"][place] = texts.losses(adapted, step)
            measured += time.perf_counter() - started
    outcome["seconds"] = round(time.perf_counter() - began - measured, 2)
    outcome["parameters"] = (plan if ranks is None else ranks.plan).parameters
    outcome["moved"] = [
        [event.step, sum(abs(m.after - m.before) for m in event.moves)]
        for event in ([] if ranks is None else ranks.events)
    ]
    adapted.unload()
    return outcome


def _ranks(plan: rw.RankPlan) -> dict[str, int]:
    return {name: module.rank for name, module in plan.modules.items()}


def run(settings: Settings, first: Path, out: Path, seeds: int) -> None:
    """Add to the output what it does not hold yet."""
    done = {(line["seed"], line["part"]): line for line in _lines(out, settings)}
    facts = {"hardware": hardware(), "versions": versions(), "commit": git_commit()}
    with tempfile.TemporaryDirectory() as scratch:
        texts = Texts(settings, first, Path(scratch))
        model = AutoModelForCausalLM.from_pretrained(settings.model, dtype=torch.float32)
        for seed in range(seeds):
            for part in ("plans", *settings.parts):
                if (seed, part) in done:
                    continue
                if part == "plans":
                    found = plans_of(settings, texts, model, seed)
                else:
                    plan = _plan(settings, model, part, done[seed, "plans"]["first"])
                    found = train(
                        settings, texts, model, plan, seed, dynamic=part == settings.parts[0]
                    )
                line = {"seed": seed, "part": part, **found, "settings": asdict(settings), **facts}
                with out.open("a", encoding="utf-8") as stream:
                    stream.write(json.dumps(line) + "\n")
                done[seed, part] = line
                logging.info("seed %d, %s done", seed, part)


def _plan(
    settings: Settings, model: PreTrainedModel, part: str, static: Mapping[str, Any]
) -> rw.RankPlan:
    if part == UNIFORM:
        method: Method = rw.Lora(r=settings.r)
        return method.plan(rw.find_targets(model))  # type: ignore[arg-type]
    modules = {name: rw.ModulePlan(**module) for name, module in static["modules"].items()}
    plain = {key: value for key, value in static.items() if key != "block_options"}
    return rw.RankPlan(**{**plain, "modules": modules})


def _lines(out: Path, settings: Settings | None = None) -> list[dict[str, Any]]:
    """What was done, with these settings if any are given."""
    found = read_json_lines(out)
    for line in found:
        if settings is not None and line["settings"] != asdict(settings):
            raise SystemExit(f"{out} was made with other settings: {line['settings']}; name a new.")
    return found


def summary(out: Path) -> None:
    """Print tables of losses, of paired differences and of how ranks moved, as Markdown."""
    lines = _lines(out)
    settings = Settings(**lines[0]["settings"])
    plans = {line["seed"]: line for line in lines if line["part"] == "plans"}
    runs = {m: {ln["seed"]: ln for ln in lines if ln["part"] == m} for m in settings.parts}
    seeds = sorted(set.intersection(set(plans), *(set(found) for found in runs.values())))
    print(f"{len(seeds)} seeds; {json.dumps(lines[0]['settings'])}\n")
    _losses(settings, runs, seeds)
    _moves(settings, plans, runs, seeds)


def _losses(
    settings: Settings, runs: Mapping[str, Mapping[int, dict[str, Any]]], seeds: list[int]
) -> None:
    second = slice(settings.shift, None)
    dynamic = settings.parts[0]
    metrics = {
        "held-out loss, first text, at the shift": lambda ln: ln["held_out"]["shift"]["first"],
        "training loss after the shift": lambda ln: statistics.fmean(ln["train"][second]),
        "held-out loss, second text, at the end": lambda ln: ln["held_out"]["end"]["second"],
        "held-out loss, first text, at the end": lambda ln: ln["held_out"]["end"]["first"],
        "seconds of training": lambda ln: ln["seconds"],
        "parameters": lambda ln: ln["parameters"],
    }
    _row("", *settings.parts)
    _row(*["---"] * 4)
    cells: dict[str, dict[str, dict[str, float]]] = {}
    for label, metric in metrics.items():
        cells[label] = {m: {str(s): metric(runs[m][s]) for s in seeds} for m in settings.parts}
        found = [summarise(list(values.values())) for values in cells[label].values()]
        digits = 4 if "loss" in label else 0
        _row(label, *(f"{v.mean:,.{digits}f} (sd {v.deviation:.{digits}f})" for v in found))
    print(f"\nPaired differences, other minus {dynamic}; above 0, {dynamic} is better:\n")
    _row("", "against", "difference", "95 % interval", "p (t)", "p (Holm)", "dynamic better in")
    _row(*["---"] * 7)
    for label in list(metrics)[:4]:
        for found in compare_with(dynamic, cells[label], lower_is_better=True):
            d = found.difference
            better = sum(
                cells[label][dynamic][s] < value for s, value in cells[label][found.method].items()
            )
            _row(
                label, found.method, f"{d.mean:+.4f}", f"{d.low:+.4f} to {d.high:+.4f}",
                f"{found.t_p:.3f}", f"{found.holm_p:.3f}", f"{better} of {d.count}",
            )  # fmt: skip


def _moves(
    settings: Settings,
    plans: Mapping[int, dict[str, Any]],
    runs: Mapping[str, Mapping[int, dict[str, Any]]],
    seeds: list[int],
) -> None:
    print("\nMean distance of ranks (mean over modules of the absolute difference), Spearman:\n")
    dynamic, fixed, _ = settings.parts
    _row("ranks of", f"to {fixed}, first text", f"to {fixed}, second text")
    _row(*["---"] * 3)
    static = {
        text: {s: {n: m["rank"] for n, m in plans[s][text]["modules"].items()} for s in seeds}
        for text in TEXTS
    }
    rows = {f"{fixed}, {text} text": static[text] for text in TEXTS}
    for place in ("shift", "end"):
        found = {s: runs[dynamic][s]["ranks"][place] for s in seeds}
        rows[f"{dynamic} at the {place}"] = found
    for label, ranks in rows.items():
        _row(label, *(_distance(ranks, static[text], seeds) for text in TEXTS))
    print("\nRanks moved at each event, mean over seeds:\n")
    moved: dict[int, list[int]] = {}
    for seed in seeds:
        for step, count in runs[dynamic][seed]["moved"]:
            moved.setdefault(step, []).append(count)
    _row("after step", *moved)
    _row(*["---"] * (1 + len(moved)))
    _row("ranks moved", *(f"{statistics.fmean(counts):.1f}" for counts in moved.values()))
    print(f"\nThe text changes after step {settings.shift}.")


def _distance(
    ranks: Mapping[int, Mapping[str, int]], to: Mapping[int, Mapping[str, int]], seeds: list[int]
) -> str:
    distances, relations = [], []
    for seed in seeds:
        names = sorted({*ranks[seed], *to[seed]})
        a = [ranks[seed].get(name, 0) for name in names]
        b = [to[seed].get(name, 0) for name in names]
        distances.append(statistics.fmean(abs(x - y) for x, y in zip(a, b, strict=True)))
        if len(set(a)) > 1 and len(set(b)) > 1:
            relations.append(float(spearmanr(a, b).statistic))
    relation = f"{statistics.fmean(relations):+.2f}" if relations else "constant"
    return f"{statistics.fmean(distances):.2f}, {relation}"


def _row(*cells: object) -> None:
    print("| " + " | ".join(str(cell) for cell in cells) + " |")


def main(arguments: list[str] | None = None) -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True, dest="command")
    one = commands.add_parser("run", help="train what is missing")
    one.add_argument("first", type=Path, help=".jsonl with question and answer, or text")
    one.add_argument("--out", type=Path, required=True)
    one.add_argument("--seeds", type=int, default=5)
    for entry in fields(Settings):
        kind = type(entry.default)
        one.add_argument(f"--{entry.name.replace('_', '-')}", type=kind, default=entry.default)
    two = commands.add_parser("summary", help="print the tables")
    two.add_argument("out", type=Path)
    chosen = vars(parser.parse_args(arguments))
    if chosen.pop("command") == "summary":
        summary(chosen["out"])
        return
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    logging.getLogger("rankwise").setLevel(logging.WARNING)
    first, out, seeds = (chosen.pop(name) for name in ("first", "out", "seeds"))
    chosen["model"] = chosen["model"] or str(smollm2_folder())
    run(Settings(**chosen), first, out, seeds)


if __name__ == "__main__":
    main()
