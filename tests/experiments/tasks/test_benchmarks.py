import sys
from types import ModuleType

import pytest

from rankwise.errors import DataError
from rankwise.experiments.tasks import BenchmarkTask
from tiny_folder import save_tiny_llama, write_rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_llama(tmp_path_factory.mktemp("benchmarks") / "model")


@pytest.fixture
def harness(monkeypatch):
    """What rankwise uses of lm-eval 0.4, and a note of how it was called."""
    calls = []

    def simple_evaluate(**arguments):
        assert not arguments["model"].pretrained.training
        calls.append(arguments)
        if not arguments["confirm_run_unsafe_code"]:
            raise ValueError("Attempted to run task: humaneval which is marked as unsafe.")
        return {
            "results": {
                "humaneval": {
                    "alias": "humaneval",
                    "pass@1,create_test": 0.25,
                    "pass@1_stderr,create_test": "N/A",
                },
                "piqa": {"acc,none": 0.5, "acc_stderr,none": 0.1, "sample_len": 7},
            }
        }

    class HFLM:
        def __init__(self, pretrained, tokenizer, batch_size):
            self.pretrained, self.tokenizer, self.batch_size = pretrained, tokenizer, batch_size

    package, models = ModuleType("lm_eval"), ModuleType("lm_eval.models")
    wrapper = ModuleType("lm_eval.models.huggingface")
    package.simple_evaluate = simple_evaluate
    wrapper.HFLM = HFLM
    for module in (package, models, wrapper):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return calls


@pytest.fixture
def options(folder, tmp_path):
    rows = [{"question": f"q {i}", "answer": f"a {i}"} for i in range(8)]
    path = str(write_rows(tmp_path / "rows.jsonl", rows))
    return {
        "model": str(folder),
        "train": path,
        "validation_rows": 3,
        "benchmarks": ["humaneval", "piqa"],
        "metric": "humaneval/pass@1,create_test",
        "run_code": True,
    }


def test_figures_are_named_as_the_harness_names_them(options, harness):
    task = BenchmarkTask(**options, limit=5)
    data, model = task.load(), task.load_model().train()
    found = task.evaluate_test(model, data)
    assert found == {"humaneval/pass@1,create_test": 0.25, "piqa/acc,none": 0.5}
    assert model.training
    assert harness[0]["tasks"] == ["humaneval", "piqa"]
    assert harness[0]["limit"] == 5
    assert harness[0]["model"].tokenizer is data.processor


def test_learning_rates_are_chosen_by_the_loss(options, harness):
    task = BenchmarkTask(**options)
    data, model = task.load(), task.load_model()
    assert task.search_metric in task.evaluate(model, data, data.validation)
    assert not harness


def test_test_rows_are_measured_as_well(options, harness):
    task = BenchmarkTask(**options | {"metric": "median_loss", "test": options["train"]})
    data, model = task.load(), task.load_model()
    found = task.evaluate_test(model, data)
    assert found["loss"] == task.evaluate(model, data, data.test)["loss"]


def test_code_is_run_only_if_that_is_asked_for(options):
    with pytest.raises(DataError, match="run_code: true"):
        BenchmarkTask(**options | {"run_code": False})


def test_what_the_harness_refuses_is_explained(options, harness):
    other = {"benchmarks": ["piqa"], "metric": "piqa/acc,none", "run_code": False}
    task = BenchmarkTask(**options | other)
    with pytest.raises(DataError, match=r"marked as unsafe.*see run_code"):
        task.evaluate_test(task.load_model(), task.load())


def test_a_metric_that_was_not_measured(options, harness):
    task = BenchmarkTask(**options | {"metric": "piqa/accuracy"})
    with pytest.raises(DataError, match="acc,none"):
        task.evaluate_test(task.load_model(), task.load())


def test_without_the_harness(options, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    task = BenchmarkTask(**options)
    with pytest.raises(DataError, match=r"rankwise\[benchmarks\]"):
        task.evaluate_test(task.load_model(), task.load())


def test_the_loss_needs_rows_to_measure_it_on(options):
    with pytest.raises(DataError, match="needs test="):
        BenchmarkTask(**options | {"metric": ""})
