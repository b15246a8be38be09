"""What one graph takes and gives: names, dtypes and shapes, with symbolic dimensions and their ranges.

One EngineSpec feeds the export (dynamic_shapes), the optimisation profile (profile), the runners (check_inputs,
output_shapes) and the manifest (to_json).

A dimension of a shape is an integer, a symbol such as "tokens", or an integer multiple of a symbol such as "16*h".

A graph has its weights inside, or some of them are inputs too (WeightSpec): then it serves every layer of its kind, and
a runner of one layer gets them once, when it is made.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from stepvideo_serve.errors import EngineError

TORCH_DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        name: getattr(torch, name)
        for name in ("float32", "float16", "bfloat16", "float8_e4m3fn", "int64", "int32", "bool", "uint8")
    }
)

_DIM_PATTERN = re.compile(r"(?:([1-9][0-9]*)\*)?([A-Za-z_][A-Za-z0-9_]*)")


@dataclass(frozen=True)
class Dim:
    """The sizes that a symbolic dimension may take: min <= opt <= max; `opt` is the size to tune for."""

    min: int
    opt: int
    max: int

    def __post_init__(self) -> None:
        if not 1 <= self.min <= self.opt <= self.max:
            raise EngineError(f"A dimension needs 1 <= min <= opt <= max, got {self}: correct the range.")


class Multiple(NamedTuple):
    """A symbolic dimension: `factor` times the size of `symbol`."""

    factor: int
    symbol: str

    @classmethod
    def of(cls, dim: str) -> "Multiple":
        """Of "symbol" or "<int>*symbol". Raises EngineError."""
        match = _DIM_PATTERN.fullmatch(dim)
        if match is None:
            raise EngineError(f'A symbolic dimension must be a name or "<int>*<name>", got {dim!r}.')
        return cls(int(match[1] or 1), match[2])


@dataclass(frozen=True)
class TensorSpec:
    """One input or output: `dtype` is a key of TORCH_DTYPES; `shape` mixes sizes, "symbol" and "<int>*symbol"."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    axes: "tuple[int | Multiple, ...]" = field(init=False, repr=False, compare=False)
    """The shape, its texts read once: engines are called some hundred times a step."""

    def __post_init__(self) -> None:
        if not self.name:
            raise EngineError("A tensor of an engine needs a name, got an empty string: name it.")
        if self.dtype not in TORCH_DTYPES:
            raise EngineError(f'Tensor "{self.name}" must have a dtype of {sorted(TORCH_DTYPES)}, got {self.dtype!r}.')
        for dim in self.shape:
            if not isinstance(dim, str) and (type(dim) is not int or dim < 0):
                raise EngineError(f'Tensor "{self.name}" must have integer sizes >= 0, got {dim!r}: correct the shape.')
        axes = tuple(Multiple.of(dim) if isinstance(dim, str) else dim for dim in self.shape)
        object.__setattr__(self, "axes", axes)

    @property
    def torch_dtype(self) -> torch.dtype:
        return TORCH_DTYPES[self.dtype]

    @property
    def symbols(self) -> frozenset[str]:
        """The symbols in the shape, without their factors."""
        return frozenset(axis.symbol for axis in self.axes if isinstance(axis, Multiple))

    def resolve(self, dims: Mapping[str, int]) -> tuple[int, ...]:
        """The shape in numbers, given a size for each symbol."""
        try:
            return tuple(axis if isinstance(axis, int) else axis.factor * dims[axis.symbol] for axis in self.axes)
        except KeyError as error:
            raise EngineError(
                f"A size is needed for {error.args[0]!r}, got sizes for {sorted(dims)} only: add it."
            ) from None

    def __str__(self) -> str:
        return f"{self.dtype} [{', '.join(map(str, self.shape))}]"


PLAIN, CODES, OUTPUT_SCALE, INPUT_INVERSE, INPUT_SCALE = (
    "plain",
    "codes",
    "output_scale",
    "input_inverse",
    "input_scale",
)
VALUE_SCALE, VALUE_INVERSE, SLOPES = "value_scale", "value_inverse", "slopes"
OF_ONE_NUMBER = (INPUT_INVERSE, INPUT_SCALE, VALUE_SCALE, VALUE_INVERSE)
FORMS = (PLAIN, CODES, OUTPUT_SCALE, SLOPES, *OF_ONE_NUMBER)
"""What a weight input holds: the checkpoint's tensor; in FP8 its codes, a scale for each output channel, scale or
inverse scale of the layer's input or of an attention's values, one number or the same for every head; or the slopes of
this rank's heads."""
LAYER = "{layer}"
"""Stands for the number of a layer in the key of a weight."""


