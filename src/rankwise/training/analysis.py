"""What adapters become while they train: `analysis.json` in the folder of a run.

At chosen steps every module's stable rank, `||delta_W||_F^2 / sigma_1^2` (LR-LoRA Eq. 5), and for
LR-LoRA also without the constant `s f(0)`, a rank-one matrix that hides the rest; the range of
`U = B A` beside that of the grid; and whether the passes since the last record went through the
factorised path. Of some modules f itself with the histogram of U, and at the end the conditioning
of their basis on the range of U and the singular values of their updates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rankwise.adapters import LrLoraLinear
from rankwise.adapters.transfer import Transfer, evaluate
from rankwise.errors import ConfigError, nearest
from rankwise.spectra import singular_values

SCHEMA_VERSION = 1
POINTS = 201
"""Where f is drawn."""
BINS = 60
DIRECTIONS = 1e-6
"""A direction of the basis counts if its singular value is at least this part of the largest."""


class AnalysisCallback(TrainerCallback):
    """Records at some steps; `document()` is the content of `analysis.json`.

    Args:
        model: With adapters.
        steps: At which to record; 0 is before training.
        modules: Whose functions are kept, by the names in the base model; default: the first, the
            middle and the last.
        adapter: Name of the adapter.

    Raises:
        ConfigError: A module does not carry the adapter.
    """

    def __init__(
        self,
        model: nn.Module,
        steps: Sequence[int],
        modules: Sequence[str] | None = None,
        *,
        adapter: str = "default",
    ) -> None:
        self._adapter, self._at = adapter, frozenset(steps)
        self._layers = adapted_layers(model, adapter)
        names = list(self._layers)
        for name in modules or ():
            if name not in self._layers:
                raise ConfigError(
                    f"analysis.modules: {name!r} carries no adapter; {nearest(name, names)}"
                )
        middle = dict.fromkeys((names[0], names[len(names) // 2], names[-1]))
        self._kept = list(middle if modules is None else modules)
        self._passes = {name: [0, 0] for name in names}
        self._steps: list[dict[str, Any]] = []
        self._functions: list[dict[str, Any]] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Record the start."""
        self._record(state.global_step)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Record the step."""
        self._record(state.global_step)

    @torch.no_grad()
    def _record(self, step: int) -> None:
        if step not in self._at:
            return
        modules = {}
        for name, layer in self._layers.items():
            modules[name] = self._module(name, layer)
            if name in self._kept and isinstance(layer, LrLoraLinear):
                self._functions.append({"step": step, "module": name, **self._drawn(layer)})
        self._steps.append({"step": step, "modules": modules})

    def _module(self, name: str, layer: Any) -> dict[str, Any]:
        delta = layer.get_delta_weight(self._adapter)
        found: dict[str, Any] = dict.fromkeys(
            ("stable_rank_without_constant", "f0", "u_min", "u_max", "grid_min", "grid_max")
        )
        found = {"stable_rank": stable_rank_of(delta), **found, "factorised": False}
        if not isinstance(layer, LrLoraLinear):
            return found
        f, u = layer.transfer(self._adapter), _u_of(layer, self._adapter)
        constant = float(evaluate(torch.zeros(1, device=u.device), f))
        points = f.grid if f.grid is not None else torch.tensor([-f.span, f.span])
        before, now = self._passes[name], layer.lrlora_passes[self._adapter]
        self._passes[name] = list(now)
        dense, factorised = (n - b for n, b in zip(now, before, strict=True))
        return found | {
            "stable_rank_without_constant": stable_rank_of(
                delta - layer.scaling[self._adapter] * constant
            ),
            "f0": _finite(constant),
            "u_min": _finite(float(u.min())),
            "u_max": _finite(float(u.max())),
            "grid_min": _finite(float(points.min())),
            "grid_max": _finite(float(points.max())),
            "factorised": factorised > dense if factorised + dense else None,
        }

    def _drawn(self, layer: LrLoraLinear) -> dict[str, Any]:
        """F over the range of U, and how often the entries lie where."""
        u = _u_of(layer, self._adapter)
        low, high = _range(u)
        points = torch.linspace(low, high, POINTS, device=u.device)
        values = evaluate(points, layer.transfer(self._adapter))
        counts = torch.histc(u, BINS, low, high)
        return {
            "u": points.tolist(),
            "f": [_finite(value) for value in values.tolist()],
            "histogram": {
                "edges": torch.linspace(low, high, BINS + 1).tolist(),
                "counts": [int(count) for count in counts.tolist()],
            },
        }

    @torch.no_grad()
    def document(self) -> dict[str, Any]:
        """Everything recorded, with conditioning and spectra as they are now."""
        conditions, spectra = {}, {}
        for name in self._kept:
            layer: Any = self._layers[name]
            update = layer.get_delta_weight(self._adapter)
            spectra[name] = [_finite(value) for value in singular_values(update).tolist()]
            if isinstance(layer, LrLoraLinear):
                found = conditioning(
                    layer.transfer(self._adapter), *_range(_u_of(layer, self._adapter))
                )
                conditions[name] = found
        return {
            "schema": SCHEMA_VERSION,
            "steps": self._steps,
            "functions": self._functions,
            "conditioning": conditions,
            "spectra": spectra,
        }

    def factorised_share(self) -> float | None:
        """Share of the training passes of all modules that formed no matrix of W's size."""
        layers = [la for la in self._layers.values() if isinstance(la, LrLoraLinear)]
        passes = [layer.lrlora_passes[self._adapter] for layer in layers]
        total = sum(dense + factorised for dense, factorised in passes)
        return sum(factorised for _, factorised in passes) / total if total else None


