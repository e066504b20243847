"""What every test gets: shape checking of the mathematics, and small models."""

from __future__ import annotations

from jaxtyping import install_import_hook

# Shapes in annotations are checked while testing only; this must come before rankwise is imported.
# Not the adapters: the hook would check their configurations before their own messages do, and
# break torch.compile; test_block_diagonal.py checks their mathematics.
install_import_hook(
    ["rankwise.spectra", "rankwise.profiling.staging", "rankwise.profiling.statistics"],
    "beartype.beartype",
)

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from transformers import PreTrainedModel  # noqa: E402

from tiny_models import Batch, tiny_gpt2, tiny_llama, token_batch  # noqa: E402

torch.set_num_threads(1)  # on models this small, threads cost more than they bring

# a pause of a busy machine is no fault of the code
hypothesis.settings.register_profile("rankwise", deadline=None)
hypothesis.settings.load_profile("rankwise")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(name="tiny_llama")
def tiny_llama_fixture() -> PreTrainedModel:
    return tiny_llama()


@pytest.fixture(name="tiny_gpt2")
def tiny_gpt2_fixture() -> PreTrainedModel:
    return tiny_gpt2()


@pytest.fixture
def llama_batches() -> list[Batch]:
    """Three batches of different lengths."""
    return [token_batch([9, 6], seed=1), token_batch([5, 4, 7], seed=2), token_batch([3], seed=3)]
