"""A pytest plugin that puts rankwise's adapters through PEFT's own tests.

PEFT's test modules parametrise their tests over lists of configurations. Before a module's tests
are collected, this plugin replaces those lists by the ones below, wherever a test refers to them,
and then drops every test that has nothing of ours in it. PEFT's test text is not touched.

Started by `conformance.py`; `--break-adapter` breaks the adapter on purpose.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from types import FunctionType, ModuleType
from typing import Any

import pytest
from peft import PeftConfig

from rankwise import LrLoraConfig, RaLoraConfig
from rankwise.adapters import LrLoraLinear, RaLoraLinear
from rankwise.adapters.delta import DeltaLayer

OURS: tuple[type[PeftConfig], ...] = (RaLoraConfig, LrLoraConfig)

# What PEFT's tables hold, for us. Layers of its models: MLP lin0 10 -> 20, lin1 20 -> 2; MLP2 lin0
# 10 -> 32, lin1 32 -> 2; EmbConv1D conv1d 5 -> 1 (a transformers Conv1D), lin0 10 -> 2; Conv1d lin0
# 9 -> 2. Ranks above a layer's smaller dimension, which PEFT's own rows have, ours refuse.
COMMON = [
    ("MLP", {"target_modules": "lin0"}),
    ("MLP", {"target_modules": ["lin0"]}),
    ("MLP", {"target_modules": ["lin1"], "r": 1}),
    ("MLP", {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
    ("MLP", {"target_modules": ["lin0", "lin1"], "modules_to_save": ["lin1"]}),
    ("MLP", {"target_modules": ["lin0", "lin1"], "exclude_modules": ["lin1"]}),
    ("EmbConv1D", {"target_modules": ["conv1d"], "r": 1}),
    ("EmbConv1D", {"target_modules": ["conv1d"], "r": 1, "modules_to_save": ["lin0"]}),
    ("Conv1d", {"target_modules": ["lin0"], "r": 2}),
]
BLOCKS = [
    ("MLP", {"target_modules": ["lin0", "lin1"], "r": 2}),
    ("MLP", {"target_modules": ["lin0"], "blocks": 2, "r": 3, "alpha": 4.5}),
    (
        "MLP",
        {
            "target_modules": ["lin0", "lin1"],
            "r": 1,
            "rank_pattern": {"lin0": 4},
            "blocks_pattern": {"lin0": 2},
            "init_fan_in": "block",
        },
    ),
    # 32 blocks are lowered to 2; s = 8, as in the row of plain LoRA, for larger updates round more
    # than PEFT's tests allow
    ("MLP2", {"target_modules": ["lin0", "lin1"], "r": 2, "alpha": 16 / 2**0.5, "blocks": 32}),
    ("EmbConv1D", {"target_modules": ["conv1d", "lin0"], "r": 1, "blocks": 2}),
]
# Three steps of plain gradient descent must move every factor visibly. On the default grid f is
# nearly constant at first, which cancels in the model's softmax.
BOTH = {
    "target_modules": ["lin0", "lin1"],
    "r": 1,
    "alpha": 16,
    "span": 0.3,
    "bandwidth_init": 10.0,
}
FUNCTIONS = [
    ("MLP", BOTH),
    ("MLP", BOTH | {"rank_pattern": {"lin0": 4}}),
    ("MLP", BOTH | {"grid": "learned"}),
    ("MLP", BOTH | {"grid": "chebyshev", "bandwidth": "fixed"}),
    ("MLP", {"target_modules": ["lin0"], "init": "grid_shift"}),
    *(("MLP", {"target_modules": ["lin0"], "basis": name}) for name in ("rbf", "spline")),
    ("MLP", {"target_modules": ["lin0"], "basis": "fourier", "points": 4}),
    ("MLP", {"target_modules": ["lin0"], "basis": "polynomial", "points": 2}),
]


def cases(
    label: str, config: type[PeftConfig], rows: list[tuple[str, dict[str, Any]]]
) -> list[tuple[str, str, type[PeftConfig], dict[str, Any]]]:
    """Rows of PEFT's table `TEST_CASES`."""
    return [
        (f"{model} {number} {label}", model, config, options)
        for number, (model, options) in enumerate(rows, start=1)
    ]


CASES = cases("RaLoRA", RaLoraConfig, COMMON + BLOCKS)
CASES += cases("LR-LoRA", LrLoraConfig, COMMON + FUNCTIONS)
LIN0 = {"target_modules": ["lin0"], "init_weights": False}
LIN1 = {"target_modules": ["lin1"], "init_weights": False, "r": 2}
PAIRS = [
    ("RaLoRA Same", "ralora", RaLoraConfig, LIN0, LIN0),
    ("RaLoRA Different", "ralora", RaLoraConfig, LIN0, LIN1),
    ("RaLoRA Other Shape", "ralora", RaLoraConfig, LIN0 | {"blocks": 2}, LIN0 | {"r": 3}),
    ("LR-LoRA Same", "lrlora", LrLoraConfig, LIN0, LIN0),
    ("LR-LoRA Different", "lrlora", LrLoraConfig, LIN0, LIN1),
    ("LR-LoRA Other Function", "lrlora", LrLoraConfig, LIN0 | {"points": 9}, LIN0 | {"r": 3}),
]
REPLACEMENTS: dict[str, list[Any]] = {
    "TEST_CASES": CASES,
    "MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES": PAIRS,
    "ALL_PEFT_CONFIG_CLASSES": list(OURS),
    "ALL_CONFIG_CLASSES": [(cls, {}) for cls in OURS],
    "LAYER_INDEXING_CONFIG_CLASSES": [(cls, {}) for cls in OURS],
}

