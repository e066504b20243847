"""lm-eval itself, on tasks of a local folder."""

import math
import os
import sys

import pytest
import torch
from peft import get_peft_model
from torch.nn.functional import log_softmax

import rankwise as rw
from rankwise.errors import DataError
from rankwise.experiments.tasks import BenchmarkTask
from rankwise.experiments.tasks.harness import known_figures
from tiny_folder import SENTENCES, save_tiny_llama, write_rows

QUESTIONS = [
    {"question": " ".join(words[:4]), "options": [" " + words[4], " budgets", " fox"], "right": 0}
    for words in map(str.split, SENTENCES)
]
COMMON = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
doc_to_text: "{{{{question}}}}"
"""
TASKS = {
    "pick": """
output_type: multiple_choice
doc_to_choice: "{{options}}"
doc_to_target: right
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "continue": """
output_type: loglikelihood
doc_to_target: "{{options[0]}}"
metric_list: [{metric: perplexity, aggregation: perplexity, higher_is_better: false}]
""",
    "run": """
output_type: generate_until
unsafe_code: true
doc_to_target: "{{options[0]}}"
generation_kwargs: {until: ["."], max_gen_toks: 2}
metric_list: [{metric: !function code.ran, aggregation: mean, higher_is_better: true}]
filter_list:
  - {name: twice, filter: [{function: take_first}]}
""",
    "strict": """
output_type: generate_until
unsafe_code: true
doc_to_target: "{{options[0]}}"
metric_list: [{metric: !function strict.ran, aggregation: mean, higher_is_better: true}]
""",
    "odd": """
output_type: generate_until
doc_to_target: "{{options[0]}}"
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: false}]
""",
}
CODE = """
import os

def ran(references, predictions, **options):
    return {"allowed@1": float(os.environ.get("HF_ALLOW_CODE_EVAL") == "1")}
"""
STRICT = """
import os

if os.environ.get("HF_ALLOW_CODE_EVAL") != "1":  # as HumanEval's metric, while it is loaded
    raise ValueError("to run code, set the environment variable")

def ran(references, predictions, **options):
    return 1.0
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_tiny_llama(tmp_path_factory.mktemp("benchmarks") / "model"))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder with task files, as lm-eval's --include_path takes one."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = write_rows(folder / "questions.jsonl", QUESTIONS)
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(COMMON.format(name=name, rows=rows) + text)
    lost = COMMON.format(name="lost", rows=folder / "nowhere.jsonl") + TASKS["pick"]
    (folder / "lost.yaml").write_text(lost)
    (folder / "code.py").write_text(CODE)
    (folder / "strict.py").write_text(STRICT)
    return str(folder)


@pytest.fixture
def options(model, tasks, tmp_path):
    rows = [{"question": f"q {i}", "answer": f"a {i}"} for i in range(8)]
    return {
        "model": model,
        "train": str(write_rows(tmp_path / "rows.jsonl", rows)),
        "validation_rows": 3,
        "include_path": tasks,
        "benchmarks": ["pick", "continue"],
        "metric": "pick/acc,none",
    }


def _likelihood(model, tokenizer, before, after):
    ids = tokenizer(before + after, return_tensors="pt").input_ids
    start = len(tokenizer(before).input_ids)
    with torch.no_grad():
        scores = log_softmax(model(ids).logits[0, start - 1 : -1].double(), -1)
    return scores.gather(1, ids[0, start:, None]).sum().item()


def test_figures_are_those_of_the_adapted_model(options):
    task = BenchmarkTask(**options)
    data = task.load()
    config = rw.RaLoraConfig(r=2, blocks=2, target_modules="all-linear")
    adapted = get_peft_model(task.load_model(), config).train()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    found = task.evaluate_test(adapted, data)
    assert adapted.training
    adapted.eval()
    for model, same in ((adapted, True), (task.load_model().eval(), False)):
        own = [
            [_likelihood(model, data.processor, q["question"], o) for o in q["options"]]
            for q in QUESTIONS
        ]
        right = sum(scores[0] == max(scores) for scores in own) / len(own)
        perplexity = math.exp(-sum(scores[0] for scores in own) / len(own))
        expected = {"pick/acc,none": right, "continue/perplexity,none": perplexity}
        assert (found == pytest.approx(expected, rel=1e-5)) is same


def test_whether_less_is_better_is_the_harness_s(options):
    known = known_figures(["pick", "continue"], options["include_path"])
    assert known == {"pick/acc,none": True, "continue/perplexity,none": False}
    for metric, larger in known.items():
        assert BenchmarkTask(**options | {"metric": metric}).lower_is_better is not larger
    other = {"benchmarks": ["odd"], "metric": "odd/exact_match,none"}
    with pytest.raises(DataError, match="less is better, which rankwise does not know"):
        BenchmarkTask(**options | other).load()
    assert BenchmarkTask(**options | {"metric": "loss", "test": options["train"]}).lower_is_better


def test_learning_rates_are_chosen_by_the_loss_and_test_rows_measured_as_well(options):
    counted = {"metric": "median_loss", "test": options["train"], "benchmarks": ["pick"]}
    task = BenchmarkTask(**options | counted, limit=1)
    data, model = task.load(), task.load_model()
    assert set(task.evaluate(model, data, data.validation)) == set(task.metrics)
    found = task.evaluate_test(model, data)
    assert found["loss"] == task.evaluate(model, data, data.test)["loss"]
    assert found["pick/acc,none"] in (0.0, 1.0)  # one question


def test_code_is_run_only_if_that_is_asked_for(options, monkeypatch):
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
    with pytest.raises(DataError, match="run_code: true"):
        BenchmarkTask(**options | {"benchmarks": ["humaneval"], "metric": "humaneval/pass@1,x"})
    running = {"benchmarks": ["run"], "metric": "run/allowed@1,twice"}
    with pytest.raises(DataError, match=r"run runs what the model writes.*run_code: true"):
        BenchmarkTask(**options | running).load()
    task = BenchmarkTask(**options | running, run_code=True)
    data = task.load()
    assert task.evaluate_test(task.load_model(), data) == {"run/allowed@1,twice": 1.0}
    assert "HF_ALLOW_CODE_EVAL" not in os.environ
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "0")
    task.load()
    assert os.environ["HF_ALLOW_CODE_EVAL"] == "0"


def test_a_metric_that_asks_while_it_is_loaded(options):
    strict = {"benchmarks": ["strict"], "metric": "strict/ran,none"}
    with pytest.raises(DataError, match=r"lm-eval on strict: to run code.*see run_code"):
        BenchmarkTask(**options | strict).load()
    BenchmarkTask(**options | strict, run_code=True).load()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"benchmarks": ["pikc"], "metric": "pikc/acc,none"}, "did you mean 'pick'"),
        ({"benchmarks": ["0000"], "metric": "0000/acc,none"}, "include_path names a folder"),
        ({"metric": "pick/accuracy,none"}, r"measured are pick/acc,none\."),
        ({"benchmarks": ["lost"], "metric": "lost/acc,none"}, r"lm-eval on lost: .*nowhere\.jsonl"),
        ({"include_path": "/no/such/folder"}, "is not a folder"),
        ({"start": "\n"}, "lm-eval would ask without it"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_trained(options, changed, message):
    with pytest.raises(DataError, match=message):
        BenchmarkTask(**options | changed).load()


def test_a_figure_that_only_the_results_could_name(options):
    running = {"benchmarks": ["run"], "metric": "run/pass@1,twice", "run_code": True}
    task = BenchmarkTask(**options | running)
    with pytest.raises(DataError, match="measured were run/allowed@1,twice"):
        task.evaluate_test(task.load_model(), task.load())


def test_without_the_harness(options, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(DataError, match=r"rankwise\[benchmarks\]"):
        BenchmarkTask(**options | {"include_path": ""}).load()


def test_the_loss_needs_rows_to_measure_it_on(options):
    with pytest.raises(DataError, match="needs test="):
        BenchmarkTask(**options | {"metric": ""})
