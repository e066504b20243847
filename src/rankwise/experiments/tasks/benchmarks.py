"""Standard benchmarks through lm-eval (EleutherAI's harness), such as HumanEval."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from rankwise.errors import DataError
from rankwise.experiments.tasks.base import TaskData
from rankwise.experiments.tasks.language import CompletionTask
from rankwise.experiments.tasks.reading import Row, read_rows

_RUNNING_CODE = ("humaneval", "mbpp")


@dataclass(frozen=True)
class BenchmarkTask(CompletionTask):
    """Completions to learn, and standard benchmarks to be tested on.

    Learning rates are chosen by the held-out loss; the benchmarks are run on the trained model
    only. Their figures are named as lm-eval names them, `TASK/METRIC,FILTER`, such as
    `humaneval/pass@1,create_test` or `piqa/acc,none`.

    Attributes:
        test: Rows whose loss is measured as well; default: none.
        benchmarks: Names of lm-eval's tasks.
        metric: The figure that counts; default: the loss on `test`.
        limit: Questions of each benchmark, for a trial; default: all.
        run_code: Let benchmarks run the code that the model writes, as HumanEval must. It is run
            on this machine, without a sandbox.
    """

    test: str = ""
    benchmarks: list[str] = field(default_factory=lambda: ["humaneval"])
    limit: int | None = None
    run_code: bool = False

    def __post_init__(self) -> None:
        running = [name for name in self.benchmarks if name.startswith(_RUNNING_CODE)]
        if running and not self.run_code:
            raise DataError(
                f"benchmarks: {', '.join(running)} runs what the model writes, on this machine and "
                "without a sandbox; say run_code: true if that is meant."
            )
        if self.metric.partition("/")[0] not in self.benchmarks:
            super().__post_init__()
        if not self.test and self.metric in self.metrics:
            raise DataError(f"metric={self.metric!r} needs test=, rows to measure it on.")

    @property
    def search_metric(self) -> str:
        """The held-out loss."""
        return "loss"

    def evaluate_test(self, model: nn.Module, data: TaskData) -> dict[str, float]:
        """The benchmarks' figures, and the loss where there are test rows.

        Raises:
            DataError: lm-eval is not installed, refuses, or measures no such metric.
        """
        found = self.evaluate(model, data, data.test) if data.test else {}
        found |= harness_figures(
            model, data.processor, self.benchmarks, limit=self.limit, run_code=self.run_code
        )
        if self.metric not in found:
            raise DataError(f"metric={self.metric!r}: measured were {', '.join(sorted(found))}.")
        return found

    def _rows(self) -> tuple[list[Row], list[Row]]:
        if self.test:
            return super()._rows()
        return read_rows(self.train, self.subset, self.train_split), []


def harness_figures(
    model: nn.Module,
    tokenizer: Any,
    benchmarks: list[str],
    *,
    limit: int | None = None,
    run_code: bool = False,
) -> dict[str, float]:
    """What lm-eval measures of a model, as `TASK/METRIC,FILTER`; the model's mode is as before.

    Raises:
        DataError: lm-eval is not installed, or refuses.
    """
    try:
        harness = importlib.import_module("lm_eval")
        wrapper = importlib.import_module("lm_eval.models.huggingface")
    except ImportError as error:
        raise DataError(
            f"benchmarks {', '.join(benchmarks)} need lm-eval ({error}); install it with "
            "`pip install 'rankwise[benchmarks]'`."
        ) from error
    training = model.training
    model.eval()
    try:
        results = harness.simple_evaluate(
            model=wrapper.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8),
            tasks=benchmarks,
            limit=limit,
            bootstrap_iters=0,
            log_samples=False,
            confirm_run_unsafe_code=run_code,
        )
    except (ValueError, RuntimeError, OSError) as error:
        remedy = "" if run_code else " If it asks to confirm unsafe code, see run_code."
        raise DataError(f"lm-eval on {', '.join(benchmarks)}: {error}.{remedy}") from error
    finally:
        model.train(training)
    return _flat(results["results"])


def _flat(results: Mapping[str, Mapping[str, object]]) -> dict[str, float]:
    """Figures without their standard errors, which are of the questions, not of seeds."""
    return {
        f"{task}/{name}": float(value)
        for task, figures in results.items()
        for name, value in figures.items()
        if isinstance(value, int | float) and "," in name and "_stderr" not in name
    }
