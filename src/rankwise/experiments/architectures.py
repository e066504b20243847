"""Dimensions of the papers' models, so that an experiment can be counted without any weights.

Each entry holds what decides the shapes of the linear layers, as the `config.json` of the model on
the hub has it. Nothing is downloaded: models are built from these numbers on the meta device, where
tensors have shapes and no values.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from rankwise.errors import ConfigError, reason_of
from rankwise.experiments.tasks import Task


@dataclass(frozen=True)
class Architecture:
    """One model.

    Attributes:
        family: transformers' `model_type`.
        dimensions: Arguments of its configuration.
    """

    family: str
    dimensions: Mapping[str, Any]

    def config(self) -> PretrainedConfig:
        """The configuration that transformers builds a model from."""
        config = AutoConfig.for_model(self.family, **self.dimensions)
        assert isinstance(config, PretrainedConfig)
        return config


def _decoder(
    family: str, vocabulary: int, width: int, inner: int, layers: int, heads: int, **more: Any
) -> Architecture:
    return Architecture(
        family,
        {
            "vocab_size": vocabulary,
            "hidden_size": width,
            "intermediate_size": inner,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            **more,
        },
    )


def _clip(patch: int) -> Architecture:
    """ViT-B and a text tower of width 512 (Radford et al. 2021, tables 19 and 20)."""
    vision = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
    text = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12}
    return Architecture(
        "clip",
        {
            "vision_config": vision
            | {"num_attention_heads": 12, "image_size": 224, "patch_size": patch},
            "text_config": text | {"num_attention_heads": 8, "vocab_size": 49408},
            "projection_dim": 512,
        },
    )


SMALL_VIT: Mapping[str, Any] = {
    "image_size": 28,
    "patch_size": 4,
    "hidden_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 192,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
"""What `scripts/pretrain_vit.py` makes with its defaults."""

_LLAMA_3 = _decoder("llama", 128_256, 4096, 14_336, 32, 32, num_key_value_heads=8)

ARCHITECTURES: Mapping[str, Architecture] = {
    "meta-llama/Llama-3.1-8B": _LLAMA_3,
    "meta-llama/Meta-Llama-3-8B": _LLAMA_3,
    "Qwen/Qwen2-0.5B": _decoder(
        "qwen2", 151_936, 896, 4864, 24, 14, num_key_value_heads=2, tie_word_embeddings=True
    ),
    "microsoft/Phi-3-mini-4k-instruct": _decoder(
        "phi3", 32_064, 3072, 8192, 32, 32, num_key_value_heads=32
    ),
    "EleutherAI/pythia-1.4b": _decoder("gpt_neox", 50_304, 2048, 8192, 24, 16),
    "EleutherAI/pythia-2.8b": _decoder("gpt_neox", 50_304, 2560, 10_240, 32, 32),
    "FacebookAI/roberta-base": _decoder(
        "roberta", 50_265, 768, 3072, 12, 12, max_position_embeddings=514, type_vocab_size=1
    ),
    "FacebookAI/roberta-large": _decoder(
        "roberta", 50_265, 1024, 4096, 24, 16, max_position_embeddings=514, type_vocab_size=1
    ),
    "google-t5/t5-base": Architecture(
        "t5",
        {
            "vocab_size": 32_128,
            "d_model": 768,
            "d_kv": 64,
            "d_ff": 3072,
            "num_layers": 12,
            "num_heads": 12,
        },
    ),
    "openai/clip-vit-base-patch16": _clip(16),
    "openai/clip-vit-base-patch32": _clip(32),
    "facebook/dinov2-base": Architecture(
        "dinov2",
        {
            "hidden_size": 768,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "mlp_ratio": 4,
            "image_size": 518,
            "patch_size": 14,
        },
    ),
    "HuggingFaceTB/SmolLM2-135M-Instruct": _decoder(
        "llama", 49_152, 576, 1536, 30, 9, num_key_value_heads=3, tie_word_embeddings=True
    ),
    "sentence-transformers/all-MiniLM-L6-v2": _decoder("bert", 30_522, 384, 1536, 6, 12),
    "small-vit": Architecture("vit", SMALL_VIT),
}
"""By hub id; `small-vit` is the project's own."""


def read_config(model: str) -> PretrainedConfig:
    """The configuration in a local folder or on the hub.

    Raises:
        ConfigError: There is none.
    """
    try:
        config = AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        reason = reason_of(error)
        raise ConfigError(f"model={model!r}: no configuration ({reason}).") from error
    assert isinstance(config, PretrainedConfig)
    return config


def known_config(model: str) -> PretrainedConfig:
    """The configuration of a model by hub id, or by the name of a local folder of that model.

    Raises:
        ConfigError: The model is not among `ARCHITECTURES`.
    """
    last = os.path.basename(os.path.normpath(model))
    for name, architecture in ARCHITECTURES.items():
        if model == name or last == name.rpartition("/")[2]:
            return architecture.config()
    raise ConfigError(
        f"model {model!r}: its dimensions are not known here; known: {', '.join(ARCHITECTURES)}."
    )


def meta_model(task: Task) -> PreTrainedModel:
    """The task's model without weights, on the meta device.

    Raises:
        ConfigError: The model is not among `ARCHITECTURES`.
    """
    config = known_config(task.model)
    with torch.device("meta"):
        return task.blank_model(config)
