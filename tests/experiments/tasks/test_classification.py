import pytest
import torch

from rankwise.errors import DataError
from rankwise.experiments.tasks import AcceptabilityTask, ClassificationTask, GlueTask
from rankwise.experiments.tasks.glue import GLUE
from tiny_folder import save_tiny_llama, write_rows
from tiny_models import bert_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_llama(tmp_path_factory.mktemp("classification") / "model")


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
        with torch.no_grad():
            output = model.eval()(**data.collate(data.test))
        hits = output.logits.argmax(-1) == torch.tensor([row["labels"] for row in data.test])
        assert found["accuracy"] == pytest.approx(float(hits.float().mean()))
        assert found["loss"] == pytest.approx(float(output.loss))

    @pytest.mark.parametrize(
        ("labels", "metric", "refused"),
        [(1, "pearson", "accuracy"), (2, "accuracy", "pearson"), (3, "accuracy", "f1")],
    )
    def test_only_what_is_measured_can_count(self, encoder, tmp_path, labels, metric, refused):
        rows = [{"sentence": f"it is {i}", "label": i % 3 % labels} for i in range(12)]
        path = str(write_rows(tmp_path / "rows.jsonl", rows))
        task = ClassificationTask(
            model=encoder, train=path, test=path, labels=labels, validation_rows=3
        )
        assert task.metric == metric
        data = task.load()
        found = task.evaluate(task.load_model(), data, data.test)
        assert set(found) == set(task.measured) == set(task.validation_metrics)
        with pytest.raises(DataError, match=f"metric='{refused}'"):
            ClassificationTask(model=encoder, train=path, test=path, labels=labels, metric=refused)

    def test_the_head_is_trained_whatever_it_is_called(self, encoder, folder, tmp_path):
        for model, head in ((encoder, "classifier"), (str(folder), "score")):
            task = ClassificationTask(model=model, train="a", test="b")
            assert task.kept_in(task.load_model()) == (head,)
        with pytest.raises(DataError, match="Linear has no head named classifier or score"):
            task.kept_in(torch.nn.Linear(2, 2))

    def test_a_broken_line_is_named(self, encoder, tmp_path):
        path = tmp_path / "rows.tsv"
        path.write_text("fine\t1\nbroken\n")
        task = AcceptabilityTask(model=encoder, train=str(path), test=str(path))
        with pytest.raises(DataError, match=r"line 2: 1 columns; 2 \(sentence, label\) or"):
            task.load()
        path.write_text("sentence\tlabel\nfine\t1\n")
        with pytest.raises(DataError, match=r"line 1: label 'label' .*remove a header"):
            task.load()


# columns, metric and labels as on the hub and in the papers (Wang et al. 2018)
GLUE_AS_PUBLISHED = {
    "cola": ("sentence", None, "matthews", 2),
    "sst2": ("sentence", None, "accuracy", 2),
    "mrpc": ("sentence1", "sentence2", "f1", 2),
    "stsb": ("sentence1", "sentence2", "pearson", 1),
    "qqp": ("question1", "question2", "f1", 2),
    "mnli": ("premise", "hypothesis", "accuracy", 3),
    "qnli": ("question", "sentence", "accuracy", 2),
    "rte": ("sentence1", "sentence2", "accuracy", 2),
    "wnli": ("sentence1", "sentence2", "accuracy", 2),
}
# label 0 first; Raffel et al. 2020, appendix D
WORDS = {
    "cola": ["unacceptable", "acceptable"],
    "sst2": ["negative", "positive"],
    "mrpc": ["not_equivalent", "equivalent"],
    "qqp": ["not_duplicate", "duplicate"],
    "mnli": ["entailment", "neutral", "contradiction"],
    "qnli": ["entailment", "not_entailment"],
    "rte": ["entailment", "not_entailment"],
    "wnli": ["not_entailment", "entailment"],
}


def _glue_rows(name, count=10):
    first, second, _, labels = GLUE_AS_PUBLISHED[name]
    return [
        {first: f"it is {i}", "label": i % labels if name != "stsb" else i / 2}
        | ({second: f"and so {i}"} if second else {})
        for i in range(count)
    ]


class TestGlue:
    @pytest.fixture
    def encoder(self, folder, tmp_path):
        from transformers import AutoTokenizer, BertModel

        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.save_pretrained(tmp_path / "bert")
        BertModel(bert_config(vocab_size=len(tokenizer))).save_pretrained(tmp_path / "bert")
        return str(tmp_path / "bert")

    def test_words_are_those_of_t5(self):
        assert {name: list(table.words) for name, table in GLUE.items() if table.words} == WORDS
        assert set(GLUE) == set(GLUE_AS_PUBLISHED)

    @pytest.mark.parametrize("name", GLUE_AS_PUBLISHED)
    def test_every_task_is_read_and_its_metric_measured(self, encoder, tmp_path, name):
        path = str(write_rows(tmp_path / "rows.jsonl", _glue_rows(name)))
        task = GlueTask(model=encoder, train=path, test=path, subset=name, validation_rows=3)
        data, model = task.load(), task.load_model()
        assert model.config.num_labels == GLUE_AS_PUBLISHED[name][3]
        found = task.evaluate(model, data, data.test)
        assert task.metric == GLUE_AS_PUBLISHED[name][2]
        assert -1 <= found[task.metric] <= 1
        with torch.no_grad():
            trained = model.eval()(**data.collate(data.test)).loss
        assert found["loss"] == pytest.approx(float(trained))
        assert set(found) <= set(task.validation_metrics)

    def test_pairs_are_two_texts(self, encoder, tmp_path):
        path = str(write_rows(tmp_path / "rows.jsonl", _glue_rows("mrpc")))
        options = {"model": encoder, "train": path, "test": path, "validation_rows": 3}
        pair = GlueTask(**options, subset="mrpc").load().test[0]["input_ids"]
        single = ClassificationTask(**options, text_column="sentence1").load().test[0]["input_ids"]
        assert pair[: len(single)] == single
        assert len(pair) > len(single)

    def test_mnli_is_tested_on_the_matched_part(self):
        assert GlueTask(model="m", subset="mnli").test_split == "validation_matched"
        assert GlueTask(model="m", subset="rte").test_split == "validation"

    def test_another_metric_may_count(self):
        assert GlueTask(model="m", subset="cola", metric="accuracy").metric == "accuracy"

    def test_an_unknown_task(self):
        with pytest.raises(DataError, match="'mrpc'"):
            GlueTask(model="m", subset="mrcp")

    def test_a_hidden_label_is_refused(self, encoder, tmp_path):
        rows = [{"sentence": "x", "label": -1}] * 9
        path = str(write_rows(tmp_path / "rows.jsonl", rows))
        task = GlueTask(model=encoder, train=path, test=path, subset="cola", validation_rows=3)
        with pytest.raises(DataError, match="-1"):
            task.load()
