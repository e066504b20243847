"""Models and data sets by hub id, from a hub on this machine and with an empty cache."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml
from transformers import AutoTokenizer, BertModel

from hub_rows import HUB_ROWS
from local_hub import local_hub
from rankwise.experiments.tasks.commonsense import COMMONSENSE
from tiny_folder import SENTENCES, save_tiny_llama
from tiny_models import bert_config

Call = Callable[..., "subprocess.CompletedProcess[str]"]


def publish(root: Path, name: str, subset: str | None, splits: dict[str, list[Any]]) -> None:
    """A data set as most of the hub's are: a parquet file a split, in the subset's folder."""
    repo = root / "datasets" / name
    folder = subset or "data"
    for split, rows in splits.items():
        path = repo / folder / f"{split}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_list(rows).to_parquet(path)
    card = repo / "README.md"
    known = yaml.safe_load(card.read_text().split("---")[1])["configs"] if card.exists() else []
    files = [{"split": split, "path": f"{folder}/{split}-*"} for split in splits]
    known.append({"config_name": subset or "default", "data_files": files})
    card.write_text(f"---\n{yaml.safe_dump({'configs': known})}---\n")


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, list[str]]]:
    root = tmp_path_factory.mktemp("hub")
    llama = save_tiny_llama(root / "models" / "org" / "llama")
    tokenizer = AutoTokenizer.from_pretrained(llama)
    tokenizer.save_pretrained(root / "models" / "org" / "bert")
    encoder = BertModel(bert_config(vocab_size=len(tokenizer)))
    encoder.save_pretrained(root / "models" / "org" / "bert")
    lines = [{"question": f"{s[:20]} {i}", "answer": s[20:]} for i in range(6) for s in SENTENCES]
    publish(root, "org/lines", "main", {"train": lines[:16], "test": lines[16:]})
    labelled = [{"sentence": s, "label": i % 2, "idx": i} for i, s in enumerate(SENTENCES * 4)]
    publish(root, "nyu-mll/glue", "sst2", {"train": labelled, "validation": labelled[:4]})
    for part, known in COMMONSENSE.items():
        rows = {known.train_split: [HUB_ROWS[part]] * 2, known.test_split: [HUB_ROWS[part]]}
        publish(root, known.hub_id, known.subset, rows)
    with local_hub(root) as (address, asked):
        yield address, asked


@pytest.fixture
def call(hub: tuple[str, list[str]], tmp_path: Path) -> Call:
    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        settings = {"HF_ENDPOINT": hub[0], "HF_HOME": str(tmp_path / "cache")}
        return subprocess.run(
            [sys.executable, "-m", "rankwise.cli", *map(str, arguments)],
            env={key: v for key, v in os.environ.items() if key != "HF_HUB_OFFLINE"} | settings,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )

    return run


def test_profile(hub: tuple[str, list[str]], call: Call, tmp_path: Path) -> None:
    columns = ["subset=main", "data.prompt_column=question", "completion_column=answer"]
    done = call("profile", "org/llama", "org/lines", *columns, "--out", tmp_path / "p")
    assert done.returncode == 0, done.stderr
    assert "gradient intrinsic dimensionality of org/llama" in done.stdout
    provenance = json.loads((tmp_path / "p" / "profile.json").read_text())["provenance"]
    assert provenance["model"] == "org/llama"
    assert any("/org/llama/resolve/" in asked and "safetensors" in asked for asked in hub[1])
    assert any(
        "/datasets/org/lines/resolve/" in asked and "main/train" in asked for asked in hub[1]
    )


def test_compare(call: Call, tmp_path: Path) -> None:
    experiment = {
        "output": "out",
        "tasks": [
            {"name": "lines", "kind": "completion", "model": "org/llama", "train": "org/lines"}
            | {"test": "org/lines", "subset": "main", "validation_rows": 4},
            {"name": "choice", "kind": "commonsense", "model": "org/llama", "validation_rows": 4},
            {"name": "sst2", "kind": "glue", "model": "org/bert", "subset": "sst2"}
            | {"validation_rows": 4},
        ],
        "methods": ["ralora"],
        "budgets": [2],
        "seeds": [0],
        "learning_rates": [1e-2],
        "training": {"steps": 1, "batch_size": 4, "evaluations": 1},
        "profile": {"batches": 1},
        "reference": {"rank": 2},
    }
    (tmp_path / "experiment.yaml").write_text(yaml.safe_dump(experiment))
    done = call("compare", "experiment.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    records = [json.loads(path.read_text()) for path in (tmp_path / "out/records").glob("*.json")]
    tests = {record["task"]: record["test"] for record in records}
    assert set(tests) == {"lines", "choice", "sst2"}
    assert {f"accuracy_{part}" for part in COMMONSENSE} <= set(tests["choice"])
    # each published part has another size, so that no other can have been taken for it
    rows = {record["task"]: record["rows"]["test"] for record in records}
    assert rows == {"lines": 6 * len(SENTENCES) - 16, "sst2": 4, "choice": len(COMMONSENSE)}


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        ("org/absent", "org/lines", "model='org/absent' cannot be loaded"),
        ("org/llama", "org/absent", "hub data set org/absent: cannot be read"),
    ],
)
def test_what_the_hub_lacks(
    call: Call, tmp_path: Path, model: str, data: str, message: str
) -> None:
    done = call("profile", model, data, "--out", tmp_path / "p")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert message in done.stderr.splitlines()[-1]
    assert not (tmp_path / "p").exists()