def adapted_layers(model: nn.Module, adapter: str = "default") -> Mapping[str, nn.Module]:
    """Layers with an additive update, by their names in the base model."""
    base: nn.Module = model.get_base_model() if isinstance(model, PeftModel) else model
    found: dict[str, nn.Module] = {}
    for name, module in base.named_modules():
        layer: Any = module
        carries = isinstance(module, BaseTunerLayer) and hasattr(layer, "get_delta_weight")
        if carries and adapter in layer._all_available_adapter_names():
            found[name] = module
    return found


def default_steps(steps: int) -> list[int]:
    """Before training, after a tenth, after half and after all of it."""
    return sorted({0, max(1, steps // 10), max(1, steps // 2), steps})


def stable_rank_of(matrix: Float[Tensor, "rows cols"]) -> float | None:
    """`||M||_F^2 / sigma_1^2`, None for a zero or broken matrix.

    `sigma_1` by subspace iteration on eight vectors, until it has settled to seven digits.
    """
    wide = matrix.detach().to(torch.promote_types(matrix.dtype, torch.float32))
    energy = float(wide.double().square().sum())
    if not (energy > 0 and math.isfinite(energy)):
        return None
    draw = torch.Generator().manual_seed(0)
    count = min(8, *wide.shape)
    basis = torch.randn(wide.shape[1], count, generator=draw).to(wide)
    largest = 0.0
    for _ in range(200):
        image = wide @ torch.linalg.qr(basis).Q
        basis = wide.T @ image
        before, largest = largest, float(torch.linalg.matrix_norm(image.double(), 2))
        if largest - before <= 1e-8 * largest:
            break
    return energy / largest**2


def conditioning(f: Transfer, low: float, high: float) -> dict[str, float | int | None]:
    """How far the basis functions differ on a range: singular values of their values there."""
    wide = f.wide()
    points = torch.linspace(low, high, 400, dtype=torch.float64, device=f.amplitude.device)
    columns = []
    for k in range(len(f.amplitude)):
        one = torch.zeros_like(wide.amplitude)
        one[k] = 1
        columns.append(replace(wide, amplitude=one).value(points))
    sigma = torch.linalg.svdvals(torch.stack(columns, dim=1))
    smallest, largest = float(sigma[-1]), float(sigma[0])
    return {
        "condition_number": _finite(largest / smallest) if smallest else None,
        "directions_at_1e-6": int((sigma >= DIRECTIONS * largest).sum()) if largest else 0,
    }


def _u_of(layer: LrLoraLinear, adapter: str) -> Tensor:
    a, b = (factor.detach().float() for factor in layer.factors(adapter))
    return b @ a


def _range(u: Tensor) -> tuple[float, float]:
    """Of the entries, or a narrow one about them where they are all alike."""
    low, high = float(u.min()), float(u.max())
    if not math.isfinite(low + high):
        return -1.0, 1.0
    return (low, high) if high > low else (low - 1e-3, high + 1e-3)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
