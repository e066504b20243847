"""lm-eval (EleutherAI's harness): its index of tasks, what they measure, and their figures."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from torch import nn

from rankwise.errors import DataError, nearest

BATCH_SIZE = 8
_RUNS_CODE = "HF_ALLOW_CODE_EVAL"
"""What the metric `code_eval`, of HumanEval and others, asks to be 1."""


def known_figures(
    benchmarks: Sequence[str], include_path: str = "", *, run_code: bool = False
) -> dict[str, bool]:
    """Figure, as `TASK/METRIC,FILTER`, -> whether larger is better, of the tasks that fix both.

    Figures of groups, and of tasks whose metric is a function (HumanEval's), have names that only
    the results tell. Reads the benchmarks' data sets, so that what is missing is found before
    anything is trained.

    Raises:
        DataError: lm-eval is not installed, does not know or cannot load a benchmark, or a
            benchmark runs the model's code and `run_code` is False.
    """
    manager = _task_manager(include_path)
    for name in benchmarks:
        if name not in manager.all_tasks:
            raise DataError(f"benchmarks: lm-eval has no {name!r}; {_nearest(name, manager)}")
    with _explained(benchmarks, run_code), _code_allowed(run_code):
        tasks = manager.load(list(benchmarks))["tasks"]
    unsafe = [name for name, task in tasks.items() if getattr(task, "UNSAFE_CODE", False)]
    if unsafe and not run_code:
        raise DataError(
            f"benchmarks: {', '.join(unsafe)} runs what the model writes, on this machine and "
            "without a sandbox; say run_code: true if that is meant."
        )
    return {
        f"{name}/{metric},{kind}": larger
        for name, task in tasks.items()
        if _names_its_figures(task)
        for metric, larger in task.higher_is_better().items()
        for kind in _filters(task)
    }


def harness_figures(
    model: nn.Module,
    tokenizer: Any,
    benchmarks: Sequence[str],
    include_path: str = "",
    *,
    limit: int | None = None,
    run_code: bool = False,
) -> dict[str, float]:
    """What lm-eval measures of a model, as `TASK/METRIC,FILTER`; the model's mode is as before.

    Raises:
        DataError: lm-eval is not installed, or refuses.
    """
    harness, wrapper = _module("lm_eval"), _module("lm_eval.models.huggingface")
    manager = _task_manager(include_path)
    training = model.training
    model.eval()
    try:
        with _explained(benchmarks, run_code), _code_allowed(run_code):
            results = harness.simple_evaluate(
                model=wrapper.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=BATCH_SIZE),
                tasks=list(benchmarks),
                task_manager=manager,
                limit=limit,
                bootstrap_iters=0,
                log_samples=False,
                confirm_run_unsafe_code=run_code,
            )
    finally:
        model.train(training)
    return _flat(results["results"])


@cache
def _task_manager(include_path: str) -> Any:
    """The index of lm-eval's tasks and of a folder's; reading it takes seconds, once a process."""
    if include_path and not Path(include_path).is_dir():
        raise DataError(f"include_path={include_path!r} is not a folder; it is to hold task files.")
    return _module("lm_eval.tasks").TaskManager(include_path=include_path or None)


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise DataError(
            f"benchmarks need lm-eval ({error}); install it with "
            "`pip install 'rankwise[benchmarks]'`."
        ) from error


def _nearest(name: str, manager: Any) -> str:
    hint = nearest(name, manager.all_tasks)
    many = "`lm-eval ls tasks` lists them; include_path names a folder with others."
    return hint if hint.startswith("did you mean") else many


def _names_its_figures(task: Any) -> bool:
    """Whether no metric is a function or of the library evaluate: one may measure several."""
    metrics = task.get_config("metric_list") or ()
    return all(isinstance(m["metric"], str) and not m.get("hf_evaluate") for m in metrics)


def _filters(task: Any) -> list[str]:
    """What may follow the comma of a figure's name."""
    return [found["name"] for found in task.get_config("filter_list") or ()] or ["none"]


@contextmanager
def _explained(benchmarks: Sequence[str], run_code: bool) -> Iterator[None]:
    """Whatever lm-eval, its tasks and their data sets refuse with, as this project's error."""
    try:
        yield
    except (ValueError, RuntimeError, OSError, LookupError, ImportError) as error:
        remedy = "" if run_code else " If it asks to confirm that code may run, see run_code."
        raise DataError(f"lm-eval on {', '.join(benchmarks)}: {error}.{remedy}") from error


@contextmanager
def _code_allowed(allowed: bool) -> Iterator[None]:
    """Confirm to the metrics, too, that code may be run; the environment is as before."""
    before = os.environ.get(_RUNS_CODE)
    if allowed:
        os.environ[_RUNS_CODE] = "1"
    try:
        yield
    finally:
        if allowed and before is None:
            del os.environ[_RUNS_CODE]
        elif allowed and before is not None:
            os.environ[_RUNS_CODE] = before


def _flat(results: Mapping[str, Mapping[str, object]]) -> dict[str, float]:
    """Figures without their standard errors, which are of the questions, not of seeds."""
    return {
        f"{task}/{name}": float(value)
        for task, figures in results.items()
        for name, value in figures.items()
        if isinstance(value, int | float) and "," in name and "_stderr" not in name
    }
