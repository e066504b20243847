"""What a run folder may hold beside its record, with made-up numbers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from rankwise.dynamic.events import RankEvent, RankMove
from rankwise.plan import RankPlan
from rankwise.run_files import (
    LANDSCAPE_FILE,
    TRACKING_FILE,
    Landscape,
    TrackedModule,
    TrackedStep,
    Tracking,
    save_run_file,
)


def save_tracking(folder: Path, names: Sequence[str]) -> Tracking:
    """Gradients at steps 0, 5 and 10."""
    generator = torch.Generator().manual_seed(5)

    def number() -> float:
        return 1 + 30 * float(torch.rand(1, generator=generator))

    tracking = Tracking(
        5,
        [
            TrackedStep(
                step, {n: TrackedModule(number(), number(), step + 3, number()) for n in names}
            )
            for step in (0, 5, 10)
        ],
    )
    save_run_file(tracking, folder / TRACKING_FILE)
    return tracking


def save_events(folder: Path, plan: RankPlan) -> list[RankEvent]:
    """Two events after which the ranks are the plan's; the module of the largest grew at both."""
    names = sorted(plan.modules, key=lambda name: -plan.modules[name].rank)
    first, second = names[0], names[1]
    final, other = plan.modules[first].rank, plan.modules[second].rank
    events = [
        RankEvent(
            step=step,
            moves=[
                RankMove(first, before=up - 1, after=up, reason="5.00% of all estimates"),
                RankMove(second, before=down + 1, after=down, reason="less", discarded=0.25),
            ],
            used=900 + step,
            budget=1000,
            batches=3,
        )
        for step, up, down in ((3, final - 1, other + 1), (7, final, other))
    ]
    text = json.dumps([asdict(event) for event in events])
    (folder / "rank_events.json").write_text(text, encoding="utf-8")
    return events


def save_landscape(folder: Path, points: int = 5) -> Landscape:
    """A bowl with one corner that is not finite."""
    at = [-1 + 2 * i / (points - 1) for i in range(points)]
    loss: list[list[float | None]] = [[2.5 + a * a + 2 * b * b for a in at] for b in at]
    loss[0][0] = None
    landscape = Landscape(
        at=at,
        loss=loss,
        normalisation="norm",
        seed=3,
        parameters=1234,
        parameter_norm=5.625,
        direction_norms=(5.625, 5.625),
        cosine=1e-9,
        batches=2,
        batch_size=4,
        tokens=777,
        data_fingerprint="abc",
        model_fingerprint="0123456789abcdef",
        forward_passes=points**2 * 2,
        seconds=1.5,
        versions={"torch": "2.13.0"},
    )
    save_run_file(landscape, folder / LANDSCAPE_FILE)
    return landscape


def make_analysis(names: Sequence[str]) -> dict[str, Any]:
    """An `analysis.json` as a training run of LR-LoRA writes it."""
    generator = torch.Generator().manual_seed(6)

    def number() -> float:
        return float(torch.rand(1, generator=generator)) + 0.5

    steps = [
        {
            "step": step,
            "modules": {
                name: {
                    "stable_rank": number() * 9,
                    "stable_rank_without_constant": number() * 9,
                    "f0": number() * 1e-3,
                    "u_min": -number(),
                    "u_max": number(),
                    "grid_min": -3.0,
                    "grid_max": 3.0,
                    "factorised": place % 2 == 0 if step else None,
                }
                for place, name in enumerate(names)
            },
        }
        for step in (0, 10)
    ]
    functions = [
        {
            "step": step,
            "module": name,
            "u": [-1.0, -0.5, 0.0, 0.5, 1.0],
            "f": [None, *(number() * (step + 1) for _ in range(4))],
            "histogram": {"edges": [-1.0, -0.25, 0.25, 1.0], "counts": [10 + step, 80, 7]},
        }
        for step in (0, 10)
        for name in names[:2]
    ]
    conditioning = {
        name: {"condition_number": number() * 1e6, "directions_at_1e-6": 5} for name in names
    }
    return {
        "schema": 1,
        "steps": steps,
        "functions": functions,
        "conditioning": conditioning,
        "spectra": {},
    }


