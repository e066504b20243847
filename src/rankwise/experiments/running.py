"""One cell: adapt, train, evaluate, record; the same path for every method."""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from rankwise.experiments.bench import Bench, Loaded, on_device, training_batches
from rankwise.experiments.cell_records import CellRecord, EvaluationRecord, SizeRecord
from rankwise.experiments.cells import Cell
from rankwise.experiments.config import TrainingSettings
from rankwise.experiments.peak import PeakMemory
from rankwise.experiments.sizing import Adapted, Job, Size
from rankwise.profiling import GradientProfile
from rankwise.profiling.loss import count_labels
from rankwise.provenance import git_commit, hardware, versions

DATA_BATCHES = 8
"""Batches for initialisations that look at data (EVA, LoRA-GA), where no profile setting says."""

COSINE_FLOOR = 0.1
TRAIN_LOSS_POINTS = 20


@dataclass
class Curves:
    """What training leaves behind."""

    validation: list[EvaluationRecord] = field(default_factory=list)
    train_loss: list[tuple[int, float]] = field(default_factory=list)
    tokens: int = 0
    train_seconds: float = 0.0
    evaluate_seconds: float = 0.0
    diverged_at: int | None = None


def run_cell(cell: Cell, bench: Bench) -> CellRecord:
    """Carry out one cell.

    The seed draws the head, the adapters, dropout and the order of the data, each from a state of
    its own, so that what one method draws does not move what another sees.

    Raises:
        RankwiseError: The method, the model or the data do not fit.
    """
    loaded, base = bench.data(cell.task), bench.base(cell.task, cell.seed)
    memory = PeakMemory(bench.device)
    profile = bench.profile(cell)
    started = time.perf_counter()
    adapted, job = _adapt(cell, bench, profile)
    prepare = time.perf_counter() - started
    trainable, head = _count(adapted.model, job.keep)
    torch.manual_seed(cell.seed)
    curves = Curves()
    if cell.method.contestant.trains:
        _train(cell, adapted, loaded, curves, bench.device)
    else:
        _evaluate(cell, adapted.model, loaded, curves, 0)
    test = None
    if cell.phase == "final" and curves.diverged_at is None:
        test = _test(cell, adapted.model, loaded, curves)
    size = _final_size(adapted, job)
    return CellRecord(
        **_identity(cell),
        size=None if size is None else _size_record(size),
        trainable_parameters=trainable,
        head_parameters=head,
        ranks={} if size is None else dict(size.values),
        validation=curves.validation,
        test=test,
        train_loss=curves.train_loss,
        diverged_at=curves.diverged_at,
        tokens=curves.tokens,
        seconds={
            "load": round(base.seconds + loaded.seconds, 3),
            "profile": round(profile.provenance.seconds, 3) if profile else 0.0,
            "prepare": round(prepare, 3),
            "train": round(curves.train_seconds, 3),
            "evaluate": round(curves.evaluate_seconds, 3),
        },
        peak_memory_mib=memory.peak(),
        memory_before_mib=memory.before,
        model=base.name,
        model_fingerprint=base.fingerprint,
        data_fingerprint=loaded.fingerprint,
        rows=loaded.rows,
        notes=adapted.driver.notes(),
        finished=datetime.now(UTC).isoformat(timespec="seconds"),
        **_place(),
    )


def _identity(cell: Cell) -> dict[str, Any]:
    """What the record says of the cell before it is run."""
    return {
        "name": cell.name,
        "phase": cell.phase,
        "task": cell.task.name,
        "method": cell.method.name,
        "label": cell.method.label,
        "budget_rank": cell.rank,
        "seed": cell.seed,
        "learning_rate": cell.learning_rate,
        "steps": cell.steps,
        "config_hash": cell.config_hash,
        "settings": cell.settings,
        "metric": cell.task.task.metric,
        "lower_is_better": cell.task.task.lower_is_better,
    }


@cache
def _place() -> dict[str, Any]:
    """Where this process runs; asked once."""
    return {"commit": git_commit(), "versions": versions(), "hardware": hardware()}


