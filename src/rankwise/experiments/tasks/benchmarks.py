"""Standard benchmarks through lm-eval, such as HumanEval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from rankwise.errors import DataError
from rankwise.experiments.tasks.base import TaskData
from rankwise.experiments.tasks.harness import harness_figures, known_figures
from rankwise.experiments.tasks.language import CompletionTask
from rankwise.experiments.tasks.reading import Row, read_rows

_RUNNING_CODE = ("humaneval", "mbpp")
_LOWER_IS_BETTER = (
    "bits_per_byte",
    "brier_score",
    "byte_perplexity",
    "perplexity",
    "ter",
    "word_perplexity",
)
"""lm-eval's metrics of which less is better; results must be readable without lm-eval."""


@dataclass(frozen=True)
class BenchmarkTask(CompletionTask):
    """Completions to learn, and standard benchmarks to be tested on.

    Learning rates are chosen by the held-out loss; the benchmarks are run on the trained model
    only. Their figures are named as lm-eval names them, `TASK/METRIC,FILTER`, such as
    `humaneval/pass@1,create_test` or `piqa/acc,none`.

    Attributes:
        test: Rows whose loss is measured as well; default: none.
        benchmarks: Names of lm-eval's tasks.
        include_path: A folder with further task files (YAML), as lm-eval's option of that name.
        metric: The figure that counts; default: the loss on `test`.
        limit: Questions of each benchmark, for a trial; default: all.
        run_code: Let benchmarks run the code that the model writes, as HumanEval must. It is run
            on this machine, without a sandbox.
    """

    test: str = ""
    benchmarks: list[str] = field(default_factory=lambda: ["humaneval"])
    include_path: str = ""
    limit: int | None = None
    run_code: bool = False

    def __post_init__(self) -> None:
        if self.start:
            raise DataError(f"start={self.start!r}: lm-eval would ask without it; leave it out.")
        running = [name for name in self.benchmarks if name.startswith(_RUNNING_CODE)]
        if running and not self.run_code:
            raise DataError(
                f"benchmarks: {', '.join(running)} runs what the model writes, on this machine and "
                "without a sandbox; say run_code: true if that is meant."
            )
        if self._counts_benchmark:
            self._check_counts()
        else:
            super().__post_init__()
        if not self.test and self.metric in self.metrics:
            raise DataError(f"metric={self.metric!r} needs test=, rows to measure it on.")

    @property
    def _counts_benchmark(self) -> bool:
        return self.metric.partition("/")[0] in self.benchmarks

    @property
    def lower_is_better(self) -> bool:
        """Whether a smaller value of the metric is better."""
        if not self._counts_benchmark:
            return super().lower_is_better
        return self.metric.partition("/")[2].partition(",")[0] in _LOWER_IS_BETTER

    @property
    def search_metric(self) -> str:
        """The held-out loss."""
        return "loss"

    def definitions(self) -> Sequence[Path]:
        """The task files and functions of `include_path`; importing these writes others there."""
        if not self.include_path:
            return ()
        kinds = (".yaml", ".yml", ".py")
        return sorted(p for p in Path(self.include_path).rglob("*") if p.suffix in kinds)

    def load(self) -> TaskData:
        """Read, split and encode, and see whether lm-eval can run the benchmarks.

        Raises:
            DataError: As for any task; or lm-eval is not installed, lacks a benchmark or its data
                set, or measures no such metric.
        """
        known = known_figures(self.benchmarks, self.include_path, run_code=self.run_code)
        self._check_metric(known)
        return super().load()

    def _check_metric(self, known: dict[str, bool]) -> None:
        """Of a task; a group's figures are known only once they are measured."""
        own = [name for name in known if name.partition("/")[0] == self.metric.partition("/")[0]]
        if own and self.metric not in own:
            raise DataError(f"metric={self.metric!r}: measured are {', '.join(sorted(own))}.")
        if own and known[self.metric] == self.lower_is_better:
            raise DataError(
                f"metric={self.metric!r}: of this one "
                f"{'more' if known[self.metric] else 'less'} is better, which rankwise does not "
                "know; choose another that counts."
            )

    def evaluate_test(self, model: nn.Module, data: TaskData) -> dict[str, float]:
        """The benchmarks' figures, and the loss where there are test rows.

        Raises:
            DataError: lm-eval is not installed, refuses, or measures no such metric.
        """
        found = self.evaluate(model, data, data.test) if data.test else {}
        found |= harness_figures(
            model,
            data.processor,
            self.benchmarks,
            self.include_path,
            limit=self.limit,
            run_code=self.run_code,
        )
        if self.metric not in found:
            raise DataError(f"metric={self.metric!r}: measured were {', '.join(sorted(found))}.")
        return found

    def _rows(self) -> tuple[list[Row], list[Row]]:
        if self.test:
            return super()._rows()
        return read_rows(self.train, self.subset, self.train_split), []
