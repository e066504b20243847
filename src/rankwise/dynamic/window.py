"""Measuring the gradients of training batches while they train."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from functools import cache

import torch
from torch import Tensor, nn

from rankwise.dynamic import workers
from rankwise.dynamic.joined import JoinedGradients, JoinedSum
from rankwise.errors import DynamicError
from rankwise.profiling import GradientProfile, ModuleStatistics, ProfileProvenance, Statistic
from rankwise.profiling.capture import capture_gradients
from rankwise.profiling.precision import autocast_off
from rankwise.profiling.staging import dense, wide_dtype
from rankwise.profiling.statistics import ModuleResult, StreamingStatistics, sensitivity
from rankwise.provenance import versions
from rankwise.spectra import singular_values
from rankwise.targets import LinearShape, linear_weight

_BASE = ".base_layer"


class Window:
    """The gradients `dL/dW` of the adapted layers' own weights, over the last batches of training.

    They are read off the backward pass that training does anyway, at the output of the layer that
    an adapter wraps, so that nothing is frozen, run twice or changed. Each batch counts as it is
    backpropagated: the mean over a window is the mean of the gradients that the optimizer would
    have seen for W. A batch with a NaN or an infinity counts for no module.

    Several workers each hold their parts of the batches, and `finish` joins them: what comes out is
    what one process sees of the joined batches (`joined.py`). A part that does not count makes its
    batch not count on any worker. Around measured batches a compiled model runs as it was written,
    because compiled code does not look at hooks that came later.

    Args:
        model: The base model inside the `PeftModel`, with its adapters.
        shapes: The adapted modules by name in the base model.
        wanted: Statistics that the method needs.
    """

    def __init__(
        self,
        model: nn.Module,
        shapes: Mapping[str, LinearShape],
        wanted: tuple[Statistic, ...],
    ) -> None:
        self._model = model
        self._shapes = dict(shapes)
        self._wanted = wanted
        self._hooks = ExitStack()
        self._open = False
        self._running = False
        self.clear()

    def clear(self) -> None:
        """Forget every batch."""
        self._streams: list[JoinedSum | JoinedGradients] = []
        make = None if workers.count() == 1 else self._joined_stream
        self.statistics = StreamingStatistics(self._shapes, self._wanted, make)
        self.batches = 0
        self.dropped: list[str] = []
        self._joined = 0

    def begin_batch(self, scale: float = 1.0) -> None:
        """A forward pass is about to start, whose loss is going to be multiplied by `scale`."""
        if not self._open:
            wrapped = [f"{name}{_BASE}" for name in self._shapes]
            self._hooks.enter_context(torch.compiler.set_stance("force_eager"))
            self._hooks.enter_context(
                capture_gradients(
                    self._model,
                    wrapped,
                    self._consume,
                    flat=False,
                    from_embeddings=False,
                    freeze=False,
                )
            )
            self._open = True
        self.statistics.begin_batch(items=1, rows=1, scale=scale)
        self._running = True

    def end_batch(self) -> None:
        """Its backward pass is over."""
        if not self._running:
            return
        self._running = False
        elsewhere = workers.first_of_any(self.statistics.spoiled)
        if elsewhere is not None:
            self.statistics.spoil(elsewhere)
        spoiled = self.statistics.end_batch()
        if spoiled is None:
            self.batches += 1
        else:
            self.dropped.append(spoiled)

    def close(self) -> None:
        """Take the hooks off; a batch that has not ended is forgotten."""
        if self._running:
            self.statistics.drop_batch()
            self._running = False
        self._hooks.close()
        self._open = False

    @autocast_off()
    def join_(self) -> None:
        """Hold on every worker what all have measured; for a checkpoint, by every worker."""
        if self.batches and not self._is_joined:
            for stream in self._streams:
                stream.join_()
        self._joined = self._ended

    def arrays(self) -> dict[str, Tensor]:
        """The window so far for a checkpoint, on the CPU; empty if nothing was measured.

        Raises:
            DynamicError: Other workers hold parts of it.
        """
        if not self.batches and not self.dropped:
            return {}
        if workers.count() > 1 and not self._is_joined:
            raise DynamicError(
                "gradients are being measured, and each worker holds its part of them; call "
                "join() on every worker before one of them saves the state."
            )
        held = self.statistics.arrays() | {"batches": torch.tensor(self.batches)}
        names = list(self._shapes)
        held["dropped"] = torch.tensor([names.index(n) for n in self.dropped], dtype=torch.int64)
        # modules that share an input share its memory, which a file of tensors cannot express
        return {key: tensor.detach().cpu().contiguous().clone() for key, tensor in held.items()}

    def restore(self, arrays: Mapping[str, Tensor]) -> None:
        """Continue a window from what `arrays` gave."""
        self.clear()
        if not arrays:
            return
        self.batches = int(arrays["batches"])
        names = list(self._shapes)
        self.dropped = [names[i] for i in arrays["dropped"].tolist()]
        self.statistics.restore(
            {
                key: array.to(self._device(key.rpartition(":")[0]))
                for key, array in arrays.items()
                if key not in ("batches", "dropped")
            }
        )
        self._joined = self._ended

    @autocast_off()
    def finish(self, model_name: str) -> GradientProfile | None:
        """The profile of the window, which then starts anew; None if no batch counts.

        Every worker gets the same one, over the batches of all.
        """
        batches, statistics = self.batches, self.statistics
        self.clear()
        if not batches:
            return None
        results = {name: statistics.pop(name) for name in self._shapes}
        gradients = {name: self._gradient(name, result) for name, result in results.items()}
        grams = {n: result.gram for n, result in results.items() if result.gram is not None}
        return GradientProfile(
            {
                name: self._scalars(name, result, gradients[name])
                for name, result in results.items()
            },
            LazySpectra(gradients),
            ProfileProvenance(
                model=model_name,
                model_fingerprint="",
                data_fingerprint="",
                batches=batches,
                batch_sizes=[1] * batches,
                tokens=batches,
                dtype=str(next(iter(gradients.values())).dtype).removeprefix("torch."),
                train_mode=True,
                seconds=0.0,
                versions=versions(),
                batch_items=[1] * batches,
            ),
            gradients=gradients,
            gram=grams or None,
        )

    def _consume(self, name: str, x: Tensor, g: Tensor) -> None:
        if self._running:
            self.statistics.consume(name.removesuffix(_BASE), x, g)

    @property
    def _ended(self) -> int:
        return self.batches + len(self.dropped)

    @property
    def _is_joined(self) -> bool:
        return self._joined == self._ended

    def _joined_stream(self, name: str) -> JoinedSum | JoinedGradients:
        weight = self._weight(name)
        like = torch.zeros((), dtype=wide_dtype(weight.dtype), device=weight.device)
        make = JoinedGradients if "gram" in self._wanted else JoinedSum
        self._streams.append(make(self._shapes[name], like))
        return self._streams[-1]

    def _gradient(self, name: str, result: ModuleResult) -> Tensor:
        shape = self._shapes[name]
        if result.gradient is not None:
            return dense(result.gradient)
        return torch.zeros(shape.d_out, shape.d_in, device=self._device(name))

    def _weight(self, name: str) -> Tensor:
        return linear_weight(self._model.get_submodule(f"{name}{_BASE}"))

    def _device(self, name: str) -> torch.device:
        """Where a module is; of counts, which belong to none, the CPU."""
        return self._weight(name).device if name else torch.device("cpu")

    def _scalars(self, name: str, result: ModuleResult, gradient: Tensor) -> ModuleStatistics:
        shape = self._shapes[name]
        weight = self._weight(name)
        return ModuleStatistics(
            d_in=shape.d_in,
            d_out=shape.d_out,
            gradient_norm=float(gradient.norm(dtype=torch.float64)),
            sensitivity=sensitivity(weight, gradient.to(weight.device)),
            batches=result.batches,
            rows=result.rows,
            zero_batches=result.zero_batches,
        )


class LazySpectra(Mapping[str, Tensor]):
    """Singular values, computed when a method asks for them: GARD never does."""

    def __init__(self, gradients: Mapping[str, Tensor]) -> None:
        self._gradients = gradients
        self._compute = cache(lambda name: singular_values(gradients[name]))

    def __getitem__(self, name: str) -> Tensor:
        return self._compute(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._gradients)

    def __len__(self) -> int:
        return len(self._gradients)
