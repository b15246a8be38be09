"""The torch operators on a GPU: the machine code of `make kernels`, launched on torch's current stream.

    operators = BuiltOperators(Path("build/kernels"))
    q, k, v = operators("qkv_norm_rope", [qkv, q_gain, k_gain, cos, sin], {"eps": 1e-6})
    operators.register()            # from here on torch.ops.stepvideo.* run it for CUDA tensors

Nothing is compiled, and the Triton language is not needed. What is launched, and how, is what a TensorRT plugin
queues: both take it from the operator's PluginForm.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepvideo_kernels.launch.library import KernelLibrary
from stepvideo_kernels.launch.parameters import Driver
from stepvideo_kernels.plugins.form import PluginForm, Shapes
from stepvideo_kernels.plugins.registration import forms
from stepvideo_serve.errors import EngineError

_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float8_e4m3fn: "fp8"}
_DTYPES = {"fp8": torch.float8_e4m3fn, "bf16": torch.bfloat16, "fp16": torch.float16}


def type_name(dtype: torch.dtype) -> str:
    """torch.bfloat16 -> "bf16"; raises EngineError for a type that no kernel knows."""
    if dtype not in _NAMES:
        raise EngineError(f"A kernel takes {', '.join(_NAMES.values())}, got {dtype}: cast before it.")
    return _NAMES[dtype]


def sm_of(device: torch.device) -> int:
    """The architecture of a CUDA device, e.g. 90."""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


class BuiltOperators:
    """The operators of a folder of kernels for one architecture.

    sm, driver  of the current GPU by default
    tiling      label of the tiling to take instead of the one for production; for benchmarks
    Raises EngineError when the folder has no kernels for the architecture.
    """

    def __init__(
        self, folder: Path, sm: int | None = None, driver: Driver | None = None, tiling: str | None = None
    ) -> None:
        self._sm = sm if sm is not None else sm_of(torch.device("cuda", torch.cuda.current_device()))
        self._library = KernelLibrary(folder, self._sm, driver, tiling)
        self._forms = {form.operator: form for form in forms()}

    def __call__(
        self,
        operator: str,
        inputs: Sequence[Tensor],
        attributes: Mapping[str, float] | None = None,
        outputs: Sequence[Tensor] | None = None,
    ) -> tuple[Tensor, ...]:
        """Queues the operator on its inputs, in its own order, and returns its outputs (new ones by default).

        Raises EngineError for operands that the kernel does not take, or where there is no driver.
        """
        form = self._forms[operator]
        elements = [type_name(tensor.dtype) for tensor in inputs]
        shapes = form.named([tuple(tensor.shape) for tensor in inputs])
        form.check(shapes, elements, self._sm)
        launch = form.prepare(self._library, elements, shapes, {**form.attributes, **(attributes or {})})
        # torch reuses memory in the order of the stream: a copy made here serves the kernel, though it is freed before.
        given = [tensor.contiguous() for tensor in inputs]
        device = given[0].device
        made = tuple(outputs) if outputs is not None else _empty(form, elements, shapes, device)
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        taken, written = ([tensor.data_ptr() for tensor in tensors] for tensors in (given, made))
        launch(taken, written, stream)
        return made

    def output_names(self, operator: str) -> tuple[str, ...]:
        """In the order of its outputs."""
        return tuple(one.name for one in self._forms[operator].outputs)

    def register(self) -> None:
        """Makes this the implementation of `torch.ops.stepvideo.*` for CUDA tensors, in place of an earlier one."""
        from stepvideo_kernels.plugins.onnx_nodes import operators

        for overload in operators():
            name = overload._schema.name.split("::")[1]
            torch.library.register_kernel(overload, "cuda", partial(self.call, name))

    def call(self, operator: str, *arguments: Any) -> Tensor | tuple[Tensor, ...]:
        """As torch calls it: tensors, then numbers, in the order of the schema."""
        form = self._forms[operator]
        tensors, numbers = arguments[: len(form.inputs)], arguments[len(form.inputs) :]
        given = tuple(form.attributes)[: len(numbers)]  # torch leaves defaults out at the end
        made = self(operator, tensors, dict(zip(given, map(float, numbers), strict=True)))
        return made[0] if len(made) == 1 else made


def _empty(form: PluginForm, elements: Sequence[str], shapes: Shapes, device: torch.device) -> tuple[Tensor, ...]:
    kinds = zip(form.output_shapes(shapes), form.output_elements(elements), strict=True)
    return tuple(torch.empty(shape, dtype=_DTYPES[element], device=device) for shape, element in kinds)