def _adapt(cell: Cell, bench: Bench, profile: GradientProfile | None) -> tuple[Adapted, Job]:
    task, base = cell.task.task, bench.base(cell.task, cell.seed)
    cost = sum(shape.rank_cost for shape in base.targets.values())
    batches = cell.task.profile.batches or DATA_BATCHES
    job = Job(
        base.fresh(),
        base.targets,
        (cell.rank or 1) * cost,
        _Lazy(lambda: bench.first_batches(cell.task, cell.seed, batches)),
        cell.steps,
        keep=task.keep,
        task_type=task.task_type,
        seed=cell.seed,
    )
    torch.manual_seed(cell.seed)
    adapted = cell.method.contestant.adapt(job, profile)
    adapted.model.to(bench.device)
    return adapted, job


class _Lazy:
    """Batches that are made only if somebody asks for them."""

    def __init__(self, make: Any) -> None:
        self._make = make

    def __iter__(self) -> Iterator[Any]:
        return iter(self._make())


def _train(
    cell: Cell, adapted: Adapted, loaded: Loaded, curves: Curves, device: torch.device
) -> None:
    """Optimizer steps and evaluations; stops where the loss is no longer finite."""
    settings, model = cell.task.training, adapted.model
    assert cell.learning_rate is not None
    optimizers = make_optimizers(adapted, cell.learning_rate, settings, cell.task.task.keep)
    rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    batches = training_batches(loaded.data, settings.batch_size, cell.seed)
    points = evaluation_points(cell.steps, settings.evaluations)
    report = max(1, cell.steps // TRAIN_LOSS_POINTS)
    extra = _extra_arguments(model)
    losses: list[float] = []
    started = time.perf_counter()
    model.train()
    for step in range(1, cell.steps + 1):
        factor = rate_factor(step, cell.steps, settings)
        for optimizer, initial in zip(optimizers, rates, strict=True):
            for group, rate in zip(optimizer.param_groups, initial, strict=True):
                group["lr"] = rate * factor
        accumulated = [
            on_device(next(batches), device) for _ in range(settings.gradient_accumulation)
        ]
        loss = _backward(adapted, accumulated, extra)
        losses.append(loss)
        if not math.isfinite(loss):
            curves.diverged_at = step
            break
        _step(optimizers, settings.max_grad_norm)
        adapted.driver.after_step(step)
        for optimizer in optimizers:
            optimizer.zero_grad()
        curves.tokens += sum(_size_of(batch) for batch in accumulated)
        if step % report == 0 or step == cell.steps:
            curves.train_loss.append((step, sum(losses) / len(losses)))
            losses = []
        if step == cell.steps:
            adapted.driver.finish()
        if step in points:
            curves.train_seconds += time.perf_counter() - started
            _evaluate(cell, model, loaded, curves, step)
            if curves.diverged_at is not None:
                return
            started = time.perf_counter()
    curves.train_seconds += time.perf_counter() - started


def _backward(adapted: Adapted, batches: list[dict[str, Any]], extra: dict[str, Any]) -> float:
    """Gradients of the mean loss over all labelled items of the step."""
    base = _inner(adapted.model)
    items = [count_labels(base, batch["labels"]) for batch in batches]
    total = 0.0
    for batch, count in zip(batches, items, strict=True):
        share = count / sum(items)
        with adapted.driver.observe():
            loss = adapted.model(**batch, **extra).loss
            (loss * share if len(batches) > 1 else loss).backward()
        total += float(loss.detach()) * share
    return total


def _step(optimizers: list[Optimizer], max_norm: float) -> None:
    """Clip all gradients together, and step."""
    parameters = [p for o in optimizers for group in o.param_groups for p in group["params"]]
    nn.utils.clip_grad_norm_(parameters, max_norm)
    for optimizer in optimizers:
        optimizer.step()


def make_optimizers(
    adapted: Adapted, learning_rate: float, settings: TrainingSettings, keep: tuple[str, ...]
) -> list[Optimizer]:
    """The method's optimizer, and AdamW of its own for a head, the same for every method."""
    head = {id(p): p for name, p in adapted.model.named_parameters() if is_head(name, keep)}
    head = {key: p for key, p in head.items() if p.requires_grad}
    others = [p for p in adapted.model.parameters() if p.requires_grad and id(p) not in head]
    optimizers: list[Optimizer] = []
    decay = settings.weight_decay
    if others:
        if adapted.make_optimizer is None:
            optimizer: Optimizer = AdamW(others, lr=learning_rate, weight_decay=decay)
        else:
            optimizer = adapted.make_optimizer(adapted.model, learning_rate, decay)
            _take_out(optimizer, head)
        adapted.driver.watch(optimizer)
        optimizers.append(optimizer)
    if head:
        rate = settings.head_learning_rate or learning_rate
        optimizers.append(AdamW(head.values(), lr=rate, weight_decay=decay))
    return optimizers


def _take_out(optimizer: Optimizer, parameters: dict[int, nn.Parameter]) -> None:
    """Leave parameters to another optimizer, with what LoRA-FA keeps of each beside them."""
    for group in optimizer.param_groups:
        kept = [i for i, p in enumerate(group["params"]) if id(p) not in parameters]
        for key in ("names", "scaling_factors"):
            if key in group:
                group[key] = [group[key][i] for i in kept]
        group["params"] = [group["params"][i] for i in kept]


def is_head(name: str, keep: tuple[str, ...]) -> bool:
    """Whether a parameter belongs to a module that is trained whole beside the adapters."""
    return ".modules_to_save." in name or name.startswith(tuple(f"{part}." for part in keep))


def rate_factor(step: int, steps: int, settings: TrainingSettings) -> float:
    """The learning rate of a step, counted from 1, in units of its largest value."""
    warmup = round(settings.warmup * steps)
    if step <= warmup:
        return step / (warmup + 1)
    done = (step - 1 - warmup) / max(1, steps - warmup)
    if settings.scheduler == "cosine":
        return COSINE_FLOOR + (1 - COSINE_FLOOR) * 0.5 * (1 + math.cos(math.pi * done))
    return 1 - done if settings.scheduler == "linear" else 1.0


def evaluation_points(steps: int, count: int) -> set[int]:
    """Steps after which the validation part is evaluated: evenly spread, the last among them."""
    return {max(1, round(steps * (i + 1) / count)) for i in range(count)} if steps else set()


def _evaluate(cell: Cell, model: nn.Module, loaded: Loaded, curves: Curves, step: int) -> None:
    started = time.perf_counter()
    metrics = _metrics(cell, model, loaded, loaded.data.validation)
    curves.evaluate_seconds += time.perf_counter() - started
    if metrics is None:
        curves.diverged_at = step
    else:
        curves.validation.append(EvaluationRecord(step, metrics))


def _test(cell: Cell, model: nn.Module, loaded: Loaded, curves: Curves) -> dict[str, float] | None:
    started = time.perf_counter()
    metrics = _metrics(cell, model, loaded, loaded.data.test)
    curves.evaluate_seconds += time.perf_counter() - started
    if metrics is None:
        curves.diverged_at = cell.steps
    return metrics


def _metrics(cell: Cell, model: nn.Module, loaded: Loaded, rows: Any) -> dict[str, float] | None:
    """Metrics, or None if training left weights that are not finite.

    The model inside the `PeftModel` is evaluated, because AdaLoRA's wrapper adds its penalty to
    every loss.
    """
    trained = (p for p in model.parameters() if p.requires_grad)
    if not all(bool(torch.isfinite(p).all()) for p in trained):
        return None
    try:
        return cell.task.task.evaluate(_inner(model), loaded.data, rows)
    finally:
        model.train(cell.method.contestant.trains)


def _inner(model: nn.Module) -> nn.Module:
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    assert isinstance(inner, nn.Module)
    return inner


def _extra_arguments(model: nn.Module) -> dict[str, Any]:
    """A decoder is to keep no cache of keys and values."""
    takes_cache = "use_cache" in inspect.signature(_inner(model).forward).parameters
    return {"use_cache": False} if takes_cache else {}


def _size_of(batch: dict[str, Any]) -> int:
    mask = batch.get("attention_mask")
    return int(mask.sum()) if isinstance(mask, Tensor) else len(batch["labels"])


def _count(model: nn.Module, keep: tuple[str, ...]) -> tuple[int, int]:
    """Trainable parameters of adapters and of heads."""
    counts = [0, 0]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            counts[is_head(name, keep)] += parameter.numel()
    return counts[0], counts[1]


def _final_size(adapted: Adapted, job: Job) -> Size | None:
    """The size after training, which dynamic methods change."""
    ranks, size = adapted.driver.ranks(), adapted.size
    if ranks is None or size is None:
        return size
    parameters = sum(rank * job.targets[name].rank_cost for name, rank in ranks.items())
    return Size(ranks, parameters, size.budget)


def _size_record(size: Size) -> SizeRecord:
    values = size.values.values()
    return SizeRecord(size.budget, size.parameters, size.matched, min(values), max(values))