@dataclass(frozen=True)
class WeightSpec:
    """An input that is a weight: the same at each call, another for each layer, rank and checkpoint.

    tensor  name in the graph, dtype and shape, all sizes integers
    key     where it comes from, with LAYER: a key of the checkpoint, or for another form than "plain" and "codes" the
            name of a quantised layer or attention
    form    what of that: one of FORMS
    axis    along which a tensor-parallel rank has its share of `parts`; None: every rank has all
    """

    tensor: TensorSpec
    key: str
    form: str = PLAIN
    axis: int | None = None
    parts: int = 1

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise EngineError(f'Weight "{self.tensor.name}" must be of a form of {FORMS}, got {self.form!r}.')
        if self.tensor.symbols or not self.key or self.parts < 1:
            raise EngineError(
                f'Weight "{self.tensor.name}" needs integer sizes, a key and at least 1 part, got {self}: correct it.'
            )

    @property
    def name(self) -> str:
        return self.tensor.name

    def key_of(self, layer: int | None) -> str:
        """The key for one layer; None for a graph that no layers share."""
        return self.key if layer is None else self.key.replace(LAYER, str(layer))

    def check(self, engine: str, value: torch.Tensor) -> None:
        """EngineError, with the name of the `engine`, unless dtype and shape are those."""
        if value.dtype != self.tensor.torch_dtype or tuple(value.shape) != self.tensor.shape:
            raise EngineError(
                f'Engine {engine}: weight "{self.name}" must be {self.tensor}, got {_describe(value)}: '
                "the weights are those of another model, or of another layout."
            )


