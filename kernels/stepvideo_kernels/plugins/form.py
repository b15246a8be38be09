"""What a TensorRT plugin of one operator needs to know, without TensorRT: types, shapes, and the launch of its kernel.

Every op has a module `stepvideo_kernels.<op>.plugin` with FORMS, one PluginForm for each of its operators;
registration.py makes the classes of a TensorRT module from them.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from operator import mul
from typing import Any

from stepvideo_kernels.compile.binaries import Binary
from stepvideo_kernels.kernel_spec import Constant, KernelSpec, TileConfig
from stepvideo_kernels.launch.library import Kernel, KernelLibrary
from stepvideo_kernels.launch.parameters import Argument, TensorView
from stepvideo_serve.errors import EngineError

MAIN = "main"
UNKNOWN = -1

# A size is an integer, or something that is multiplied, added and divided like one (TensorRT's dimension expressions).
Shape = tuple[Any, ...]
Shapes = Mapping[str, Shape]


@dataclass(frozen=True)
class Operand:
    """An input or output of an operator: `element` is its type, MAIN for that of the first input."""

    name: str
    rank: int
    element: str = MAIN


class PluginForm(ABC):
    """One operator. The order of `inputs` and `outputs` is that of the ONNX node.

    attributes  of the node, with their defaults
    elements    types that the first input may have
    layout      the shapes of the inputs, contiguous, in words
    """

    operator: str
    spec: KernelSpec
    layout: str
    elements: tuple[str, ...]
    inputs: tuple[Operand, ...]
    outputs: tuple[Operand, ...]
    attributes: Mapping[str, float]

    @abstractmethod
    def output_shapes(self, shapes: Shapes) -> tuple[Shape, ...]:
        """From input name -> shape, of integers or expressions."""

    @abstractmethod
    def size_and_tokens(self, shapes: Shapes) -> tuple[int, int]:
        """What the KernelSpec judges: head size or width, and the longest sequence; UNKNOWN where that is open."""

    @abstractmethod
    def expected(self, shapes: Shapes) -> Iterator[tuple[str, Shape]]:
        """(input, the shape that the others ask of it); UNKNOWN sizes fit everything."""

    @abstractmethod
    def variant(self, element: str) -> str:
        """Which of the op's kernels takes a first input of this type."""

    @abstractmethod
    def grid(self, shapes: Shapes, tile: TileConfig) -> tuple[int, int, int]:
        """The launch grid."""

    @abstractmethod
    def scalars(self, shapes: Shapes, attributes: Mapping[str, float]) -> dict[str, Argument]:
        """The kernel's parameters that are numbers."""

    @abstractmethod
    def tensors(self) -> Mapping[str, str]:
        """The kernel's parameters that are tensors -> the operand for each; one that it never reads gets any."""

    def constants(self, shapes: Shapes) -> dict[str, Constant]:
        """What tells the op's binaries of one variant apart."""
        del shapes
        return {}

    def plane(self, name: str, shape: Shape) -> Shape:
        """The shape under which a tensor map sees an operand."""
        del name
        return shape

    def output_elements(self, elements: Sequence[str]) -> tuple[str, ...]:
        """Types of the outputs; raises EngineError unless the types of the inputs fit."""
        if len(elements) != len(self.inputs):
            names = ", ".join(one.name for one in self.inputs)
            raise EngineError(f"{self.operator} takes the inputs {names}, got {len(elements)} inputs: export again.")
        if elements[0] not in self.elements:
            raise EngineError(
                f"{self.operator} takes {self.inputs[0].name} in {' or '.join(self.elements)}, got {elements[0]}: "
                "cast before it."
            )
        for operand, element in zip(self.inputs, elements, strict=True):
            wanted = elements[0] if operand.element == MAIN else operand.element
            if element != wanted:
                raise EngineError(f"{self.operator} takes {operand.name} in {wanted}, got {element}: cast before it.")
        return tuple(elements[0] if one.element == MAIN else one.element for one in self.outputs)

    def named(self, shapes: Sequence[Shape]) -> dict[str, Shape]:
        """Input name -> shape; raises EngineError unless the ranks fit."""
        for operand, shape in zip(self.inputs, shapes, strict=True):
            if len(shape) != operand.rank:
                raise EngineError(
                    f"{self.operator} takes {operand.name} with {operand.rank} dimensions, got {len(shape)} in "
                    f"[{_shown(shape)}]: it takes {self.layout}."
                )
        return {operand.name: tuple(shape) for operand, shape in zip(self.inputs, shapes, strict=True)}

    def check(self, shapes: Shapes, elements: Sequence[str], sm: int | None) -> None:
        """Raises EngineError unless the kernel takes inputs of these shapes, in which UNKNOWN fits everything.

        sm: the architecture that an engine is built for; None leaves the check of architectures out.
        """
        size, tokens = self.size_and_tokens(shapes)
        if size != UNKNOWN:
            output = self.output_elements(elements)[-1]
            lowest = max(self.spec.dtypes[elements[0]], self.spec.outputs[output])
            refusal = self.spec.refuse(
                dtype=elements[0], output=output, size=size, sm=sm or lowest, tokens=max(tokens, 0)
            )
            if refusal is not None:
                raise EngineError(refusal.replace(self.spec.op, self.operator, 1))
        for name, wanted in self.expected(shapes):
            if any(UNKNOWN not in pair and pair[0] != pair[1] for pair in zip(wanted, shapes[name], strict=True)):
                raise EngineError(
                    f"{self.operator} takes {name} as [{_shown(wanted)}] beside the other inputs, got "
                    f"[{_shown(shapes[name])}]: it takes {self.layout}."
                )

    def kernel(self, elements: Sequence[str], shapes: Shapes) -> dict[str, Any]:
        """What names the kernel in a folder, as JSON: op, variant and constants."""
        return {"op": self.spec.op, "variant": self.variant(elements[0]), "constants": self.constants(shapes)}

    def prepare(
        self, library: KernelLibrary, elements: Sequence[str], shapes: Shapes, attributes: Mapping[str, float]
    ) -> "PreparedLaunch":
        """Finds and loads the kernel, and works out everything that does not depend on addresses.

        Raises EngineError when the folder has no such kernel.
        """
        wanted = self.kernel(elements, shapes)
        kernel = library.find(wanted["op"], wanted["variant"], **wanted["constants"])
        if kernel.binary.scratch_bytes:
            raise EngineError(f"{kernel.binary.name} must need no scratch memory, it does: choose another tiling.")
        made = zip((one.name for one in self.outputs), self.output_shapes(shapes), strict=True)
        planes = {name: self.plane(name, shape) for name, shape in (*shapes.items(), *made)}
        tile = TileConfig(**kernel.binary.tile)
        return PreparedLaunch(
            kernel=kernel,
            grid=self.grid(shapes, tile),
            order=tuple(one.name for one in (*self.inputs, *self.outputs)),
            tensors=self.tensors(),
            planes=planes,
            scalars=self.scalars(shapes, attributes),
        )


