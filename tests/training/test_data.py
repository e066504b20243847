from __future__ import annotations

from pathlib import Path

import pandas
import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rankwise.errors import DataError
from rankwise.profiling.loss import IGNORED_LABEL
from rankwise.training.config import DataConfig
from rankwise.training.data import encode_prompt, load_token_data
from tiny_folder import SENTENCES, save_tiny_llama, write_rows, write_texts


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(save_tiny_llama(tmp_path_factory.mktemp("model")))


def test_text_is_learned_whole_and_ends(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    train = write_rows(tmp_path / "t.jsonl", [{"text": text} for text in SENTENCES])
    held = write_rows(tmp_path / "h.jsonl", [{"text": SENTENCES[0]}])
    data = load_token_data(DataConfig(train=str(train), held_out=str(held)), tokenizer, seed=0)
    row = data.held_out[0]
    assert row["labels"] == row["input_ids"]
    assert row["input_ids"][-1] == tokenizer.eos_token_id
    assert tokenizer.decode(row["input_ids"][:-1]) == SENTENCES[0]
    assert len(data.train) == 4


def test_only_the_completion_counts(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [{"prompt": "the quick ", "completion": "brown fox"}] * 4
    path = write_rows(tmp_path / "t.jsonl", rows)
    data = load_token_data(DataConfig(train=str(path)), tokenizer, seed=0)
    row = data.train[0]
    counted = [label for label in row["labels"] if label != IGNORED_LABEL]
    assert tokenizer.decode(counted[:-1]) == "brown fox"
    assert counted[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(row["input_ids"][:-1]) == "the quick brown fox"


def test_padding_carries_no_label(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = write_texts(tmp_path / "t.jsonl")
    data = load_token_data(DataConfig(train=str(path)), tokenizer, seed=0)
    batch = next(iter(data.loader(8, seed=0)))
    assert ((batch["labels"] == IGNORED_LABEL) == (batch["attention_mask"] == 0)).all()


def test_packing_fills_every_sequence(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = write_texts(tmp_path / "t.jsonl", 40)
    data = load_token_data(
        DataConfig(train=str(path), packing=True, max_length=16), tokenizer, seed=0
    )
    lengths = [len(row["input_ids"]) for row in data.train]
    assert set(lengths[:-1]) == {16}


def test_packing_cuts_no_completion(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [{"prompt": "the quick " * 9, "completion": "brown fox " * 9}] * 2
    path = str(write_rows(tmp_path / "t.jsonl", rows))
    whole = load_token_data(DataConfig(train=path, held_out=path), tokenizer, seed=0).train
    packed = load_token_data(
        DataConfig(train=path, held_out=path, packing=True, max_length=8), tokenizer, seed=0
    ).train
    learned = [
        [label for row in data for label in row["labels"] if label != IGNORED_LABEL]
        for data in (whole, packed)
    ]
    assert learned[0] == learned[1]
    assert len(whole[0]["input_ids"]) > 8


def test_truncation(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = write_texts(tmp_path / "t.jsonl", 8)
    data = load_token_data(DataConfig(train=str(path), max_length=5), tokenizer, seed=0)
    assert {len(row["input_ids"]) for row in data.train} == {5}


@pytest.mark.parametrize("packing", [False, True])
def test_what_texts_start_with_is_read_and_not_learned(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, packing: bool
) -> None:
    path = str(write_rows(tmp_path / "t.jsonl", [{"text": "brown fox"}] * 2))
    config = DataConfig(train=path, held_out=path, start="the", packing=packing)
    data = load_token_data(config, tokenizer, seed=0)
    start, text = tokenizer("the")["input_ids"], tokenizer("brown fox")["input_ids"]
    once = {
        "input_ids": [*start, *text, tokenizer.eos_token_id],
        "labels": [IGNORED_LABEL] * len(start) + [*text, tokenizer.eos_token_id],
    }
    row = {key: value * 2 if packing else value for key, value in once.items()}
    assert {key: data.train[0][key] for key in row} == row


def test_prompts_come_after_the_start(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [{"prompt": "quick ", "completion": "brown fox"}] * 2
    path = str(write_rows(tmp_path / "t.jsonl", rows))
    with_start, without = (
        load_token_data(DataConfig(train=path, start=start), tokenizer, seed=0).train[0]
        for start in ("the ", "")
    )
    first = tokenizer("the ")["input_ids"]
    assert with_start["input_ids"] == first + without["input_ids"]
    assert with_start["labels"] == [IGNORED_LABEL] * len(first) + without["labels"]


@pytest.mark.parametrize("start", ["\n", ""])
def test_a_tokenizers_own_first_token_leads(start: str) -> None:
    class WithFirst:
        bos_token_id = 1

        def __call__(
            self, text: str, *, add_special_tokens: bool, verbose: bool
        ) -> dict[str, list[int]]:
            return {"input_ids": [1] * add_special_tokens + [ord(c) for c in text]}

    first, ids = encode_prompt("ab", WithFirst(), start)  # type: ignore[arg-type]
    assert (first, ids) == ([1, *map(ord, start)], [ord("a"), ord("b")])


def test_packed_texts_learn_the_tokenizers_own_first_token(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(save_tiny_llama(tmp_path / "model"))
    first = tokenizer("the")["input_ids"][0]
    tokenizer.bos_token = tokenizer.convert_ids_to_tokens(first)
    own = TemplateProcessing(
        single=f"{tokenizer.bos_token} $A", special_tokens=[(tokenizer.bos_token, first)]
    )
    tokenizer.backend_tokenizer.post_processor = own
    path = str(write_rows(tmp_path / "t.jsonl", [{"text": "brown fox"}] * 2))
    row = load_token_data(
        DataConfig(train=path, held_out=path, packing=True), tokenizer, seed=0
    ).train[0]
    assert row["input_ids"].count(first) == 2
    assert row["labels"] == row["input_ids"]


@pytest.mark.parametrize("suffix", ["json", "csv", "parquet"])
def test_formats(tmp_path: Path, tokenizer: PreTrainedTokenizerBase, suffix: str) -> None:
    frame = pandas.DataFrame({"text": SENTENCES})
    path = tmp_path / f"t.{suffix}"
    write = {
        "json": lambda: frame.to_json(path, orient="records", lines=True),
        "csv": lambda: frame.to_csv(path, index=False),
        "parquet": lambda: frame.to_parquet(path),
    }
    write[suffix]()
    data = load_token_data(DataConfig(train=str(path), held_out=str(path)), tokenizer, seed=0)
    decoded = [tokenizer.decode(row["input_ids"][:-1]) for row in data.train]
    assert decoded == SENTENCES


def test_cells_of_csv_are_text_as_written(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    path = tmp_path / "t.csv"
    path.write_text("prompt,completion,note\na,007,\nb,NA,1\nc,null,2\nd,3.10,3\n")
    config = DataConfig(train=str(path), held_out=str(path))
    rows = load_token_data(config, tokenizer, seed=0).train
    assert [tokenizer.decode(row["input_ids"][:-1]) for row in rows] == [
        "a007", "bNA", "cnull", "d3.10",
    ]  # fmt: skip
    path.write_text("prompt,completion\na,1\nb,\n")
    with pytest.raises(DataError, match="a row has an empty cell where text is expected"):
        load_token_data(config, tokenizer, seed=0)


def test_numbers_of_json_are_text(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = str(write_rows(tmp_path / "t.jsonl", [{"prompt": "a", "completion": 42}] * 2))
    row = load_token_data(DataConfig(train=path), tokenizer, seed=0).train[0]
    assert tokenizer.decode(row["input_ids"][:-1]) == "a42"


def test_a_split_that_leaves_nothing_to_train_on(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    config = DataConfig(train=str(write_texts(tmp_path / "t.jsonl", 2)), held_out_fraction=0.9)
    with pytest.raises(DataError, match=r"held_out_fraction=0\.9 of the 2 rows .* leaves none"):
        load_token_data(config, tokenizer, seed=0)


def test_split_is_the_seeds(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    config = DataConfig(train=str(write_texts(tmp_path / "t.jsonl", 40)), held_out_fraction=0.25)
    first, again, other = (load_token_data(config, tokenizer, seed=s) for s in (0, 0, 1))
    assert len(first.held_out) == 10
    assert first.held_out[:] == again.held_out[:]
    assert first.held_out[:] != other.held_out[:]


def test_loader_order_is_the_seeds(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = write_texts(tmp_path / "t.jsonl")
    data = load_token_data(DataConfig(train=str(path)), tokenizer, seed=0)
    first, again, other = (next(iter(data.loader(4, seed=s)))["input_ids"] for s in (0, 0, 1))
    assert first.tolist() == again.tolist()
    assert first.tolist() != other.tolist()


def test_limits(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = str(write_texts(tmp_path / "t.jsonl"))
    config = DataConfig(train=path, held_out=path, max_rows=5, max_held_out=3)
    data = load_token_data(config, tokenizer, seed=0)
    assert (len(data.train), len(data.held_out)) == (5, 3)


def test_a_start_longer_than_a_sequence_is_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    path = str(write_texts(tmp_path / "t.jsonl"))
    config = DataConfig(train=path, start=SENTENCES[0], max_length=4)
    with pytest.raises(DataError, match=r"data\.start.* leaves no room .* max_length=4"):
        load_token_data(config, tokenizer, seed=0)


def test_rows_with_nothing_to_predict_are_counted(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"prompt": SENTENCES[0], "completion": "x"}, {"prompt": "a", "completion": "b"}] * 3
    path = str(write_rows(tmp_path / "t.jsonl", rows))
    config = DataConfig(train=path, held_out=path, max_length=4)
    data = load_token_data(config, tokenizer, seed=0)
    assert len(data.train) == 3
    assert "3 of 6 rows leave nothing to predict" in caplog.text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        ("", "is empty"),
        ("{not json\n", "cannot be read"),
        ('{"a": 1, "b": 2}\n', r"has columns a, b; it needs 'text', or 'prompt' and 'completion'"),
        ('{"text": true}\n', "holds bool where text is expected"),
        ('{"text": [{"role": "user"}]}\n', "holds list where text is expected; conversations"),
        ('{"text": null}\n', "empty cell where text is expected"),
        ('{"text": ""}\n', "anything to predict"),
    ],
)
def test_bad_data_is_explained(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, content: str | None, message: str
) -> None:
    path = tmp_path / "t.jsonl"
    if content is not None:
        path.write_text(content)
    config = DataConfig(train=str(path), held_out=str(path))
    with pytest.raises(DataError, match=message):
        load_token_data(config, tokenizer, seed=0)


def test_a_data_set_of_several_configurations(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("main", "socratic"):
        (tmp_path / "org/set" / name).mkdir(parents=True)
        write_texts(tmp_path / "org/set" / name / "train.jsonl")
    (tmp_path / "org/set/README.md").write_text(
        "---\nconfigs:\n"
        "- {config_name: main, data_files: main/train.jsonl}\n"
        "- {config_name: socratic, data_files: socratic/train.jsonl}\n---\n"
    )
    monkeypatch.setattr(Path, "exists", lambda self: False)  # as on the hub
    with pytest.raises(DataError, match=r"available configs: .*main.*Name one with data\.subset"):
        load_token_data(DataConfig(train="org/set"), tokenizer, seed=0)


def test_a_folder_is_no_data(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(DataError, match="name one, or a hub id"):
        load_token_data(DataConfig(train=str(tmp_path)), tokenizer, seed=0)