@dataclass(frozen=True)
class EngineSpec:
    """The signature of one graph. Symbols have their range in `dims`; outputs use symbols of the inputs. `weights` are
    inputs of the graph besides `inputs`, which are those of a call."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    dims: Mapping[str, Dim] = field(hash=False)
    weights: tuple[WeightSpec, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "dims", dict(self.dims))
        seen: set[str] = set()
        for tensor in self.tensors:
            if tensor.name in seen:
                raise EngineError(f'Engine {self.name}: tensor names must differ, "{tensor.name}" is there twice.')
            seen.add(tensor.name)
            if unknown := tensor.symbols - self.dims.keys():
                raise EngineError(
                    f'Engine {self.name}: tensor "{tensor.name}" uses {sorted(unknown)} without a range: '
                    f"add them to dims, which has {sorted(self.dims)}."
                )
        bound = frozenset[str]().union(*(tensor.symbols for tensor in self.inputs))
        for tensor in self.outputs:
            if unbound := tensor.symbols - bound:
                raise EngineError(
                    f'Engine {self.name}: output "{tensor.name}" uses {sorted(unbound)}, which no input has: '
                    f"outputs may use {sorted(bound)}."
                )

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        """All that crosses the border of the graph: inputs, weights, outputs."""
        return (*self.inputs, *(weight.tensor for weight in self.weights), *self.outputs)

    def check_weights(self, weights: Mapping[str, torch.Tensor]) -> None:
        """EngineError unless these are the weights of the spec: names, dtypes and shapes."""
        self._check_names("weights", [weight.name for weight in self.weights], weights)
        for weight in self.weights:
            weight.check(self.name, weights[weight.name])

    def check_inputs(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, int]:
        """The size of every symbol; EngineError if a name, dtype, rank, size or range does not match."""
        self._check_names("inputs", [tensor.name for tensor in self.inputs], inputs)
        dims: dict[str, int] = {}
        for spec in self.inputs:
            tensor = inputs[spec.name]
            if not isinstance(tensor, torch.Tensor):
                raise EngineError(
                    f'Engine {self.name}: input "{spec.name}" must be a tensor {spec}, got {type(tensor).__name__}.'
                )
            shape = tensor.shape
            if tensor.dtype != spec.torch_dtype or len(shape) != len(spec.shape):
                raise self._mismatch(spec, tensor)
            if shape == spec.shape:  # no symbols, as of most tensors
                continue
            for axis, (expected, size) in enumerate(zip(spec.axes, shape, strict=True)):
                if isinstance(expected, int):
                    if size != expected:
                        raise self._mismatch(spec, tensor, f"axis {axis} must be {expected}")
                    continue
                factor, symbol = expected
                if size % factor:
                    raise self._mismatch(spec, tensor, f"axis {axis} must be a multiple of {factor}")
                value = dims.setdefault(symbol, size // factor)
                if value * factor != size:
                    raise self._mismatch(spec, tensor, f"{symbol} is {value} in an earlier axis")
                allowed = self.dims[symbol]
                if not allowed.min <= value <= allowed.max:
                    raise self._mismatch(spec, tensor, f"{symbol}={value} is out of range")
        return dims

    def check_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
        """check_inputs for tensors that are still to be made, of these shapes and the right dtypes."""
        known = {tensor.name: tensor.torch_dtype for tensor in self.inputs}
        self._check_names("inputs", list(known), shapes)
        return self.check_inputs(
            {name: torch.empty(shape, dtype=known[name], device="meta") for name, shape in shapes.items()}
        )

    def check_outputs(self, outputs: Mapping[str, torch.Tensor], dims: Mapping[str, int]) -> None:
        """EngineError unless names, dtypes and shapes are those that the spec gives for `dims`."""
        self._check_names("outputs", [tensor.name for tensor in self.outputs], outputs)
        for spec in self.outputs:
            tensor, shape = outputs[spec.name], spec.resolve(dims)
            if tensor.dtype != spec.torch_dtype or tuple(tensor.shape) != shape:
                raise EngineError(
                    f'Engine {self.name}: output "{spec.name}" must be {spec.dtype} {list(shape)}, '
                    f"got {_describe(tensor)}: the graph does not fit its spec, export it again."
                )

    def input_shapes(self, dims: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
        """Input name -> shape in numbers, given a size for each symbol."""
        return {tensor.name: tensor.resolve(dims) for tensor in self.inputs}

    def output_shapes(self, dims: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
        """Output name -> shape in numbers, given a size for each symbol."""
        return {tensor.name: tensor.resolve(dims) for tensor in self.outputs}

    def dynamic_shapes(self) -> dict[str, dict[int, Any]]:
        """Input name -> {axis: torch.export.Dim} for torch.onnx.export(dynamo=True), without symbols of one size.

        The keys follow the order of the inputs: pass tuple(spec.dynamic_shapes().values()) where the module's
        parameters have other names.
        """
        roots = {
            symbol: torch.export.Dim(symbol, min=dim.min, max=dim.max)
            for symbol, dim in self.dims.items()
            if dim.min < dim.max
        }
        return {tensor.name: dict(_export_axes(tensor, roots)) for tensor in self.inputs}

    def bounds(self, tensor: TensorSpec) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """The smallest, optimal and largest shape of one of the spec's tensors."""
        return (
            tensor.resolve({symbol: dim.min for symbol, dim in self.dims.items()}),
            tensor.resolve({symbol: dim.opt for symbol, dim in self.dims.items()}),
            tensor.resolve({symbol: dim.max for symbol, dim in self.dims.items()}),
        )

    def profile(self) -> dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]:
        """Input name -> its smallest, optimal and largest shape: an optimisation profile."""
        return {tensor.name: self.bounds(tensor) for tensor in self.inputs}

    def to_json(self) -> dict[str, Any]:
        """A JSON object that from_json reads back to an equal spec."""
        return {
            "name": self.name,
            "inputs": [_tensor_json(tensor) for tensor in self.inputs],
            "outputs": [_tensor_json(tensor) for tensor in self.outputs],
            "dims": {symbol: [dim.min, dim.opt, dim.max] for symbol, dim in self.dims.items()},
            **({"weights": [_weight_json(weight) for weight in self.weights]} if self.weights else {}),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "EngineSpec":
        """The spec that to_json wrote; EngineError if the object has another form."""
        try:
            return cls(
                name=data["name"],
                inputs=tuple(_tensor_from_json(tensor) for tensor in data["inputs"]),
                outputs=tuple(_tensor_from_json(tensor) for tensor in data["outputs"]),
                dims={symbol: Dim(*bounds) for symbol, bounds in data["dims"].items()},
                weights=tuple(_weight_from_json(weight) for weight in data.get("weights", ())),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise EngineError(
                f"An engine spec in JSON needs name, inputs, outputs and dims as to_json writes them, "
                f"got {type(error).__name__}: {error}; write the manifest again."
            ) from error

    def _check_names(self, what: str, expected: list[str], received: Mapping[str, object]) -> None:
        if received.keys() != set(expected):
            raise EngineError(
                f"Engine {self.name}: {what} must be {expected}, got {list(received)}: "
                f"missing {sorted(set(expected) - set(received))}, unknown {sorted(set(received) - set(expected))}."
            )

    def _mismatch(self, spec: TensorSpec, tensor: torch.Tensor, reason: str = "") -> EngineError:
        ranges = [f"{s} in {self.dims[s].min}..{self.dims[s].max}" for s in sorted(spec.symbols)]
        where = f" with {', '.join(ranges)}" if ranges else ""
        why = f" ({reason})" if reason else ""
        return EngineError(
            f'Engine {self.name}: input "{spec.name}" must be {spec}{where}, got {_describe(tensor)}{why}: '
            "pass a matching tensor, or build the engine for this shape."
        )


def _export_axes(tensor: TensorSpec, roots: Mapping[str, Any]) -> Iterator[tuple[int, Any]]:
    for index, axis in enumerate(tensor.axes):
        if isinstance(axis, Multiple) and axis.symbol in roots:
            yield index, roots[axis.symbol] if axis.factor == 1 else axis.factor * roots[axis.symbol]


def _describe(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _tensor_json(tensor: TensorSpec) -> dict[str, Any]:
    return {"name": tensor.name, "dtype": tensor.dtype, "shape": list(tensor.shape)}


def _tensor_from_json(data: Mapping[str, Any]) -> TensorSpec:
    return TensorSpec(data["name"], data["dtype"], tuple(data["shape"]))


def _weight_json(weight: WeightSpec) -> dict[str, Any]:
    source = {"key": weight.key, "form": weight.form, "axis": weight.axis, "parts": weight.parts}
    return {**_tensor_json(weight.tensor), **source}


def _weight_from_json(data: Mapping[str, Any]) -> WeightSpec:
    return WeightSpec(_tensor_from_json(data), data["key"], data["form"], data["axis"], data["parts"])
