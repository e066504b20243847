"""What methods are compared on: data, a model to adapt, and a metric.

A task reads local files or a hub data set, holds a validation part out of the training part (the
same for every seed, so that learning rates are chosen on one sample), and leaves the test part for
final figures only.
"""

from collections.abc import Mapping

from rankwise.experiments.tasks.base import Collate, Task, TaskData
from rankwise.experiments.tasks.benchmarks import BenchmarkTask
from rankwise.experiments.tasks.choice import ChoiceTask, CommonsenseTask
from rankwise.experiments.tasks.classification import (
    AcceptabilityTask,
    ClassificationTask,
    GlueTask,
)
from rankwise.experiments.tasks.judging import JudgedTask
from rankwise.experiments.tasks.language import CompletionTask, MathTask
from rankwise.experiments.tasks.reading import Row
from rankwise.experiments.tasks.scores import matthews_correlation
from rankwise.experiments.tasks.text_to_text import GlueTextTask, TextToTextTask
from rankwise.experiments.tasks.vision import ClipTask, ImageTask

__all__ = [
    "TASKS",
    "AcceptabilityTask",
    "BenchmarkTask",
    "ChoiceTask",
    "ClassificationTask",
    "ClipTask",
    "Collate",
    "CommonsenseTask",
    "CompletionTask",
    "GlueTask",
    "GlueTextTask",
    "ImageTask",
    "JudgedTask",
    "MathTask",
    "Row",
    "Task",
    "TaskData",
    "TextToTextTask",
    "matthews_correlation",
]

TASKS: Mapping[str, type[Task]] = {
    "completion": CompletionTask,
    "math": MathTask,
    "choice": ChoiceTask,
    "commonsense": CommonsenseTask,
    "classification": ClassificationTask,
    "acceptability": AcceptabilityTask,
    "glue": GlueTask,
    "text-to-text": TextToTextTask,
    "glue-text": GlueTextTask,
    "image": ImageTask,
    "clip": ClipTask,
    "benchmarks": BenchmarkTask,
    "judged": JudgedTask,
}
"""Kinds of tasks by the name that experiment files use."""
