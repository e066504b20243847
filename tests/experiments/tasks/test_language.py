import math

import pytest
import torch

from rankwise.errors import DataError
from rankwise.experiments.tasks import CompletionTask, MathTask
from rankwise.experiments.tasks.language import encode_completion, greedy, prompt_of
from rankwise.profiling.loss import IGNORED_LABEL
from tiny_folder import save_tiny_llama, write_rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_llama(tmp_path_factory.mktemp("tasks") / "model")


def _problems(path, count):
    return write_rows(
        path, [{"question": f"what is {i}", "answer": f"it is {i}"} for i in range(count)]
    )


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

    def test_rows_that_are_too_long_are_cut_or_dropped(self, folder, tmp_path):
        words = [{"question": "a " * i, "answer": f"b {i}"} for i in range(20)]
        path = str(write_rows(tmp_path / "rows.jsonl", words))
        tests = [{"query": "a " * i, "reply": f"b {i}"} for i in range(20)]
        test = str(write_rows(tmp_path / "test.jsonl", tests))
        settings = {
            "model": str(folder), "train": path, "test": test, "validation_rows": 2,
            "test_prompt_column": "query", "test_completion_column": "reply",
        }  # fmt: skip
        everything = CompletionTask(**settings).load()
        length = sorted(len(row["input_ids"]) for row in everything.test)[9]
        cut = CompletionTask(**settings, max_length=length).load()
        dropped = CompletionTask(**settings, max_length=length, drop_longer=True).load()
        assert len(cut.test) == 20
        for part in ("train", "validation", "test"):
            short = [row for row in getattr(dropped, part) if len(row["input_ids"]) <= length]
            assert short == getattr(dropped, part) != []
            known = [*everything.train, *everything.validation, *everything.test]
            assert all(row in known for row in short)
        assert len(dropped.test) == sum(len(r["input_ids"]) <= length for r in everything.test)
        assert len(dropped.train) + 2 == len(dropped.test) < 20
        with pytest.raises(DataError, match="more than 1 tokens; raise max_length"):
            CompletionTask(**settings, max_length=1, drop_longer=True).load()

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

    def test_the_median_and_the_worst_are_of_rows(self, completion):
        data, model = completion.load(), completion.load_model()
        rows = data.test[:3]
        found = completion.evaluate(model, data, rows)
        alone = [completion.evaluate(model, data, [row])["loss"] for row in rows]
        assert found["median_loss"] == pytest.approx(sorted(alone)[1], rel=1e-5)
        assert found["worst_loss"] == pytest.approx(max(alone), rel=1e-5)
        assert not model._forward_hooks

    def test_a_long_prompt_is_cut_at_its_front(self, folder, tmp_path):
        path = write_rows(tmp_path / "long.jsonl", [{"question": "q " * 300, "answer": "end"}] * 6)
        task = CompletionTask(
            model=str(folder), train=str(path), test=str(path), validation_rows=2, max_length=16
        )
        row = task.load().train[0]
        assert len(row["input_ids"]) == 16
        assert row["labels"][-1] == row["input_ids"][-1] != IGNORED_LABEL

    def test_a_start_leads_every_row_and_is_never_cut(self, folder, tmp_path):
        path = str(
            write_rows(tmp_path / "rows.jsonl", [{"question": "q " * 9, "answer": "end"}] * 6)
        )
        options = {"model": str(folder), "train": path, "test": path, "validation_rows": 2}
        plain = CompletionTask(**options).load()
        started = CompletionTask(**options, start="\n").load()
        first = started.processor("\n")["input_ids"]
        for part in ("train", "validation", "test"):
            for row, bare in zip(getattr(started, part), getattr(plain, part), strict=True):
                assert row["input_ids"] == first + bare["input_ids"]
                assert row["labels"] == [IGNORED_LABEL] * len(first) + bare["labels"]
        cut = CompletionTask(**options, start="\n", max_length=12).load().test[0]
        assert len(cut["input_ids"]) == 12
        assert cut["input_ids"] == first + plain.test[0]["input_ids"][len(first) - 12 :]
        with pytest.raises(DataError, match="fills all of max_length=1; raise it"):
            CompletionTask(**options, start="\n", max_length=1).load()

    def test_a_tokenizers_own_first_token_stays_first(self):
        class WithFirst:
            bos_token_id = 1
            eos_token_id = None

            def __call__(self, text, *, add_special_tokens=True, verbose=True):
                return {"input_ids": [1] * add_special_tokens + [ord(c) for c in text]}

        row = encode_completion("q", "a", WithFirst(), 8, start="\n")
        assert row["input_ids"] == [1, 10, ord("q"), ord("a")]
        assert encode_completion("q", "a", WithFirst(), 8)["input_ids"] == [1, ord("q"), ord("a")]
        assert encode_completion("", "a", WithFirst(), 8, start="\n")["input_ids"] == [1, 10, 97]
        assert encode_completion("", "a", WithFirst(), 8)["input_ids"] == [1, 97]
        assert encode_completion("bcdef", "a", WithFirst(), 4)["input_ids"] == [1, 101, 102, 97]

    def test_blank_rows_of_plain_text_are_left_out(self, folder, tmp_path):
        texts = ["one", "", "two", "  ", "three", "four"]
        path = str(write_rows(tmp_path / "text.jsonl", [{"text": text} for text in texts]))
        task = CompletionTask(
            model=str(folder),
            train=path,
            test=path,
            prompt_column="",
            completion_column="text",
            validation_rows=1,
        )
        data = task.load()
        assert (len(data.train), len(data.test)) == (3, 4)


