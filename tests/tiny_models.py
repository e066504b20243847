"""Real architectures, small enough for a unit test, and batches for them.

Weights are drawn larger than transformers' own initialisation, so that attention is far from
uniform and every projection gets a gradient well above rounding. There is no dropout.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from rankwise.profiling import GradientProfile, ModuleStatistics, ProfileProvenance

VOCABULARY = 61
PAD = 0
IGNORED = -100

Batch = dict[str, Tensor]


def build(model_cls: type[PreTrainedModel], config: object, seed: int) -> PreTrainedModel:
    """A model with reproducible weights, in evaluation mode; the global random state is kept."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return model_cls(config).eval()


def tiny_llama(seed: int = 0, **options: object) -> PreTrainedModel:
    """Llama: two layers, grouped key/value heads, a gated MLP, an untied head."""
    settings: dict[str, object] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
        "tie_word_embeddings": False,
        "pad_token_id": PAD,
    }
    return build(LlamaForCausalLM, LlamaConfig(**settings | options), seed)


def tiny_gpt2(seed: int = 0, **options: object) -> PreTrainedModel:
    """GPT-2: its linear layers are `Conv1D`, with weights stored as (d_in, d_out)."""
    settings: dict[str, object] = {
        "vocab_size": VOCABULARY,
        "n_positions": 64,
        "n_embd": 16,
        "n_layer": 2,
        "n_head": 4,
        "initializer_range": 0.3,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "bos_token_id": PAD,
        "eos_token_id": PAD,
        "pad_token_id": PAD,
    }
    return build(GPT2LMHeadModel, GPT2Config(**settings | options), seed)


def bert_config(**options: object) -> BertConfig:
    """The configuration of a small BERT without dropout."""
    settings: dict[str, object] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "num_labels": 3,
        "pad_token_id": PAD,
    }
    return BertConfig(**settings | options)


def tiny_bert_mlm(seed: int = 0, **options: object) -> PreTrainedModel:
    """BERT with its masked-language-model head."""
    return build(BertForMaskedLM, bert_config(**options), seed)


def tiny_bert_classifier(seed: int = 0, **options: object) -> PreTrainedModel:
    """BERT with a three-way classification head."""
    return build(BertForSequenceClassification, bert_config(**options), seed)


def tiny_t5(seed: int = 0, **options: object) -> PreTrainedModel:
    """T5: encoder and decoder, a key/value size that is not the hidden size over the heads."""
    settings: dict[str, object] = {
        "vocab_size": VOCABULARY,
        "d_model": 16,
        "d_kv": 5,
        "d_ff": 24,
        "num_layers": 2,
        "num_heads": 4,
        "dropout_rate": 0.0,
        "initializer_factor": 0.5,
        "pad_token_id": PAD,
        "decoder_start_token_id": PAD,
        "eos_token_id": 1,
    }
    return build(T5ForConditionalGeneration, T5Config(**settings | options), seed)


def tiny_qwen3(seed: int = 0, **options: object) -> PreTrainedModel:
    """Qwen 3: one key/value head for four queries, a head size of its own, norms on both."""
    settings: dict[str, object] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 6,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
        "tie_word_embeddings": True,
        "pad_token_id": PAD,
    }
    return build(Qwen3ForCausalLM, Qwen3Config(**settings | options), seed)


def tiny_phi3(seed: int = 0, **options: object) -> PreTrainedModel:
    """Phi 3: query, key and value in one layer, gate and up in another."""
    settings: dict[str, object] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "original_max_position_embeddings": 64,
        "initializer_range": 0.3,
        "pad_token_id": PAD,
        "bos_token_id": PAD,
        "eos_token_id": PAD,
    }
    return build(Phi3ForCausalLM, Phi3Config(**settings | options), seed)


def tiny_mamba(seed: int = 0, **options: object) -> PreTrainedModel:
    """Mamba: a state-space model, without attention."""
    settings: dict[str, object] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "state_size": 4,
        "num_hidden_layers": 2,
        "time_step_rank": 3,
        "initializer_range": 0.3,
        "residual_in_fp32": False,  # which would round an fp64 model
        "pad_token_id": PAD,
        "bos_token_id": PAD,
        "eos_token_id": PAD,
    }
    return build(MambaForCausalLM, MambaConfig(**settings | options), seed)


