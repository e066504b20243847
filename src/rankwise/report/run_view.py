"""A run record as the report shows it."""

from __future__ import annotations

import math
from typing import Any

from rankwise.records import HeldOutLoss, RunRecord
from rankwise.report.plan_view import recorded_plan, scalars
from rankwise.report.training_view import (
    RunExtras,
    event_views,
    landscape_view,
    learned_view,
    rank_history,
    tracking_view,
)
from rankwise.report.views import LossPoint, RunView

# what of a run's configuration a reader needs to judge its numbers
_SETTINGS = {
    "training": (
        "batch_size",
        "gradient_accumulation",
        "learning_rate",
        "scheduler",
        "warmup",
        "weight_decay",
        "dropout",
    ),
    "data": ("max_length", "packing"),
}


def view_of_run(record: RunRecord, folder: str, extras: RunExtras | None = None) -> RunView:
    """All that the report says of a run.

    Raises:
        FileError: Its files do not belong together.
    """
    recorded = recorded_plan(record) if record.ranks else None
    extras = extras or RunExtras()
    events = extras.events or []
    steps = [point.step for point in record.held_out] + [p.step for p in record.train_loss]
    dtype = record.config.get("dtype")
    return RunView(
        label=record.method,
        folder=folder,
        method=record.method,
        model=record.model,
        model_fingerprint=record.model_fingerprint,
        seed=record.seed,
        trainable_parameters=record.trainable_parameters,
        ranks=None if recorded is None else recorded.ranks,
        blocks=None if recorded is None else recorded.blocks,
        held_out=[_held_out(point) for point in record.held_out],
        train_loss=[LossPoint(point.step, point.loss) for point in record.train_loss],
        seconds=dict(record.seconds),
        peak_memory_mib=record.peak_memory_mib,
        train_tokens=record.train_tokens,
        dtype=dtype if isinstance(dtype, str) else None,
        settings=_settings(record),
        data=_fingerprints(record),
        versions=dict(record.versions),
        hardware=dict(record.hardware),
        commit=record.commit,
        finished=record.finished,
        events=event_views(events),
        rank_history=rank_history(events, record.ranks, max(steps, default=0)),
        tracking=None if extras.tracking is None else tracking_view(extras.tracking),
        learned=None if extras.analysis is None else learned_view(extras.analysis),
        landscape=None if extras.landscape is None else landscape_view(extras.landscape),
    )


def _held_out(point: HeldOutLoss) -> LossPoint:
    perplexity = point.perplexity if math.isfinite(point.perplexity) else None
    return LossPoint(point.step, point.loss, perplexity, point.tokens)


def _settings(record: RunRecord) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for section, keys in _SETTINGS.items():
        values = record.config.get(section)
        settings |= scalars(values, keys) if isinstance(values, dict) else {}
    return settings


def _fingerprints(record: RunRecord) -> dict[str, str]:
    """Of the training and the held-out data."""
    return {
        part: str(facts["fingerprint"])
        for part, facts in record.data.items()
        if isinstance(facts, dict) and "fingerprint" in facts
    }
