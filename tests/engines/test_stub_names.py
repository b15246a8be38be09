"""The contract stub of TensorRT (tests/fakes) against real bindings: what it has, they have, by name and parameters."""

import inspect
import re
from collections.abc import Iterator
from importlib import import_module
from types import ModuleType
from typing import Any

import pytest

from tests.fakes import tensorrt as stub
from tests.fakes.gpu import FakeGpu
from tests.fakes.plugin_classes import PLUGIN_CLASSES

# The stub's classes, by the names of the real ones.
CLASSES: dict[str, type] = {
    "DataType": stub.DataType,
    "ExecutionContextAllocationStrategy": stub.ExecutionContextAllocationStrategy,
    "ICudaEngine": stub._CudaEngine,
    "IExecutionContext": stub._ExecutionContext,
    "ILogger": stub.ILogger,
    "IPluginRegistry": stub._PluginRegistry,
    "Runtime": stub._Runtime,
    **PLUGIN_CLASSES,
}


@pytest.fixture(scope="module")
def real() -> ModuleType:
    return import_module("tensorrt_rtx")


def public(owner: Any) -> Iterator[str]:
    return (name for name in vars(owner) if not name.startswith("_") and name not in ("name", "value"))


def test_the_module(real: ModuleType) -> None:
    made = stub.make_tensorrt(FakeGpu())
    assert {name for name in public(made) if name != "fake"} <= {*dir(real)}


@pytest.mark.parametrize("name", CLASSES)
def test_a_class(real: ModuleType, name: str) -> None:
    ours, theirs = CLASSES[name], getattr(real, name)
    lists = {name for name in dir(list) if name[0] != "_"}  # a collection of plugin fields is one here
    assert {*public(ours)} - lists <= {*dir(theirs)}


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (owner, name)
        for owner in ("ICudaEngine", "IExecutionContext", "IPluginRegistry", "Runtime")
        for name, one in vars(CLASSES[owner]).items()
        if inspect.isfunction(one) and not name.startswith("_")
    ],
)
def test_the_parameters_of_a_method(real: ModuleType, owner: str, name: str) -> None:
    """Those of one of its forms, in the text that the bindings have of it."""
    ours = [one for one in inspect.signature(getattr(CLASSES[owner], name)).parameters if one != "self"]
    text = getattr(getattr(real, owner), name).__doc__
    forms = re.findall(rf"{name}\(self: [\w.]+(.*?)\) ->", text)
    theirs = [re.findall(r", (\w+):", form) for form in forms]
    assert ours in theirs, theirs