def tiny_vit(seed: int = 0, **options: object) -> PreTrainedModel:
    """ViT: patches of pictures instead of tokens."""
    settings: dict[str, object] = {
        "image_size": 8,
        "patch_size": 4,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "initializer_range": 0.3,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "num_labels": 3,
    }
    return build(ViTForImageClassification, ViTConfig(**settings | options), seed)


@torch.no_grad()
def logits_of(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """The logits of a batch."""
    logits: torch.Tensor = model(**batch).logits
    return logits


def token_batch(lengths: Sequence[int], *, seed: int = 0, pad_to: int | None = None) -> Batch:
    """Random token rows of the given lengths, padded on the right, labels ignored at padding."""
    generator = torch.Generator().manual_seed(seed)
    width = pad_to or max(lengths)
    ids = torch.full((len(lengths), width), PAD)
    mask = torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.randint(2, VOCABULARY, (length,), generator=generator)
        mask[row, :length] = 1
    labels = ids.masked_fill(mask == 0, IGNORED)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def masked_batch(lengths: Sequence[int], *, seed: int = 0) -> Batch:
    """For masked language models: two of three labels are ignored."""
    batch = token_batch(lengths, seed=seed)
    keep = torch.arange(batch["labels"].shape[1]) % 3 == 0
    return batch | {"labels": batch["labels"].masked_fill(~keep, IGNORED)}


def class_batch(lengths: Sequence[int], *, seed: int = 0) -> Batch:
    """For classifiers: one of three classes per row."""
    generator = torch.Generator().manual_seed(seed + 1)
    labels = torch.randint(0, 3, (len(lengths),), generator=generator)
    return token_batch(lengths, seed=seed) | {"labels": labels}


def seq2seq_batch(lengths: Sequence[int], *, seed: int = 0) -> Batch:
    """For encoder-decoders: an answer two tokens shorter than the question."""
    answers = token_batch([max(length - 2, 1) for length in lengths], seed=seed + 1)
    return token_batch(lengths, seed=seed) | {"labels": answers["labels"]}


def image_batch(lengths: Sequence[int], *, seed: int = 0) -> Batch:
    """For image classifiers: as many pictures as there are lengths."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(len(lengths), 3, 8, 8, generator=generator)
    labels = torch.randint(0, 3, (len(lengths),), generator=generator)
    return {"pixel_values": pixels, "labels": labels}


ARCHITECTURES: dict[str, tuple[Callable[..., PreTrainedModel], Callable[..., Batch]]] = {
    "llama": (tiny_llama, token_batch),
    "gpt2": (tiny_gpt2, token_batch),
    "bert-mlm": (tiny_bert_mlm, masked_batch),
    "bert-classifier": (tiny_bert_classifier, class_batch),
    "t5": (tiny_t5, seq2seq_batch),
    "vit": (tiny_vit, image_batch),
    "qwen3": (tiny_qwen3, token_batch),
    "phi3": (tiny_phi3, token_batch),
    "mamba": (tiny_mamba, token_batch),
}
"""Name -> (model factory, batch factory), for tests over all architectures."""


def synthetic_profile(
    shapes: Mapping[str, tuple[int, int]],
    *,
    gid: Mapping[str, int] | int = 1,
    sensitivity: Mapping[str, float] | float = 1.0,
    fingerprint: str = "0" * 16,
) -> GradientProfile:
    """A profile of modules `name -> (d_in, d_out)` whose effective ranks are exactly `gid`."""
    gids = dict.fromkeys(shapes, gid) if isinstance(gid, int) else gid
    scores = dict.fromkeys(shapes, sensitivity) if isinstance(sensitivity, float) else sensitivity
    spectra = {}
    for name, (d_in, d_out) in shapes.items():
        values = torch.zeros(min(d_in, d_out), dtype=torch.float64)
        values[: gids[name]] = 1.0
        spectra[name] = values
    modules = {
        name: ModuleStatistics(
            d_in=d_in,
            d_out=d_out,
            gradient_norm=float(spectra[name].norm()),
            sensitivity=scores[name],
            batches=1,
            rows=8,
        )
        for name, (d_in, d_out) in shapes.items()
    }
    provenance = ProfileProvenance(
        model="synthetic",
        model_fingerprint=fingerprint,
        data_fingerprint="f" * 16,
        batches=1,
        batch_sizes=[8],
        tokens=8,
        dtype="float32",
        train_mode=False,
        seconds=0.5,
        versions={"python": "3"},
    )
    return GradientProfile(modules, spectra, provenance)
