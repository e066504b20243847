"""An exported adapter in llama.cpp on the CPU against the same files in PEFT.

    pip install xllamacpp
    python scripts/llama_cpp_parity.py

xllamacpp is a wheel that carries llama.cpp; nothing else of rankwise needs it. The base is
SmolLM2-135M, written as an F32 GGUF so that both programs have the same weights; the adapter is
block-diagonal with mixed ranks and blocks, drawn at random, exported, and converted to llama.cpp's
GGUF for LoRA. For every prompt the five likeliest next tokens must be the same, in the same order.
Two controls must fail: the base without an adapter, and the compact export, whose ranks differ and
whose scale llama.cpp reads as alpha over each tensor's own rank. Exit status 0: all as expected.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import xllamacpp
from numpy.typing import NDArray
from peft import PeftModel
from safetensors.numpy import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PretrainedConfig

import rankwise as rw
from rankwise.experiments.smollm2 import packaged_gguf, smollm2_folder

PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "Natalia sold clips to 48 of her friends in April, and then",
    "Water boils at a temperature of",
    "Once upon a time, in a village by the sea,",
    "The three primary colours are red,",
    "To be, or not to be:",
    "import numpy as",
)
TOP = 5
RANKS, BLOCKS = (2, 4, 8), (1, 2, 4, 8)
Top = list[tuple[int, float]]


def adapted_model(base: nn.Module) -> PeftModel:
    """The base with block-diagonal adapters of mixed ranks and blocks, drawn at random."""
    modules = {
        name: rw.ModulePlan(
            shape.d_in, shape.d_out, RANKS[i % len(RANKS)], BLOCKS[i // 2 % len(BLOCKS)]
        )
        for i, (name, shape) in enumerate(rw.find_targets(base).items())
    }
    plan = rw.RankPlan("by hand", "ralora", r_ref=8, alpha=12.0, budget=None, modules=modules)
    torch.manual_seed(0)
    model = rw.attach(base, plan)
    for name, parameter in model.named_parameters():
        if ".ralora_B." in name:
            nn.init.normal_(parameter, std=0.03)
    return model.eval()


def write_base(source: Path, target: Path) -> None:
    """A GGUF with all tensors in F32; everything else as it was."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, _text(reader, "general.architecture"))
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), kind, sub_type=inner)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        writer.add_tensor(tensor.name, values)
    _finish(writer)


def write_adapter(folder: Path, target: Path, config: PretrainedConfig) -> None:
    """Plain LoRA in PEFT's files as llama.cpp's GGUF, in the layout of its own converter."""
    settings = json.loads((folder / "adapter_config.json").read_text())
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    writer = gguf.GGUFWriter(target, "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(settings["lora_alpha"]))
    for key, values in load_file(folder / "adapter_model.safetensors").items():
        found = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", key)
        if found is None:
            raise SystemExit(f"{key}: llama.cpp's LoRA has no place for it.")
        module, side = found[1], found[2].lower()
        if side == "b":
            values = _rotary_order(module, values, config)
        name = names.get_name(f"{module}.weight", try_suffixes=(".weight",))
        writer.add_tensor(f"{name}.lora_{side}", np.ascontiguousarray(values))
    _finish(writer)


def _rotary_order(
    module: str, values: NDArray[np.float32], config: PretrainedConfig
) -> NDArray[np.float32]:
    """For RoPE llama.cpp pairs neighbouring rows of W_q and W_k; transformers, halves of a head."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    count = heads.get(module.rpartition(".")[2])
    if count is None:
        return values
    halves = values.reshape(count, 2, values.shape[0] // count // 2, values.shape[1])
    return halves.swapaxes(1, 2).reshape(values.shape)


def _text(reader: gguf.GGUFReader, key: str) -> str:
    field = reader.get_field(key)
    if field is None:
        raise SystemExit(f"the GGUF names no {key}.")
    return str(field.contents())


def _finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def top_in_peft(model: nn.Module, prompts: Sequence[list[int]]) -> list[Top]:
    """Token and log-probability of the likeliest next tokens."""
    tops = []
    for prompt in prompts:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt])).logits[0, -1]
        best = logits.double().log_softmax(-1).topk(TOP)
        tops.append(list(zip(best.indices.tolist(), best.values.tolist(), strict=True)))
    return tops


def top_in_llama_cpp(base: Path, adapter: Path | None, prompts: Sequence[list[int]]) -> list[Top]:
    """The same by llama.cpp's server, in this process."""
    params = xllamacpp.CommonParams()
    params.model.path = str(base)
    params.n_ctx, params.n_parallel, params.n_gpu_layers = 256, 1, 0
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.warmup, params.verbosity = False, -1
    if adapter is not None:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
    server = xllamacpp.Server(params)
    tops = []
    for prompt in prompts:
        request = {"prompt": prompt, "n_predict": 1, "n_probs": TOP, "temperature": 0.0}
        answer: Any = server.handle_completions(request | {"cache_prompt": False})
        (first,) = answer["choices"][0]["logprobs"]["content"]
        tops.append([(entry["id"], entry["logprob"]) for entry in first["top_logprobs"]])
    return tops


def agreement(found: list[Top], expected: list[Top]) -> tuple[int, float]:
    """Prompts with the same tokens in the same order, and the largest difference of a log p."""
    same = sum(
        [token for token, _ in a] == [token for token, _ in b]
        for a, b in zip(found, expected, strict=True)
    )
    known = [(dict(a), dict(b)) for a, b in zip(found, expected, strict=True)]
    return same, max(
        (abs(a[token] - b[token]) for a, b in known for token in a.keys() & b.keys()),
        default=float("nan"),
    )


def main() -> int:
    """Export, convert, run both programs, compare."""
    logging.getLogger("gguf").setLevel(logging.WARNING)
    folder = smollm2_folder()
    prompts = [AutoTokenizer.from_pretrained(folder)(text).input_ids for text in PROMPTS]

    def fresh() -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        model = adapted_model(fresh())
        for mode in ("padded", "compact"):
            print(rw.export_lora(model, place / mode, mode=mode))
            write_adapter(place / mode, place / f"{mode}.gguf", model.config)
        write_base(packaged_gguf()[0], place / "base.gguf")
        plain = top_in_peft(fresh(), prompts)
        expected = top_in_peft(PeftModel.from_pretrained(fresh(), place / "padded"), prompts)
        cases = {
            "base": (None, plain, True),
            "padded export": (place / "padded.gguf", expected, True),
            "no adapter (control)": (None, expected, False),
            "compact export (control)": (place / "compact.gguf", expected, False),
        }
        well = True
        print(f"\nllama.cpp of xllamacpp {version('xllamacpp')} against PEFT {version('peft')}:")
        for name, (adapter, reference, should) in cases.items():
            found = top_in_llama_cpp(place / "base.gguf", adapter, prompts)
            same, off = agreement(found, reference)
            well = well and (same == len(prompts)) == should
            print(
                f"{name}: the same {TOP} tokens after {same} of {len(prompts)} prompts, "
                f"log p at most {off:.1e} apart"
            )
    print("as expected" if well else "NOT AS EXPECTED")
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
