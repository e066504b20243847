"""Small profiles, plans and runs for the tests of the report, and a reader of its pages."""

from __future__ import annotations

import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from rankwise.plan import RankPlan
from rankwise.profiling.profile import GradientProfile, ModuleStatistics, ProfileProvenance
from rankwise.records import HeldOutLoss, RunRecord, TrainLoss

KINDS = {"attn.q_proj": (64, 64), "attn.k_proj": (64, 32), "mlp.down_proj": (128, 64)}


def make_profile(
    layers: int = 2,
    prefix: str = "model.layers",
    model: str = "tiny",
    outside: bool = True,
    more: bool = False,
    size: int = 1,
) -> GradientProfile:
    """A profile of made-up numbers; `more` adds Gram matrices, Fisher information, convergence."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        f"{prefix}.{i}.{k}": (size * d_in, size * d_out)
        for i in range(layers)
        for k, (d_in, d_out) in KINDS.items()
    }
    if outside:
        shapes["model.projector"] = (64, 64)
    modules, spectra = {}, {}
    for name, (d_in, d_out) in shapes.items():
        values = torch.rand(min(d_in, d_out), generator=generator, dtype=torch.float64)
        spectra[name] = values.sort(descending=True).values
        modules[name] = ModuleStatistics(
            d_in=d_in,
            d_out=d_out,
            gradient_norm=float(spectra[name].norm()),
            sensitivity=float(torch.rand(1, generator=generator)) * 1e-4 + 1e-6,
            batches=4,
            rows=512,
            fisher=float(torch.rand(1, generator=generator)) * 1e-6 if more else None,
        )
    gram = {
        name: (g := torch.rand(4, 9, generator=generator, dtype=torch.float64)) @ g.T
        for name in shapes
    }
    convergence = {
        name: torch.rand(3, generator=generator, dtype=torch.float64).sort().values * 30
        for name in shapes
    }
    provenance = ProfileProvenance(
        model=model,
        model_fingerprint="0123456789abcdef",
        data_fingerprint="fedcba9876543210",
        batches=4,
        batch_sizes=[2, 2, 2, 2],
        tokens=500,
        dtype="float32",
        train_mode=False,
        seconds=1.25,
        versions={"torch": "2.13.0"},
    )
    return GradientProfile(
        modules,
        spectra,
        provenance,
        gram=gram if more else None,
        convergence=convergence if more else None,
    )


def make_record(plan: RankPlan, **changes: Any) -> RunRecord:
    record = RunRecord(
        method=plan.method,
        model="tiny",
        model_fingerprint="0123456789abcdef",
        seed=7,
        trainable_parameters=plan.parameters,
        ranks={name: module.rank for name, module in plan.modules.items()},
        blocks={name: module.blocks for name, module in plan.modules.items()},
        train_loss=[TrainLoss(step, 3.0 - 0.0123 * step) for step in range(1, 11)],
        held_out=[HeldOutLoss(step, 2.9 - 0.0077 * step, 4064) for step in (0, 5, 10)],
        seconds={"profile": 1.375, "train": 71.25, "evaluate": 3.5},
        peak_memory_mib=3010.4,
        train_tokens=5120,
        data={"held_out": {"sequences": 32, "fingerprint": "99ff"}},
        config={"dtype": "float32", "training": {"learning_rate": 2e-3}, "model": "secret/place"},
        versions={"torch": "2.13.0"},
        hardware={"processor": "a processor", "cores": 2, "memory_gib": 24},
        commit=None,
        finished="2026-01-01T00:00:00+00:00",
    )
    return replace(record, **changes)


def save_run(folder: Path, plan: RankPlan, profile: GradientProfile | None, **changes: Any) -> Path:
    make_record(plan, **changes).save(folder / "record.json")
    plan.save(folder / "plan.json")
    if profile is not None:
        profile.save(folder / "profile")
    return folder


def save_adapter(folder: Path, plan: RankPlan, **config: Any) -> Path:
    """An adapter of the plan's shape with random factors, as PEFT writes it."""
    folder.mkdir(parents=True)
    kind = plan.adapter
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name, module in plan.modules.items():
        n, r = module.blocks, module.rank
        a = torch.randn(n, r, module.d_in // n, generator=generator)
        b = torch.randn(n, module.d_out // n, r, generator=generator) * 0.01
        key = f"base_model.model.{name}.{kind}"
        tensors[f"{key}_A.weight"] = a if kind == "ralora" else a[0]
        tensors[f"{key}_B.weight"] = b if kind == "ralora" else b[0]
    save_file(
        {key: tensor.contiguous() for key, tensor in tensors.items()},
        folder / "adapter_model.safetensors",
    )
    values: dict[str, Any] = {
        "peft_type": kind.upper(),
        "r": plan.r_ref,
        ("alpha" if kind == "ralora" else "lora_alpha"): plan.alpha,
        "base_model_name_or_path": "/secret/place/tiny",
    }
    (folder / "adapter_config.json").write_text(json.dumps(values | config))
    return folder


class Page(HTMLParser):
    """Tags with their attributes, and the text of scripts and styles."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.raw: list[tuple[str, dict[str, str | None], str]] = []
        self.text = ""
        self.feed(self.source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self.raw.append((tag, dict(attrs), ""))

    def handle_data(self, data: str) -> None:
        if self.raw and self.cdata_elem is not None:
            tag, attrs, text = self.raw[-1]
            self.raw[-1] = (tag, attrs, text + data)
        else:
            self.text += data

    def data(self, name: str) -> Any:
        return next(json.loads(text) for _, attrs, text in self.raw if attrs.get("id") == name)

    @property
    def values(self) -> list[float]:
        return [float(attrs["value"] or "") for tag, attrs in self.tags if tag == "data"]


def numbers(value: Any) -> set[float]:
    if isinstance(value, dict):
        return set().union(*(numbers(item) for item in value.values()))
    if isinstance(value, list):
        return set().union(*(numbers(item) for item in value))
    if isinstance(value, bool) or not isinstance(value, int | float):
        return set()
    return {float(value)}