class TestMath:
    @pytest.fixture
    def task(self, folder, tmp_path):
        rows = [{"question": f"what is {i}", "answer": f"so\n#### {i}"} for i in range(12)]
        path = str(write_rows(tmp_path / "rows.jsonl", rows))
        return MathTask(model=str(folder), train=path, test=path, validation_rows=3, generate=4)

    def test_the_number_is_kept(self, task):
        assert [row["number"] for row in task.load().test] == list(map(float, range(12)))

    def test_exact_match_counts_right_numbers(self, task, monkeypatch):
        data, model = task.load(), task.load_model()
        said = ["it is 0", "#### 3.5", "the answer is 7", "no idea"]
        monkeypatch.setattr(
            "rankwise.experiments.tasks.language.greedy", lambda *args, **kwargs: said
        )
        found = task.evaluate(model, data, data.test)
        assert found["exact_match"] == 0.5  # the rows 0, 4, 7, 11 are asked
        plain = CompletionTask.evaluate(task, model, data, data.test)
        assert found["loss"] == plain["loss"]

    def test_greedy_takes_the_likeliest_token_each_time(self, task):
        data, model = task.load(), task.load_model().train()
        texts = greedy(model, data, data.test[:3], 5, size=2)
        assert model.training
        model.eval()
        for row, text in zip(data.test[:3], texts, strict=True):
            ids = prompt_of(row)
            with torch.no_grad():
                for _ in range(5):
                    ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
                    if ids[-1] == data.processor.eos_token_id:
                        break
            made = ids[len(prompt_of(row)) :]
            assert data.processor.decode(made, skip_special_tokens=True) == text

    def test_without_generation_only_the_loss(self, folder, task):
        plain = MathTask(
            model=str(folder), train=task.train, test=task.test, validation_rows=3, generate=0
        )
        data = plain.load()
        found = plain.evaluate(plain.load_model(), data, data.test)
        assert set(found) == {"loss", "perplexity", "median_loss", "worst_loss"}
        with pytest.raises(DataError, match="generate=0"):
            MathTask(model="m", train="a", test="b", generate=0, metric="exact_match")

    def test_a_test_row_without_a_number(self, folder, tmp_path, task):
        bad = write_rows(tmp_path / "bad.jsonl", [{"question": "q", "answer": "none"}])
        broken = MathTask(model=str(folder), train=task.train, test=str(bad), validation_rows=3)
        with pytest.raises(DataError, match="holds no number"):
            broken.load()

    def test_other_columns_and_subset_of_the_test_part(self, folder, tmp_path):
        train = write_rows(tmp_path / "a.jsonl", [{"q": f"{i}", "a": f"is {i}"} for i in range(8)])
        test = write_rows(tmp_path / "b.jsonl", [{"question": "1", "answer": "is 1"}])
        task = MathTask(
            model=str(folder),
            train=str(train),
            test=str(test),
            prompt_column="q",
            completion_column="a",
            test_prompt_column="question",
            test_completion_column="answer",
            validation_rows=2,
        )
        data = task.load()
        assert data.test[0]["input_ids"] in [
            row["input_ids"] for row in [*data.train, *data.validation]
        ]


class TestMetric:
    def test_the_first_is_the_default(self, completion):
        assert completion.metric == "loss"
        assert completion.lower_is_better

    def test_another_may_count(self):
        task = MathTask(model="m", train="a", test="b", metric="exact_match")
        assert not task.lower_is_better

    def test_an_unknown_one(self):
        with pytest.raises(DataError, match="'perplexity'"):
            CompletionTask(model="m", train="a", test="b", metric="perplexty")
