"""The model card of a saved adapter: how a stranger loads it, with and without rankwise."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

_PLAIN = """\
This is a plain LoRA adapter; it needs nothing but PEFT:

```python
from peft import PeftModel
from transformers import {auto}

base = {auto}.from_pretrained({base})
model = PeftModel.from_pretrained(base, "this-folder")
```
"""

_FOLDED = """
The scale is folded into B, so every module's factor is 1. It is read right by {readers}. Zeros that
pad smaller ranks stay zero in training{native}.
"""

_AS_TRAINED = """
A module's update is `alpha / r B A` with its own alpha and r, as `alpha_pattern` and `rank_pattern`
of `adapter_config.json` say; programs that know only one of each need a padded export:
`rankwise export`.
"""

_ELEMENTWISE = """\
This adapter's updates are `delta_W = s f(B A)` with a learned elementwise function f (LR-LoRA).
Only rankwise computes them, which registers the kind with PEFT:

```python
import rankwise
from transformers import {auto}

base = {auto}.from_pretrained({base})
model = rankwise.load_adapter(base, "this-folder")
```

For other programs `rankwise export --mode merged` writes the whole model, and
`rankwise export --rank` a plain LoRA that comes as near as its rank allows.
"""

_NATIVE = """\
This adapter's updates are block-diagonal (RaLoRA): `delta_W = s blockdiag(B_1 A_1, ..., B_n A_n)`.
For a module `M`, the file holds

- `base_model.model.M.ralora_A.weight`, A, of shape (n, r, d_in / n), and
- `base_model.model.M.ralora_B.weight`, B, of shape (n, d_out / n, r).

With rankwise (`pip install rankwise`), importing it is enough for PEFT to know the type:

```python
import rankwise as rw
from transformers import {auto}

base = {auto}.from_pretrained({base})
model = rw.load_adapter(base, "this-folder")  # or peft.PeftModel.from_pretrained
```

Without rankwise, add the updates to the base model's weights, which is what merging does:

```python
import json, math, pathlib, torch
from safetensors.torch import load_file

config = json.loads(pathlib.Path("this-folder/adapter_config.json").read_text())
tensors = load_file("this-folder/adapter_model.safetensors")
for name, a in tensors.items():
    if name.endswith(".ralora_A.weight"):
        b = tensors[name.replace(".ralora_A.", ".ralora_B.")]
        n, r = a.shape[:2]
        divisors = {{"r_ref": config["r"], "r": r, "sqrt_r": math.sqrt(r)}}
        s = config["alpha"] / divisors[config["rank_scaling"]]
        if config["scaling"] == "function":
            s *= math.sqrt(n)
        delta = s * torch.block_diag(*(b @ a).unbind())  # (d_out, d_in); for Conv1D, take delta.T
        module = name.removeprefix("base_model.model.").removesuffix(".ralora_A.weight")
        base.get_submodule(module).weight.data += delta
```

`rankwise export` writes it as a plain LoRA that any program loads.
"""


_AUTO = {  # others are taken for causal language models
    "FEATURE_EXTRACTION": "AutoModel",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}


def model_card(config: Mapping[str, Any], readers: Sequence[str], *, native: bool) -> str:
    """The text of README.md.

    Args:
        config: Content of `adapter_config.json`.
        readers: Programs that read the folded scale of an export right; none for an adapter as it
            was trained.
        native: Whether the trainable original is in `native/`.
    """
    name = config.get("base_model_name_or_path") or "the base model"
    base = json.dumps(name)
    kind, task = str(config["peft_type"]), str(config.get("task_type"))
    auto = _AUTO.get(task, "AutoModelForCausalLM")
    header = {"base_model": name} if config.get("base_model_name_or_path") else {}
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in header.items())]
    lines += ["library_name: peft", "tags: [lora, rankwise]", "---", "", "# Adapter", ""]
    if kind == "RALORA":
        return "\n".join(lines) + "\n" + _NATIVE.format(base=base, auto=auto)
    if kind == "LRLORA":
        return "\n".join(lines) + "\n" + _ELEMENTWISE.format(base=base, auto=auto)
    kept = "; the trainable original is in `native/`" if native else ""
    scale = _FOLDED.format(readers=", ".join(readers), native=kept) if readers else _AS_TRAINED
    return "\n".join(lines) + "\n" + _PLAIN.format(base=base, auto=auto) + scale
