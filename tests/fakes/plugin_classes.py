"""What TensorRT's bindings have for plugins in Python, as far as ours use it (pyPlugin.cpp of TensorRT 11.1)."""

import enum
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray


class PluginFieldType(enum.Enum):
    FLOAT32, INT32 = range(2)


class TensorRTPhase(enum.Enum):
    BUILD, RUNTIME = range(2)


class TensorFormat(enum.Enum):
    LINEAR, CHW32 = range(2)


class PluginField:
    __slots__ = ("data", "name", "type")

    def __init__(
        self,
        name: str = "",
        data: NDArray[Any] | None = None,
        type: PluginFieldType = PluginFieldType.FLOAT32,
    ) -> None:
        self.name, self.type = name, type
        self.data = np.array([], np.float32) if data is None else data


class PluginFieldCollection(list[PluginField]):
    def __init__(self, fields: Iterable[PluginField]) -> None:
        super().__init__(fields)


class PluginTensorDesc:
    __slots__ = ("dims", "format", "type")

    def __init__(self) -> None:
        self.dims: tuple[int, ...] = ()
        self.type: Any = None
        self.format = TensorFormat.LINEAR


class _Base:
    """A class to derive from, whose own __init__ has to be called."""

    def __init__(self) -> None:
        self.__dict__.setdefault("_initialised", set()).add(type(self))


class IPluginV3(_Base):
    pass


class IPluginV3OneCore(_Base):
    pass


class IPluginV3OneBuild(_Base):
    pass


class IPluginV3OneRuntime(_Base):
    pass


class IPluginCreatorV3One(_Base):
    pass


PLUGIN_CLASSES = {
    one.__name__: one
    for one in (
        IPluginCreatorV3One,
        IPluginV3,
        IPluginV3OneBuild,
        IPluginV3OneCore,
        IPluginV3OneRuntime,
        PluginField,
        PluginFieldCollection,
        PluginFieldType,
        PluginTensorDesc,
        TensorFormat,
        TensorRTPhase,
    )
}