# Tests over a few methods, listed where they stand, that hold for ours as well.
OURS_TOO = {
    "test_multiple_adapters_mixed_modules_to_save",
    "test_multiple_adapters_mixed_modules_to_save_order_switched",
    "test_default_target_modules_not_set_raises",
    "test_default_target_modules_not_set_model_type_set_raises",
    "test_default_target_modules_list_of_str",
    "test_default_target_modules_str",
    "test_save_pretrained_with_target_modules",
}
# Tests without parameters that cover every registered method.
UNPARAMETRISED = {"test_from_peft_type"}
# They fetch a LoRA configuration from the Hugging Face hub.
NEED_THE_HUB = {
    "test_from_pretrained",
    "test_from_pretrained_cache_dir",
    "test_save_pretrained_with_runtime_config",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--break-adapter`."""
    parser.addoption("--break-adapter", choices=sorted(FAULTS), help="a fault to be found")


def pytest_configure(config: pytest.Config) -> None:
    """Break the adapter if asked to."""
    fault = config.getoption("--break-adapter")
    if fault:
        FAULTS[fault]()


def pytest_collectstart(collector: pytest.Collector) -> None:
    """Replace the parameter lists of a test module before its tests are generated."""
    if isinstance(collector, pytest.Module):
        with diffusers_importable():
            module = collector.obj  # imports it
        replace_parameters(module)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the tests that concern our adapters and need no network."""
    kept = [item for item in items if concerns_us(item)]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


@contextmanager
def diffusers_importable() -> Iterator[None]:
    """PEFT's test helpers import one name of diffusers, which no test of ours uses."""
    if find_spec("diffusers"):
        yield
        return
    stand_in = ModuleType("diffusers")
    stand_in.StableDiffusionPipeline = None  # type: ignore[attr-defined]
    sys.modules["diffusers"] = stand_in
    try:
        yield
    finally:
        del sys.modules["diffusers"]


def replace_parameters(module: ModuleType) -> None:
    """Point the `parametrize` marks of a module at our cases instead of PEFT's."""
    theirs = {
        id(getattr(module, name)): ours
        for name, ours in REPLACEMENTS.items()
        if hasattr(module, name)
    }
    for function in test_functions(module):
        marks = [
            replaced(mark, function.__name__, theirs)
            for mark in getattr(function, "pytestmark", [])
        ]
        function.pytestmark = marks  # type: ignore[attr-defined]


def replaced(mark: pytest.Mark, test: str, theirs: dict[int, list[Any]]) -> pytest.Mark:
    """A mark over our cases, or the mark itself if it is not over PEFT's configurations."""
    if mark.name != "parametrize":
        return mark
    names, values = mark.args
    if id(values) in theirs:
        return pytest.mark.parametrize(names, theirs[id(values)]).mark
    if test in OURS_TOO and names in ("config_cls", "config_class"):
        return pytest.mark.parametrize(names, list(OURS)).mark
    return mark


def test_functions(module: ModuleType) -> Iterator[FunctionType]:
    """Test functions of a module and of the classes it defines."""
    for scope in [module, *(cls for _, cls in inspect.getmembers(module, inspect.isclass))]:
        if scope is module or scope.__module__ == module.__name__:
            yield from (
                f for n, f in vars(scope).items() if n.startswith("test") and inspect.isfunction(f)
            )


# pytest would take it for a test
test_functions.__test__ = False  # type: ignore[attr-defined]


def concerns_us(item: pytest.Item) -> bool:
    """Whether a test runs on one of our configurations, offline."""
    name = getattr(item, "originalname", item.name)
    callspec = getattr(item, "callspec", None)
    if callspec is None:
        return name in UNPARAMETRISED
    return name not in NEED_THE_HUB and any(
        value in OURS for value in callspec.params.values() if inspect.isclass(value)
    )


def break_unmerge() -> None:
    """Unmerging forgets what was merged, and leaves it in the base weight."""

    def unmerge(self: DeltaLayer) -> None:
        self.merged_adapters.clear()

    DeltaLayer.unmerge = unmerge  # type: ignore[method-assign]


def forget_b() -> None:
    """B is not among the adapter's weights, so it is neither trained nor switched nor deleted."""
    for layer in (RaLoraLinear, LrLoraLinear):
        layer.adapter_layer_names = tuple(
            name for name in layer.adapter_layer_names if not name.endswith("_B")
        )


FAULTS = {"unmerge": break_unmerge, "forget-b": forget_b}
