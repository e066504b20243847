import math

import pytest
import torch
from sklearn.metrics import matthews_corrcoef

from rankwise.errors import DataError
from rankwise.experiments.tasks import (
    AcceptabilityTask,
    ChoiceTask,
    ClassificationTask,
    CompletionTask,
    matthews_correlation,
)
from rankwise.profiling.loss import IGNORED_LABEL
from tiny_folder import save_tiny_llama, write_rows
from tiny_models import bert_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_llama(tmp_path_factory.mktemp("tasks") / "model")


def _problems(path, count):
    return write_rows(
        path, [{"question": f"what is {i}", "answer": f"it is {i}"} for i in range(count)]
    )


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


@pytest.fixture
def completion(folder, tmp_path):
    return CompletionTask(
        model=str(folder),
        train=str(_problems(tmp_path / "train.jsonl", 20)),
        test=str(_problems(tmp_path / "test.jsonl", 9)),
        validation_rows=4,
        max_test=3,
    )


class TestParts:
    def test_sizes_and_disjointness(self, completion):
        data = completion.load()
        assert (len(data.train), len(data.validation), len(data.test)) == (16, 4, 3)
        train = {tuple(row["input_ids"]) for row in data.train}
        assert not train & {tuple(row["input_ids"]) for row in data.validation}

    def test_validation_is_the_same_every_time(self, completion):
        assert completion.load().validation == completion.load().validation

    def test_test_rows_are_spread(self, completion, folder):
        rows = completion.load().test
        everything = CompletionTask(
            model=str(folder), train=completion.train, test=completion.test, validation_rows=4
        ).load()
        assert rows == [everything.test[i] for i in (0, 4, 8)]

    def test_too_few_rows(self, completion, folder):
        task = CompletionTask(
            model=str(folder), train=completion.train, test=completion.test, validation_rows=20
        )
        with pytest.raises(DataError, match="validation_rows=20"):
            task.load()

    def test_a_missing_column_is_named(self, folder, tmp_path):
        path = str(write_rows(tmp_path / "rows.jsonl", [{"text": "a"}] * 9))
        task = CompletionTask(model=str(folder), train=path, test=path, validation_rows=2)
        with pytest.raises(DataError, match="'question'"):
            task.load()


class TestCompletion:
    def test_only_the_completion_is_labelled(self, completion):
        row = completion.load().train[0]
        labels = torch.tensor(row["labels"])
        first = int((labels != IGNORED_LABEL).nonzero()[0])
        assert (labels[:first] == IGNORED_LABEL).all()
        assert labels[first:].tolist() == row["input_ids"][first:]

    def test_loss_is_that_of_the_model(self, completion):
        data, model = completion.load(), completion.load_model()
        found = completion.evaluate(model, data, data.test)
        batch = data.collate(data.test)
        expected = float(model(**batch).loss.detach())
        assert found["loss"] == pytest.approx(expected, rel=1e-5)
        assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))

    def test_a_long_prompt_is_cut_at_its_front(self, folder, tmp_path):
        path = write_rows(tmp_path / "long.jsonl", [{"question": "q " * 300, "answer": "end"}] * 6)
        task = CompletionTask(
            model=str(folder), train=str(path), test=str(path), validation_rows=2, max_length=16
        )
        row = task.load().train[0]
        assert len(row["input_ids"]) == 16
        assert row["labels"][-1] == row["input_ids"][-1] != IGNORED_LABEL


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
        right = 0
        for row in data.test:
            scores = []
            for candidate in row["candidates"]:
                batch = data.collate([candidate])
                labelled = int((batch["labels"][:, 1:] != IGNORED_LABEL).sum())
                scores.append(-float(model(**batch).loss.detach()) * labelled)
            right += int(torch.tensor(scores).argmax()) == row["answer"]
        assert task.evaluate(model, data, data.test)["accuracy"] == right / len(data.test)
        assert not model.training

    def test_an_answer_outside_the_choices(self, folder, tmp_path):
        rows = [{"instruction": "no format", "output": "x", "answer": "x"}] * 6
        path = str(write_rows(tmp_path / "rows.jsonl", rows))
        task = ChoiceTask(model=str(folder), train=path, test=path, validation_rows=2)
        with pytest.raises(DataError, match="Answer format"):
            task.load()


class TestClassification:
    @pytest.fixture
    def encoder(self, folder, tmp_path):
        from transformers import AutoTokenizer, BertModel

        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.save_pretrained(tmp_path / "bert")
        BertModel(bert_config(vocab_size=len(tokenizer))).save_pretrained(tmp_path / "bert")
        return str(tmp_path / "bert")

    @pytest.mark.parametrize("columns", [2, 4])
    def test_tab_separated_files(self, encoder, tmp_path, columns):
        lines = [f"a sentence {i}\t{i % 2}" for i in range(10)]
        if columns == 4:
            lines = [f"src\t{i % 2}\t\ta sentence {i}" for i in range(10)]
        path = tmp_path / "rows.tsv"
        path.write_text("\n".join(lines) + "\n")
        task = ClassificationTask(model=encoder, train=str(path), test=str(path), validation_rows=3)
        data = task.load()
        assert [row["labels"] for row in data.test] == [i % 2 for i in range(10)]
        model = task.load_model()
        found = task.evaluate(model, data, data.test)
        logits = model(**{k: v for k, v in data.collate(data.test).items() if k != "labels"}).logits
        hits = logits.argmax(-1) == torch.tensor([row["labels"] for row in data.test])
        assert found["accuracy"] == pytest.approx(float(hits.float().mean()))

    def test_a_broken_line_is_named(self, encoder, tmp_path):
        path = tmp_path / "rows.tsv"
        path.write_text("fine\t1\nbroken\n")
        task = AcceptabilityTask(model=encoder, train=str(path), test=str(path))
        with pytest.raises(DataError, match="line 2"):
            task.load()


@pytest.mark.parametrize("classes", [2, 3])
def test_matthews_is_sklearns(classes):
    generator = torch.Generator().manual_seed(classes)
    true = torch.randint(classes, (60,), generator=generator).tolist()
    predicted = torch.randint(classes, (60,), generator=generator).tolist()
    assert matthews_correlation(predicted, true) == pytest.approx(
        matthews_corrcoef(true, predicted)
    )
    assert matthews_correlation([1] * 60, true) == 0.0
