import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
)

from hub_rows import HUB_ROWS
from rankwise.errors import DataError
from rankwise.experiments.tasks import ChoiceTask, CommonsenseTask, choice
from rankwise.experiments.tasks.choice import candidate_likelihoods, question_and_options
from rankwise.experiments.tasks.commonsense import COMMONSENSE
from rankwise.profiling.loss import IGNORED_LABEL
from tiny_folder import save_tiny_llama, write_rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_llama(tmp_path_factory.mktemp("choice") / "model")


def _choices(path, count):
    rows = []
    for i in range(count):
        answer = f"answer{1 + i % 3}"
        rows.append(
            {
                "instruction": f"choose {i}\n\nAnswer format: answer1/answer2/answer3",
                "output": f"the correct answer is {answer}",
                "answer": answer,
            }
        )
    return write_rows(path, rows)


@pytest.mark.parametrize(
    ("completion", "answer", "choices", "expected"),
    [
        ("the correct answer is a", "a", ["a", "b"], ["the correct answer is b"]),
        ("the true answer is true", "true", ["true", "false"], ["the true answer is false"]),
        ("not a10 but a1.", "a1", ["a1", "a2"], ["not a10 but a2."]),
        (r"it is \1", r"\1", [r"\1", r"\2"], [r"it is \2"]),
    ],
)  # fmt: skip
def test_other_choices_stand_where_the_answer_stood(completion, answer, choices, expected):
    assert choice.completions_of(completion, answer, choices) == [completion, *expected]


def test_a_completion_without_its_answer_is_refused():
    with pytest.raises(DataError, match="does not mention its answer 'b'"):
        choice.completions_of("the correct answer is B", "b", ["a", "b"])


