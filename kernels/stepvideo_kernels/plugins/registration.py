"""The operators as TensorRT plugins (IPluginV3), for the builder, the ONNX parser and the run time.

    registration = register(tensorrt)                         # before an ONNX graph is parsed
    registration = register(tensorrt, device_kernels(folder)) # before an engine is deserialised

`tensorrt` is the module, `tensorrt` or `tensorrt_rtx`. An ONNX node of the domain "stepvideo" becomes a plugin layer
of the same name. A plugin launches the machine code of `make kernels` on TensorRT's stream.
Source: TensorRT's Python API, IPluginV3 with the capabilities OneCore, OneBuild and OneRuntime.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import numpy as np

from stepvideo_kernels.choice import OPS
from stepvideo_kernels.kernel_spec import ONNX_DOMAIN, ONNX_VERSION
from stepvideo_kernels.launch.library import KernelLibrary
from stepvideo_kernels.plugins.form import MAIN, PluginForm, PreparedLaunch
from stepvideo_serve.errors import EngineError

Library = Callable[[], KernelLibrary]

# Names of TensorRT's element types.
_ELEMENTS: Mapping[str, str] = {"FLOAT": "fp32", "HALF": "fp16", "BF16": "bf16", "FP8": "fp8"}


@dataclass
class Registration:
    """What the plugins of one TensorRT module share.

    library   gives the kernels of the GPU at hand; None where engines are only built
    sm        the architecture that engines are built for, to refuse what it lacks; None at run time
    refusals  every sentence with which a plugin refused a graph: TensorRT prints them to stderr and returns no engine
    kernels   what the plugins of the graphs so far will look up when they run: {"op", "variant", "constants"} of each
    creators  one for each operator
    """

    library: Library | None
    sm: int | None
    refusals: list[str] = field(default_factory=list)
    kernels: list[dict[str, Any]] = field(default_factory=list)
    creators: list[Any] = field(default_factory=list)


def register(tensorrt: Any, library: Library | None = None, sm: int | None = None) -> Registration:
    """Makes the plugins known to a TensorRT module; where they are known, only `library` and `sm` are replaced.

    Raises EngineError when TensorRT refuses, or when other plugins have their names.
    """
    registry = tensorrt.get_plugin_registry()
    for creator in registry.all_creators:
        found = getattr(creator, "registration", None)
        if isinstance(found, Registration):
            found.library, found.sm = library or found.library, sm
            return found
    registration = Registration(library, sm)
    for form in forms():
        creator = creator_class(tensorrt)(form, registration)
        if not registry.register_creator(creator, ONNX_DOMAIN):
            raise EngineError(f"TensorRT must take the plugin {form.operator}, it refused: another has its name.")
        registration.creators.append(creator)
    return registration


def forms() -> tuple[PluginForm, ...]:
    """Of every operator."""
    found: list[PluginForm] = []
    for op in OPS:
        found += cast(Sequence[PluginForm], import_module(f"stepvideo_kernels.{op}.plugin").FORMS)
    return tuple(found)


def device_kernels(folder: Path, described: Mapping[str, str] | None = None) -> Library:
    """The kernels in a folder for the GPU that is current when they are first asked for; `described`: hashes of their
    descriptions by file name, with which these are compared."""

    @cache
    def library() -> KernelLibrary:
        from stepvideo_kernels.launch.cuda_driver import CudaDriver

        driver = CudaDriver()
        return KernelLibrary(folder, driver.current_sm(), driver, described=described)

    return library


@cache
def creator_class(tensorrt: Any) -> Any:
    """IPluginCreatorV3One of a TensorRT module; made with a form and a registration."""

    class Creator(tensorrt.IPluginCreatorV3One):  # type: ignore[misc]
        def __init__(self, form: PluginForm, registration: Registration) -> None:
            super().__init__()
            self.form, self.registration = form, registration
            self.name, self.plugin_namespace, self.plugin_version = form.operator, ONNX_DOMAIN, str(ONNX_VERSION)
            kind = tensorrt.PluginFieldType.FLOAT32
            # A field keeps the address of its array only.
            self._defaults = {name: np.array([value], np.float32) for name, value in form.attributes.items()}
            fields = [tensorrt.PluginField(name, array, kind) for name, array in self._defaults.items()]
            self.field_names = tensorrt.PluginFieldCollection(fields)

        def create_plugin(self, name: str, fields: Any, phase: Any) -> Any:
            """From the attributes of an ONNX node, or from what get_fields_to_serialize wrote."""
            del name, phase
            given = {one.name: float(one.data[0]) for one in fields if one.name in self.form.attributes}
            return plugin_class(tensorrt)(self.form, {**self.form.attributes, **given}, self.registration)

    return Creator


@cache
def plugin_class(tensorrt: Any) -> Any:
    """IPluginV3 of a TensorRT module; made with a form, its attributes and a registration."""
    bases = (tensorrt.IPluginV3, tensorrt.IPluginV3OneCore, tensorrt.IPluginV3OneBuild, tensorrt.IPluginV3OneRuntime)

    class Plugin(*bases):  # type: ignore[misc]
        def __init__(self, form: PluginForm, attributes: Mapping[str, float], registration: Registration) -> None:
            for base in bases:
                base.__init__(self)
            self.plugin_name, self.plugin_namespace, self.plugin_version = form.operator, ONNX_DOMAIN, str(ONNX_VERSION)
            self.num_outputs = len(form.outputs)
            self.timing_cache_id = ""  # there is one way to run it, so that nothing needs to be timed
            self.form, self.attributes, self.registration = form, dict(attributes), registration
            self._arrays = {name: np.array([value], np.float32) for name, value in attributes.items()}
            self._launch: PreparedLaunch | None = None

        def get_capability_interface(self, kind: Any) -> Any:
            del kind
            return self

        def clone(self) -> Any:
            return plugin_class(tensorrt)(self.form, self.attributes, self.registration)

        def get_output_data_types(self, input_types: Sequence[Any]) -> list[Any]:
            elements = [_element(one) for one in input_types]
            made = self._judge(partial(self.form.output_elements, elements))
            return [_data_type(tensorrt, one) for one in made]

        def get_output_shapes(self, inputs: Sequence[Any], shape_inputs: Sequence[Any], builder: Any) -> list[Any]:
            del shape_inputs
            sizes = [tuple(_Size.of(tensorrt, builder, one) for one in dims) for dims in inputs]
            made = self._judge(lambda: self.form.output_shapes(self.form.named(sizes)))
            return [tensorrt.DimsExprs([_expression(builder, size) for size in shape]) for shape in made]

        def supports_format_combination(self, pos: int, in_out: Sequence[Any], num_inputs: int) -> bool:
            """Contiguous tensors only, of the one type that the first input leaves."""
            desc = in_out[pos].desc
            if desc.format != tensorrt.TensorFormat.LINEAR:
                return False
            first, element = _element(in_out[0].desc.type), _element(desc.type)
            if first not in self.form.elements:
                return False
            operands = (*self.form.inputs[:num_inputs], *self.form.outputs)
            wanted = operands[pos].element
            return element == (first if wanted == MAIN else wanted)

        def configure_plugin(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
            """Judges the types and the shapes at both ends of the profile."""
            del outputs
            elements = [_element(one.desc.type) for one in inputs]
            for ends in ([tuple(one.desc.dims) for one in inputs], [tuple(one.max) for one in inputs]):
                self._judge(partial(self._check, ends, elements))
            kernel = self.form.kernel(elements, self.form.named([tuple(one.max) for one in inputs]))
            if kernel not in self.registration.kernels:
                self.registration.kernels.append(kernel)

        def get_workspace_size(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
            """None: the kernels keep everything in registers and shared memory."""
            del inputs, outputs
            return 0

        def set_tactic(self, tactic: int) -> None:
            del tactic

        def attach_to_context(self, context: Any) -> Any:
            del context
            return self.clone()

        def get_fields_to_serialize(self) -> Any:
            kind = tensorrt.PluginFieldType.FLOAT32
            fields = [tensorrt.PluginField(name, array, kind) for name, array in self._arrays.items()]
            return tensorrt.PluginFieldCollection(fields)

        def on_shape_change(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
            """Loads the kernel, so that an enqueue only queues it and can be captured into a CUDA graph."""
            del outputs
            library = self.registration.library
            self._launch = None
            if library is None:
                return  # the builder asks as well
            elements = [_element(one.type) for one in inputs]
            shapes = self.form.named([tuple(one.dims) for one in inputs])
            self._launch = self.form.prepare(library(), elements, shapes, self.attributes)

        def enqueue(
            self, input_desc: Any, output_desc: Any, inputs: Sequence[int], outputs: Sequence[int], workspace: int,
            stream: int,
        ) -> None:  # fmt: skip
            del input_desc, output_desc, workspace
            if self._launch is None:
                raise EngineError(
                    f"The plugin {self.form.operator} must have kernels to run, it was registered without: "
                    "register it with the folder of `make kernels`."
                )
            self._launch(inputs, outputs, stream)

        def _check(self, shapes: Sequence[tuple[int, ...]], elements: Sequence[str]) -> None:
            self.form.output_elements(elements)
            self.form.check(self.form.named(shapes), elements, self.registration.sm)

        def _judge(self, question: Callable[[], Any]) -> Any:
            """Its answer; a refusal is kept, since TensorRT turns an exception into a failed build."""
            try:
                return question()
            except EngineError as error:
                self.registration.refusals.append(str(error))
                raise

    return Plugin


class _Size:
    """A dimension expression of TensorRT with the operators of an integer."""

    def __init__(self, tensorrt: Any, builder: Any, expression: Any) -> None:
        self.expression = expression
        self._tensorrt, self._builder = tensorrt, builder

    @classmethod
    def of(cls, tensorrt: Any, builder: Any, expression: Any) -> Any:
        """An integer where the expression is a constant."""
        if expression.is_constant():
            return int(expression.get_constant_value())
        return cls(tensorrt, builder, expression)

    def __add__(self, other: Any) -> "_Size":
        return self._made("SUM", other)

    def __sub__(self, other: Any) -> "_Size":
        return self._made("SUB", other)

    def __mul__(self, other: Any) -> "_Size":
        return self._made("PROD", other)

    def __floordiv__(self, other: int) -> "_Size":
        return self._made("FLOOR_DIV", other)

    __radd__, __rmul__ = __add__, __mul__

    def _made(self, operation: str, other: Any) -> "_Size":
        operand = getattr(self._tensorrt.DimensionOperation, operation)
        result = self._builder.operation(operand, self.expression, _expression(self._builder, other))
        return _Size(self._tensorrt, self._builder, result)


def _expression(builder: Any, size: Any) -> Any:
    return size.expression if isinstance(size, _Size) else builder.constant(size)


def _element(data_type: Any) -> str:
    """Our name of a TensorRT type, its own where we have none."""
    return _ELEMENTS.get(data_type.name, data_type.name)


def _data_type(tensorrt: Any, element: str) -> Any:
    return next(getattr(tensorrt.DataType, theirs) for theirs, ours in _ELEMENTS.items() if ours == element)