def save_lr_adapter(folder: Path, plan: RankPlan, points: int = 6, **config: Any) -> Path:
    """An LR-LoRA adapter of the plan's ranks with random parameters, as PEFT writes it."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(2)
    tensors = {}
    for name, module in plan.modules.items():
        key = f"base_model.model.{name}.lrlora"
        shapes = {
            "A": (module.rank, module.d_in),
            "B": (module.d_out, module.rank),
            "amplitude": (points,),
            "bandwidth": (points,),
        }
        for part, shape in shapes.items():
            tensors[f"{key}_{part}.weight"] = torch.randn(shape, generator=generator) * 0.3
    save_file(tensors, folder / "adapter_model.safetensors")
    values = {
        "peft_type": "LRLORA",
        "r": plan.r_ref,
        "alpha": 2 * plan.r_ref,
        "points": points,
        "target_modules": list(plan.modules),
        "rank_pattern": {name: module.rank for name, module in plan.modules.items()},
        "base_model_name_or_path": "tiny",
    }
    (folder / "adapter_config.json").write_text(json.dumps(values | config), encoding="utf-8")
    return folder


def make_results(labels: Sequence[str] = ("RaLoRA", "slow <b>one</b>"), seeds: int = 3) -> Any:
    """A `results.json` as `rankwise compare` writes it: LoRA and others at two budgets."""
    rows = [
        _result_row(task, rank, label, place, seeds)
        for task in ("cola", "sums")
        for rank in (2, 8)
        for place, label in enumerate(("lora", *labels, "MoRA"))
    ]
    return {
        "schema_version": 1,
        "title": "small comparison",
        "reference": "lora",
        "rows": rows,
        "mean_ranks": {"2": {"lora": 2.0}},
        "cells": 40,
        "finished": 40,
        "commits": ["abc"],
        "hardware": ["a processor"],
        "hours": 1.25,
        "experiment": {"output": "out"},
    }


def _result_row(task: str, rank: int, label: str, place: int, seeds: int) -> dict[str, Any]:
    row: dict[str, Any] = {
        "task": task,
        "metric": "matthews" if task == "cola" else "loss",
        "lower_is_better": task != "cola",
        "rank": rank,
        "label": label,
        "method": label.lower(),
        "ours": place == 1,
        "budget": 1000 * rank,
        "wanted": seeds,
        "status": "finished",
        "seconds": {"train": 1.5},
    }
    if label == "MoRA":
        return row | {"status": "not available: no code", "wanted": 0, "budget": None}
    mean = 0.5 + 0.0625 * place + rank / 256
    row |= {
        "parameters": 1000 * rank + place,
        "trainable": 1000 * rank + place,
        "matched": place != 2,
        "learning_rate": 0.001,
        "at_edge": place == 2,
        "values": {str(seed): mean + seed / 64 for seed in range(seeds)},
        "summary": _summary(mean, 0.03125, seeds),
        "curve": [[0, 0.5], [10, mean]],
    }
    if place:
        row["against"] = {
            "method": label,
            "baseline": "lora",
            "difference": _summary(0.0625 * place, 0.015625, seeds),
            "t_p": 0.004,
            "wilcoxon_p": 0.25,
            "holm_p": 0.008 if place == 1 else 0.21,
            "wins": seeds,
        }
        row["holm_all"] = 0.01
    return row


def _summary(mean: float, half: float, count: int) -> dict[str, Any]:
    alone = count < 2
    return {
        "mean": mean,
        "deviation": None if alone else half / 2,
        "low": None if alone else mean - half,
        "high": None if alone else mean + half,
        "count": count,
    }
