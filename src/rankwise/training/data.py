"""From files or hub data sets to token sequences with labels."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase
from trl import pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from rankwise.errors import DataError, reason_of
from rankwise.profiling.loss import IGNORED_LABEL
from rankwise.provenance import DataFingerprint
from rankwise.training.config import DataConfig

logger = logging.getLogger(__name__)

_FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


@dataclass(frozen=True)
class TokenData:
    """Tokenised rows, `input_ids` and `labels`, with the collator that pads them to a batch."""

    train: datasets.Dataset
    held_out: datasets.Dataset
    collator: DataCollatorForLanguageModeling

    def loader(self, batch_size: int, *, seed: int) -> DataLoader[dict[str, torch.Tensor]]:
        """Shuffled training batches, the same for the same seed."""
        return DataLoader(
            self.train,
            batch_size=batch_size,
            shuffle=True,
            generator=torch.Generator().manual_seed(seed),
            collate_fn=self.collator,
        )

    def held_out_loader(self, batch_size: int) -> DataLoader[dict[str, torch.Tensor]]:
        """Held-out batches in order."""
        return DataLoader(
            self.held_out,
            batch_size=batch_size,
            collate_fn=self.collator,
        )

    def description(self) -> dict[str, dict[str, Any]]:
        """How many sequences each part has, and the fingerprint of their tokens, for a record."""
        parts = {"train": self.train, "held_out": self.held_out}
        return {
            part: {"sequences": len(rows), "fingerprint": _fingerprint(rows)}
            for part, rows in parts.items()
        }


def _fingerprint(rows: datasets.Dataset) -> str:
    digest = DataFingerprint()
    for row in rows:
        digest.update({key: torch.tensor(value) for key, value in row.items()})
    return digest.hexdigest()


def load_token_data(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, *, seed: int
) -> TokenData:
    """Load, split and tokenise what a configuration names.

    Raises:
        DataError: A source is missing, empty, or has neither text nor prompt and completion; or
            `data.start` leaves no room for any.
    """
    if config.start and len(_ids(config.start, tokenizer, special=True)) >= config.max_length:
        raise DataError(
            f"data.start={config.start!r} leaves no room for text within "
            f"max_length={config.max_length} tokens; raise data.max_length."
        )
    with _quiet_datasets():
        train = _load(config.train, config.train_split, config)
        if config.max_rows is not None:
            train = train.select(range(min(config.max_rows, len(train))))
        if config.held_out is None:
            if len(train) < 2:
                raise DataError(f"{config.train}: one row cannot be split; name data.held_out.")
            train, held_out = _split(train, config, seed)
        else:
            held_out = _load(config.held_out, config.held_out_split, config)
        train = _tokenise(train, config, tokenizer, config.train)
        held_out = _tokenise(held_out, config, tokenizer, config.held_out or config.train)
    if config.max_held_out is not None:
        held_out = held_out.select(range(min(config.max_held_out, len(held_out))))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if pad is None:
        raise DataError(
            "the tokenizer has neither a pad nor an end token; set tokenizer.pad_token."
        )
    return TokenData(train, held_out, DataCollatorForLanguageModeling(pad_token_id=pad))


def _split(
    rows: datasets.Dataset, config: DataConfig, seed: int
) -> tuple[datasets.Dataset, datasets.Dataset]:
    try:
        parts = rows.train_test_split(test_size=config.held_out_fraction, seed=seed)
    except ValueError as error:
        raise DataError(
            f"data.held_out_fraction={config.held_out_fraction} of the {len(rows)} rows of "
            f"{config.train} leaves none to train on; lower it, or name data.held_out."
        ) from error
    return parts["train"], parts["test"]


def _as_written(config: DataConfig) -> dict[str, Any]:
    """How a CSV file is read: 007 and NA are text, and only an empty cell is none."""
    columns = (config.text_column, config.prompt_column, config.completion_column)
    converters = dict.fromkeys(columns, str)
    return {"converters": converters, "keep_default_na": False, "na_values": [""]}


def _load(source: str, split: str, config: DataConfig) -> datasets.Dataset:
    path = Path(source).expanduser()
    try:
        if path.suffix in _FORMATS:
            if not path.is_file():
                raise DataError(f"data file {source}: no such file; check the path.")
            if path.stat().st_size == 0:
                raise DataError(f"data file {source}: is empty.")
            kind = _FORMATS[path.suffix]
            options = _as_written(config) if kind == "csv" else {}
            rows = datasets.load_dataset(kind, data_files=str(path), split="train", **options)
        elif path.exists():
            raise DataError(
                f"data {source}: is not a {', '.join(_FORMATS)} file; name one, or a hub id."
            )
        else:
            rows = datasets.load_dataset(source, config.subset, split=split)
    except DataError:
        raise
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        kind = "data file" if path.suffix in _FORMATS else "hub data set"
        raise unreadable(f"{kind} {source}", error, "data.subset") from error
    if len(rows) == 0:
        raise DataError(f"data {source}: holds no rows.")
    return rows


def unreadable(what: str, error: BaseException, subset: str) -> DataError:
    """Why datasets could not read it; `subset` is the key that names a configuration."""
    reason = reason_of(error.__cause__ or error)
    # what datasets says where there are several, all of which it names
    remedy = f" Name one with {subset}." if "Config name is missing" in reason else ""
    return DataError(f"{what}: cannot be read ({reason}).{remedy}")


def _tokenise(
    rows: datasets.Dataset, config: DataConfig, tokenizer: PreTrainedTokenizerBase, source: str
) -> datasets.Dataset:
    """Token ids and labels; rows that leave nothing to predict are dropped and counted."""
    columns = rows.column_names
    prompt, completion = config.prompt_column, config.completion_column
    if prompt in columns and completion in columns:

        def encode(row: dict[str, Any]) -> dict[str, list[int]]:
            return _encode_completion(row[prompt], row[completion], tokenizer, config)

    elif config.text_column in columns:

        def encode(row: dict[str, Any]) -> dict[str, list[int]]:
            return _encode_text(row[config.text_column], tokenizer, config)

    else:
        raise DataError(
            f"data {source}: has columns {', '.join(columns)}; it needs {config.text_column!r}, or "
            f"{prompt!r} and {completion!r}. Name them with data.text_column, data.prompt_column, "
            "data.completion_column."
        )
    encoded = rows.map(encode, remove_columns=columns, load_from_cache_file=False)
    if config.packing:
        encoded = pack_dataset(encoded, config.max_length, strategy="wrapped")
    kept = encoded.filter(
        lambda row: any(label != IGNORED_LABEL for label in row["labels"][1:]),
        load_from_cache_file=False,
    )
    if len(kept) < len(encoded):
        logger.warning(
            "%s: %d of %d rows leave nothing to predict within %d tokens and are dropped",
            source,
            len(encoded) - len(kept),
            len(encoded),
            config.max_length,
        )
    if len(kept) == 0:
        raise DataError(
            f"data {source}: no row has anything to predict within max_length={config.max_length} "
            "tokens; raise data.max_length or check the columns."
        )
    return kept.with_format(None)


def _encode_text(
    text: object, tokenizer: PreTrainedTokenizerBase, config: DataConfig
) -> dict[str, list[int]]:
    first, ids = encode_prompt(text, tokenizer, config.start)
    if not config.start:  # a tokenizer's own first token is learned between packed texts
        first, ids = [], first + ids
    return _row(first, _with_end(ids, tokenizer), config)


def _encode_completion(
    prompt: object, completion: object, tokenizer: PreTrainedTokenizerBase, config: DataConfig
) -> dict[str, list[int]]:
    first, before = encode_prompt(prompt, tokenizer, config.start)
    after = _with_end(_ids(completion, tokenizer, special=False), tokenizer)
    return _row(first + before, after, config)


def _row(read: list[int], learned: list[int], config: DataConfig) -> dict[str, list[int]]:
    end = None if config.packing else config.max_length  # packing cuts what it has joined
    return {
        "input_ids": (read + learned)[:end],
        "labels": ([IGNORED_LABEL] * len(read) + learned)[:end],
    }


def encode_prompt(
    prompt: object, tokenizer: PreTrainedTokenizerBase, start: str = ""
) -> tuple[list[int], list[int]]:
    """Token ids of what stays first, which is `start` and the tokenizer's own, and of the prompt.

    Raises:
        DataError: The prompt is no text.
    """
    if start:
        return _ids(start, tokenizer, special=True), _ids(prompt, tokenizer, special=False)
    ids = _ids(prompt, tokenizer, special=True)
    own = int(ids[:1] == [tokenizer.bos_token_id])
    return ids[:own], ids[own:]


def _ids(text: object, tokenizer: PreTrainedTokenizerBase, *, special: bool) -> list[int]:
    if isinstance(text, int | float) and not isinstance(text, bool):
        text = str(text)  # a whole number as the answer, say
    if text is None:
        raise DataError("a row has an empty cell where text is expected; fill it or leave it out.")
    if not isinstance(text, str):
        raise DataError(
            f"a row holds {type(text).__name__} where text is expected; conversations (lists of "
            "messages) are to be turned into prompt and completion first."
        )
    # verbose=False: a text longer than the model's context is cut here, not fed to the model
    return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


def _with_end(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    end = tokenizer.eos_token_id
    return ids if end is None or (ids and ids[-1] == end) else [*ids, end]


@contextmanager
def _quiet_datasets() -> Iterator[None]:
    """No progress bar per map and filter; the commands show their own."""
    shown = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not shown:
            datasets.enable_progress_bars()
