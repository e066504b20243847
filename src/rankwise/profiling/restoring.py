"""What a measurement changes besides weights and hooks, and gives back."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn


@contextmanager
def mode(model: nn.Module, *, train: bool) -> Iterator[None]:
    """Switch every submodule's mode, and give each its own back.

    In training mode buffers change as well, such as the running statistics of a BatchNorm; they get
    their values back in place.
    """
    before = [(module, module.training) for module in model.modules()]
    buffers = [(b, b.clone()) for b in model.buffers() if not b.is_meta] if train else []
    try:
        model.train(train)
        yield
    finally:
        for module, training in before:
            module.training = training
        with torch.no_grad():
            for buffer, values in buffers:
                if not torch.equal(buffer, values):  # an expanded one cannot be written to
                    buffer.copy_(values)


@contextmanager
def random_state_kept(loader: object) -> Iterator[None]:
    """Give the random states back: torch's, Python's, numpy's, and the loader's own generators."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    python_state = random.getstate()  # collators draw from it
    numpy_state = np.random.get_state()  # and from this
    states = [(generator, generator.get_state()) for generator in _generators(loader)]
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        for generator, state in states:
            generator.set_state(state)


def _generators(loader: object) -> list[torch.Generator]:
    """The generators that a DataLoader, its sampler or its batch sampler were given."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    holders = (
        loader,
        getattr(loader, "sampler", None),
        batch_sampler,
        getattr(batch_sampler, "sampler", None),
    )
    found = [getattr(holder, "generator", None) for holder in holders]
    return [generator for generator in found if isinstance(generator, torch.Generator)]