class TestChoice:
    @pytest.fixture
    def task(self, folder, tmp_path):
        path = str(_choices(tmp_path / "rows.jsonl", 12))
        return ChoiceTask(model=str(folder), train=path, test=path, validation_rows=3)

    def test_candidates_differ_in_their_answer_only(self, task):
        row = task.load().test[1]
        assert row["answer"] == 1
        assert len(row["candidates"]) == 3
        assert row["candidates"][1]["input_ids"] == row["input_ids"]

    def test_accuracy_is_that_of_summed_log_likelihoods(self, task):
        data, model = task.load(), task.load_model()
        right, losses = 0, []
        for row in data.test:
            scores = []
            for candidate in row["candidates"]:
                batch = data.collate([candidate])
                labelled = int((batch["labels"][:, 1:] != IGNORED_LABEL).sum())
                scores.append(-float(model(**batch).loss.detach()) * labelled)
            right += int(torch.tensor(scores).argmax()) == row["answer"]
            losses.append(-float(torch.tensor(scores).log_softmax(0)[row["answer"]]))
        found = task.evaluate(model, data, data.test)
        assert found["accuracy"] == right / len(data.test)
        assert found["choice_loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-4)
        assert not model.training

    def test_an_answer_outside_the_choices(self, folder, tmp_path):
        rows = [{"instruction": "no format", "output": "x", "answer": "x"}] * 6
        path = str(write_rows(tmp_path / "rows.jsonl", rows))
        task = ChoiceTask(model=str(folder), train=path, test=path, validation_rows=2)
        with pytest.raises(DataError, match="Answer format"):
            task.load()

    def test_likelihoods_are_those_of_whole_passes_less_a_constant(self, task):
        data, model = task.load(), task.load_model().eval()
        row = data.test[0]
        whole = []
        for candidate in row["candidates"]:
            batch = data.collate([candidate])
            labelled = int((batch["labels"][:, 1:] != IGNORED_LABEL).sum())
            whole.append(-float(model(**batch).loss.detach()) * labelled)
        (found,) = candidate_likelihoods(model, [row["candidates"]])
        expected = torch.tensor(whole)
        torch.testing.assert_close(found - found[0], expected - expected[0], rtol=1e-4, atol=1e-4)
        assert float((expected - expected[0]).abs().max()) > 0.01

    def test_a_long_question_is_cut_alike_for_all(self, folder, tmp_path):
        rows = [
            {
                "instruction": "why " * 60 + "\n\nAnswer format: a/bbbbbbbb",
                "output": "the correct answer is a",
                "answer": "a",
            }
        ] * 6
        path = str(write_rows(tmp_path / "rows.jsonl", rows))
        options = {"model": str(folder), "train": path, "test": path, "validation_rows": 2}
        first, second = ChoiceTask(**options, max_length=64).load().test[0]["candidates"]
        places = [row["labels"].count(IGNORED_LABEL) for row in (first, second)]
        assert places[0] == places[1]
        assert first["input_ids"][: places[0]] == second["input_ids"][: places[0]]
        assert len(second["input_ids"]) == 64 > len(first["input_ids"])
        with pytest.raises(DataError, match="max_length=8"):
            ChoiceTask(**options, max_length=8).load()
        started = ChoiceTask(**options, max_length=64, start="\n")
        data = started.load()
        lead = data.processor("\n")["input_ids"]
        for bare, row in zip((first, second), data.test[0]["candidates"], strict=True):
            answer = bare["input_ids"][places[0] :]
            cut = bare["input_ids"][len(lead) : places[0]]
            assert row["input_ids"] == lead + cut + answer


def _candidates(prompt, answers):
    return [
        {"input_ids": [*prompt, *answer], "labels": [IGNORED_LABEL] * len(prompt) + answer}
        for answer in answers
    ]


QUESTIONS = [
    _candidates([5, 6], [[7], [8, 9, 10], [8, 11]]),
    _candidates([12, 13, 14, 15, 16, 17, 18], [[19], [20]]),
    _candidates([21, 22, 23, 24], [[25, 26, 27, 28, 29], [25, 26, 30], [31, 32], [33]]),
]
SMALL = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
MODELS = {
    "llama": LlamaConfig(**SMALL, intermediate_size=32),
    "gpt2": GPT2Config(**SMALL),
    "opt": OPTConfig(**SMALL, ffn_dim=32, word_embed_proj_dim=16, pad_token_id=1),
    "bloom": BloomConfig(**SMALL),  # ALiBi: no positions, distances by the mask
}


class TestSeveralQuestionsAtOnce:
    @pytest.fixture(params=MODELS)
    def model(self, request):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(MODELS[request.param])
        for parameter in model.parameters():  # as initialised all answers are about as likely
            torch.nn.init.normal_(parameter, std=0.5)
        return model.eval()

    def test_questions_and_answers_of_several_lengths(self, model):
        found = candidate_likelihoods(model, QUESTIONS)
        assert [len(likelihoods) for likelihoods in found] == [3, 2, 4]
        for rows, likelihoods in zip(QUESTIONS, found, strict=True):
            expected = torch.tensor([_log_likelihood(model, row) for row in rows])
            expected, likelihoods = expected - expected[0], likelihoods - likelihoods[0]
            torch.testing.assert_close(likelihoods, expected, rtol=1e-4, atol=1e-4)
            assert float(expected.abs().max()) > 0.1

    @pytest.mark.parametrize("model", ["llama"], indirect=True)
    def test_adapted_models_are_asked_for_the_last_logits_too(self, model):
        config = LoraConfig(target_modules="all-linear", init_lora_weights=False)
        adapted, seen = get_peft_model(model, config).eval(), []
        model.lm_head.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
        found = candidate_likelihoods(adapted, QUESTIONS)
        assert seen == [1, 4]  # of prefixes the last token, of answers all but the last
        expected = torch.tensor([_log_likelihood(adapted, row) for row in QUESTIONS[2]])
        torch.testing.assert_close(
            found[2] - found[2][0], expected - expected[0], rtol=1e-4, atol=1e-4
        )

    def test_answers_of_one_token_take_a_single_pass(self, model):
        passes = []
        model.register_forward_pre_hook(lambda *_: passes.append(1))
        candidate_likelihoods(model, [_candidates([5, 6], [[7], [8]]), QUESTIONS[1]])
        assert len(passes) == 1

    def test_a_pass_holds_as_many_as_its_tokens_allow(self, folder, tmp_path, monkeypatch):
        path = str(_choices(tmp_path / "rows.jsonl", 12))
        task = ChoiceTask(model=str(folder), train=path, test=path, validation_rows=3)
        data, model = task.load(), task.load_model()
        sizes = []

        def counted(model, questions):
            sizes.append(len(questions))
            return candidate_likelihoods(model, questions)

        monkeypatch.setattr(choice, "candidate_likelihoods", counted)
        monkeypatch.setattr(choice, "PASS_TOKENS", 10**4)
        whole = task.evaluate(model, data, data.test)
        assert sizes == [12]
        longest = max(len(row["candidates"][0]["input_ids"]) for row in data.test)
        monkeypatch.setattr(choice, "PASS_TOKENS", 4 * longest)
        assert task.evaluate(model, data, data.test) == pytest.approx(whole, abs=1e-5)
        assert len(sizes) > 2 and sum(sizes[1:]) == 12
        monkeypatch.setattr(choice, "PASS_TOKENS", 1)
        task.evaluate(model, data, data.test)
        assert sizes[-12:] == [1] * 12


def _log_likelihood(model, row):
    ids = torch.tensor([row["input_ids"]])
    log_p = model(input_ids=ids).logits[0].detach().log_softmax(-1)
    places = [i for i, label in enumerate(row["labels"]) if label != IGNORED_LABEL]
    return sum(float(log_p[i - 1, ids[0, i]]) for i in places)


class TestAnswersAsTexts:
    def test_options_leave_the_prompt_and_become_the_candidates(self, folder, tmp_path):
        rows = [
            {
                "instruction": f"pick {i}\n\nAnswer1: a bed Answer2: two\nlines Answer3: c: d\n\n"
                "Answer format: answer1/answer2/answer3",
                "output": "the correct answer is answer2",
                "answer": "answer2",
            }
            for i in range(6)
        ]
        path = str(write_rows(tmp_path / "rows.jsonl", rows))
        task = ChoiceTask(
            model=str(folder), train=path, test=path, validation_rows=2, answers="texts"
        )
        data = task.load()
        row = data.test[0]
        texts = []
        for candidate in row["candidates"]:
            labels = [label for label in candidate["labels"] if label != IGNORED_LABEL]
            assert labels.pop() == data.processor.eos_token_id
            prompt = candidate["input_ids"][: candidate["labels"].count(IGNORED_LABEL)]
            assert prompt == data.processor("pick 0\n")["input_ids"]
            texts.append(labels)
        expected = ["a bed", "two\nlines", "c: d"]
        assert texts == [
            data.processor(text, add_special_tokens=False)["input_ids"] for text in expected
        ]
        assert row["answer"] == 1
        assert row["input_ids"] == row["candidates"][1]["input_ids"]

    def test_names_serve_where_no_options_are_listed(self):
        text = "is it so?\n\nAnswer format: true/false"
        assert question_and_options(text, ["true", "false"]) == ("is it so?", ["true", "false"])

    @pytest.mark.parametrize("part", COMMONSENSE)
    def test_all_eight_can_be_read(self, part):
        made = COMMONSENSE[part].instruct(HUB_ROWS[part])
        text, _, format_ = made["instruction"].rpartition("Answer format: ")
        names = format_.split("/")
        question, options = question_and_options(made["instruction"], names)
        assert text.startswith(question)
        assert len(options) == len(names)
        if part != "boolq":
            assert all(option in text and option not in names for option in options)
            assert not any(f"{name.capitalize()}:" in question for name in names)


def _answer(text):
    return {"instruction": text, "output": "the correct answer is answer2", "answer": "answer2"}


class TestCommonsense:
    @pytest.fixture
    def task(self, folder, tmp_path):
        for part, count in (("boolq", 9), ("openbookqa", 6)):
            for split in ("train", "test"):
                rows = [
                    _answer(f"{part} {i}\n\nAnswer format: answer1/answer2") for i in range(count)
                ]
                (tmp_path / f"{part}.{split}.json").write_text(json.dumps(rows))
        return CommonsenseTask(
            model=str(folder),
            train=str(tmp_path),
            test=str(tmp_path),
            parts=["boolq", "openbookqa"],
            validation_rows=3,
            max_train=8,
            max_test=4,
        )

    def test_parts_are_mixed_to_train_on_and_tested_alike(self, task):
        data = task.load()
        assert len(data.train) == 8
        assert {row["part"] for row in data.train} == {"boolq", "openbookqa"}
        assert [row["part"] for row in data.test] == ["boolq"] * 4 + ["openbookqa"] * 4

    def test_its_metrics_are_the_means_of_the_parts(self, task, monkeypatch):
        data = task.load()
        right = [True, False, False, False, True, True, True, False]
        scores = [{"accuracy": float(hit), "choice_loss": 2.0 - hit} for hit in right]
        monkeypatch.setattr(CommonsenseTask, "_scores", lambda *args: scores)
        found = task.evaluate(None, data, data.test)
        assert found == {
            "accuracy": 0.5,
            "choice_loss": 1.5,
            "accuracy_boolq": 0.25,
            "choice_loss_boolq": 1.75,
            "accuracy_openbookqa": 0.75,
            "choice_loss_openbookqa": 1.25,
        }

    def test_an_unknown_part(self):
        with pytest.raises(DataError, match="'boolq'"):
            CommonsenseTask(model="m", parts=["bolq"])


@pytest.mark.parametrize("part", COMMONSENSE)
def test_hub_rows_become_instructions(part):
    made = COMMONSENSE[part].instruct(HUB_ROWS[part])
    formats = made["instruction"].rpartition("Answer format: ")[2].split("/")
    assert made["answer"] == formats[1]  # every sample's second answer is right
    assert made["output"] == f"the correct answer is {formats[1]}"


def test_the_wording_is_that_of_llm_adapters():
    made = COMMONSENSE["openbookqa"].instruct(
        {
            "question_stem": "The sun is responsible for",
            "choices": {
                "text": ["puppies learning new tricks", "flowers wilting in a vase"],
                "label": ["A", "B"],
            },
            "answerKey": "A",
        }
    )
    assert made["instruction"] == (
        "Please choose the correct answer to the question: The sun is responsible for\n\n"
        "Answer1: puppies learning new tricks Answer2: flowers wilting in a vase\n\n"
        "Answer format: answer1/answer2"
    )


def test_a_key_that_is_no_choice():
    row = HUB_ROWS["ARC-Easy"] | {"answerKey": "E"}
    with pytest.raises(DataError, match="'E'"):
        COMMONSENSE["ARC-Easy"].instruct(row)
