from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import BertModel

from rankwise.provenance import (
    DataFingerprint,
    git_commit,
    hardware,
    model_fingerprint,
    versions,
)
from tiny_models import tiny_bert_classifier, tiny_bert_mlm, tiny_llama


class TestModelFingerprint:
    def test_same_weights_same_fingerprint(self) -> None:
        fingerprint = model_fingerprint(tiny_llama())
        assert fingerprint == model_fingerprint(tiny_llama())
        assert len(fingerprint) == 16
        assert int(fingerprint, 16) >= 0

    def test_precision_it_is_loaded_in_does_not_matter(self) -> None:
        fingerprint = model_fingerprint(tiny_llama())
        assert model_fingerprint(tiny_llama().to(torch.bfloat16)) == fingerprint
        assert model_fingerprint(tiny_llama().to(torch.float64)) == fingerprint

    def test_modes_and_freezing_do_not_matter(self) -> None:
        model = tiny_llama()
        before = model_fingerprint(model)
        assert model_fingerprint(model.train().requires_grad_(False)) == before

    def test_weights_matter(self) -> None:
        model = tiny_llama()
        before = model_fingerprint(model)
        assert model_fingerprint(tiny_llama(seed=1)) != before
        model.model.norm.weight.data[0] = 2
        assert model_fingerprint(model) != before

    def test_names_and_shapes_matter(self) -> None:
        zeros = [nn.Linear(4, 6, bias=False), nn.Linear(6, 4, bias=False)]
        for layer in zeros:
            nn.init.zeros_(layer.weight)
        named = nn.ModuleDict({"a": zeros[0]}), nn.ModuleDict({"b": zeros[0]})
        found = {model_fingerprint(m) for m in (*zeros, *named)}
        assert len(found) == 4

    def test_random_heads_do_not_matter(self) -> None:
        classifier = tiny_bert_classifier()
        before = model_fingerprint(classifier)
        nn.init.normal_(classifier.classifier.weight)
        assert model_fingerprint(classifier) == before
        masked = tiny_bert_mlm()
        body = BertModel(masked.config, add_pooling_layer=False)
        body.load_state_dict(masked.bert.state_dict())
        assert model_fingerprint(masked) == model_fingerprint(body)

    def test_meta_device_and_empty_parameters(self) -> None:
        with torch.device("meta"):
            first, second = nn.Linear(4, 5), nn.Linear(5, 4)
        assert model_fingerprint(first) != model_fingerprint(second)
        assert len(model_fingerprint(nn.ParameterList([nn.Parameter(torch.zeros(0))]))) == 16

    def test_attribute_called_base_model_need_not_be_a_module(self) -> None:
        model = nn.Linear(4, 5)
        model.base_model = "org/name"  # type: ignore[assignment]
        assert len(model_fingerprint(model)) == 16


def data_fingerprint(*batches: dict[str, object]) -> str:
    fingerprint = DataFingerprint()
    for batch in batches:
        fingerprint.update(batch)
    return fingerprint.hexdigest()


class TestDataFingerprint:
    def test_values_shapes_and_names_matter(self) -> None:
        x = torch.arange(6)
        found = {
            data_fingerprint({"a": x}),
            data_fingerprint({"b": x}),
            data_fingerprint({"a": x.reshape(2, 3)}),
            data_fingerprint({"a": x + 1}),
            data_fingerprint({"a": x}, {"a": x}),
            data_fingerprint(),
        }
        assert len(found) == 6

    def test_order_of_keys_does_not_matter(self) -> None:
        x, y = torch.arange(3), torch.ones(2)
        assert data_fingerprint({"a": x, "b": y}) == data_fingerprint({"b": y, "a": x})

    @pytest.mark.parametrize(
        "value",
        [
            torch.tensor(3),
            torch.zeros(0),
            torch.zeros(2, 3, dtype=torch.bfloat16).T,
            torch.ones(3, dtype=torch.bool),
            torch.ones(2, requires_grad=True),
        ],
    )
    def test_any_tensor(self, value: torch.Tensor) -> None:
        assert data_fingerprint({"a": value, "name": "text"}) == data_fingerprint({"a": value})


def test_versions_are_of_what_is_installed() -> None:
    found = versions()
    assert found["torch"] == torch.__version__ or torch.__version__.startswith(found["torch"])
    assert {"python", "transformers", "peft"} <= set(found)


def test_hardware_is_this_machine() -> None:
    facts = hardware()
    assert facts["torch_threads"] == torch.get_num_threads()
    assert int(facts["cores"]) >= 1
    assert facts["processor"]


class TestGitCommit:
    def test_outside_a_repository(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
        assert git_commit() is None

    def test_without_git(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATH", "")
        assert git_commit() is None

    def test_clean_and_changed(self, repository: Path) -> None:
        assert git_commit() == head_of(repository)
        (repository / "code" / "a").write_text("2")
        assert git_commit() == head_of(repository) + "-dirty"

    def test_files_git_does_not_know_are_no_change(self, repository: Path) -> None:
        (repository / "new").write_text("1")
        assert git_commit() == head_of(repository)

    def test_what_a_run_writes_is_no_change(
        self, repository: Path, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        elsewhere = tmp_path_factory.mktemp("outside")
        (repository / "[results]" / "table.md").write_text("2")
        assert git_commit() == head_of(repository) + "-dirty"
        assert git_commit([Path("[results]"), elsewhere]) == head_of(repository)
        (repository / "code" / "a").write_text("2")
        assert git_commit([Path("[results]")]) == head_of(repository) + "-dirty"

    def test_results_beside_the_code_hide_nothing(self, repository: Path) -> None:
        (repository / "code" / "a").write_text("2")
        assert git_commit([repository]) == head_of(repository) + "-dirty"


def run_git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    return subprocess.run(
        ["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True
    ).stdout.strip()


def head_of(folder: Path) -> str:
    return run_git(folder, "rev-parse", "HEAD")[:12]


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One commit of code and of results; it is the current folder."""
    run_git(tmp_path, "init", "--quiet")
    for name in ("code/a", "[results]/table.md"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("1")
    run_git(tmp_path, "add", "-A")
    run_git(tmp_path, "commit", "--quiet", "-m", "one")
    monkeypatch.chdir(tmp_path)
    return tmp_path