@dataclass(frozen=True)
class PreparedLaunch:
    """A launch that lacks the addresses only. `order`: the operands in the order of their addresses."""

    kernel: Kernel
    grid: tuple[int, int, int]
    order: tuple[str, ...]
    tensors: Mapping[str, str]
    planes: Shapes
    scalars: Mapping[str, Argument]
    descriptors: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "descriptors", _descriptors(self.kernel.binary))

    def __call__(self, inputs: Sequence[int], outputs: Sequence[int], stream: int) -> None:
        """Queues the kernel on a stream; compiles, allocates and waits for nothing."""
        if any(0 in self.planes[name] for name in self.order):
            return
        addresses = dict(zip(self.order, (*inputs, *outputs), strict=True))
        arguments = dict(self.scalars)
        for parameter, name in self.tensors.items():
            if parameter in self.descriptors:
                shape = self.planes[name]
                arguments[parameter] = TensorView(addresses[name], shape, contiguous_strides(shape))
            else:
                arguments[parameter] = addresses[name]
        self.kernel.launch(self.grid, stream, arguments)


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """(2, 3, 4) -> (12, 4, 1)."""
    return tuple(accumulate((1, *reversed(shape[1:])), mul))[::-1]


def _descriptors(binary: Binary) -> frozenset[str]:
    return frozenset(name for name, kind in binary.parameters if kind.startswith("tensordesc"))


def _shown(shape: Shape) -> str:
    return ", ".join(str(size) if isinstance(size, int) and size != UNKNOWN else "?" for size in shape)
