import pytest
import torch
from transformers import AutoTokenizer

from rankwise.errors import DataError
from rankwise.experiments.tasks import GlueTextTask, TextToTextTask
from rankwise.experiments.tasks.text_to_text import word_likelihoods
from tiny_folder import save_tiny_llama, write_rows
from tiny_models import tiny_t5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny T5 with the tokenizer of the tiny Llama."""
    place = tmp_path_factory.mktemp("t5") / "model"
    save_tiny_llama(place)
    tokenizer = AutoTokenizer.from_pretrained(place)
    model = tiny_t5(vocab_size=len(tokenizer))
    model.save_pretrained(place)
    return str(place)


@pytest.fixture
def task(folder, tmp_path):
    rows = [{"sentence1": f"it is {i}", "sentence2": f"so {i}", "label": i % 2} for i in range(9)]
    path = str(write_rows(tmp_path / "rows.jsonl", rows))
    return GlueTextTask(model=folder, train=path, test=path, subset="mrpc", validation_rows=3)


def test_rows_are_worded_as_t5_was_taught(task):
    data = task.load()
    tokenizer = data.processor
    row = data.test[1]
    assert tokenizer.decode(row["input_ids"]) == "mrpc sentence1: it is 1 sentence2: so 1"
    assert tokenizer.decode(row["labels"]) == "equivalent"


def test_the_class_is_the_one_whose_words_are_likeliest(task):
    data, model = task.load(), task.load_model().train()
    found = task.evaluate(model, data, data.test)
    assert model.training
    model.eval()
    right = 0
    for row in data.test:
        losses = []
        for word in task.words:
            labels = torch.tensor([data.processor(word)["input_ids"]])
            ids = torch.tensor([row["input_ids"]])
            loss = float(model(input_ids=ids, labels=labels).loss.detach())
            losses.append(loss * labels.shape[1])
        right += losses.index(min(losses)) == row["class"]
    assert found["accuracy"] == pytest.approx(right / len(data.test))
    assert set(found) == {"loss", "accuracy", "matthews", "f1"}


def test_likelihoods_of_rows_of_other_lengths(task):
    data, model = task.load(), task.load_model().eval()
    rows = [data.test[0], {**data.test[1], "input_ids": data.test[1]["input_ids"][:4]}]
    words = [[5, 6, 7], [8]]
    together = word_likelihoods(model, data.collate(rows), words)
    alone = torch.cat([word_likelihoods(model, data.collate([row]), words) for row in rows])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


def test_free_text_is_measured_by_its_loss(folder, tmp_path):
    rows = [{"ask": f"what is {i}", "say": f"it is {i}"} for i in range(6)]
    path = str(write_rows(tmp_path / "rows.jsonl", rows))
    task = TextToTextTask(
        model=folder, train=path, test=path, columns=["ask"], label_column="say", validation_rows=2
    )
    data, model = task.load(), task.load_model()
    assert task.metric == "loss"
    found = task.evaluate(model, data, data.test)
    expected = model.eval()(**data.collate(data.test)).loss
    assert found == {"loss": pytest.approx(float(expected.detach()), rel=1e-5)}


def test_what_cannot_be(folder):
    with pytest.raises(DataError, match="regression"):
        GlueTextTask(model=folder, subset="stsb")
    with pytest.raises(DataError, match="words="):
        TextToTextTask(model=folder, train="a", test="b", metric="accuracy")
