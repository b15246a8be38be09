"""Weight inputs of an ONNX graph as initializers of a session.

ONNX Runtime packs weights for its products when a session is made, but only constants: an input stays as it is, and the
products with it are slower. So each weight input becomes an initializer whose data lie outside of the graph, and the
session gets these data under its name (tried with 1.31: for a plain input it refuses, and the file that an initializer
names need not be there).
"""

from collections.abc import Mapping
from typing import Any

import torch

from stepvideo_serve.engine.spec import EngineSpec, TensorSpec
from stepvideo_serve.errors import EngineError

_LOCATION = "given"  # named as the file of the data; ONNX Runtime does not look for it
_FP8 = "float8_e4m3fn"
_ONNX_TYPES: Mapping[str, str] = {
    "float32": "FLOAT",
    "float16": "FLOAT16",
    "bfloat16": "BFLOAT16",
    _FP8: "FLOAT8E4M3FN",
}


def with_initializers(graph: bytes, spec: EngineSpec) -> bytes:
    """The graph with the weights of `spec` as initializers without data instead of inputs. EngineError where it lacks
    one."""
    import onnx  # the import takes a moment, and only graphs with weight inputs need it

    model = onnx.load_model_from_string(graph)
    wanted = {weight.name: weight.tensor for weight in spec.weights}
    inputs = [value for value in model.graph.input if value.name not in wanted]
    if missing := wanted.keys() - {value.name for value in model.graph.input}:
        raise EngineError(
            f'Engine {spec.name}: the graph must have the weight "{min(missing)}" as an input, it has not: export it '
            "again."
        )
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    model.graph.initializer.extend(_placeholder(onnx, tensor) for tensor in wanted.values())
    content: bytes = model.SerializeToString()
    return content


def add_weights(ort: Any, options: Any, spec: EngineSpec, weights: Mapping[str, torch.Tensor]) -> list[Any]:
    """Gives the weights of `spec` to the session that will be made with `options`. Returns what has to live as long as
    the session; nothing is copied where the tensors are contiguous."""
    spec.check_weights(weights)
    kept = [weights[weight.name].contiguous() for weight in spec.weights]
    values = [_value(ort, weight.tensor, tensor) for weight, tensor in zip(spec.weights, kept, strict=True)]
    options.add_external_initializers([weight.name for weight in spec.weights], values)
    return [*kept, *values]


def _placeholder(onnx: Any, tensor: TensorSpec) -> Any:
    kind = getattr(onnx.TensorProto, _ONNX_TYPES[tensor.dtype])
    made = onnx.TensorProto(name=tensor.name, data_type=kind, dims=tensor.shape)
    made.data_location = onnx.TensorProto.EXTERNAL
    made.external_data.add(key="location", value=_LOCATION)
    return made


def _value(ort: Any, spec: TensorSpec, tensor: torch.Tensor) -> Any:
    if spec.dtype != _FP8:
        return ort.OrtValue.ortvalue_from_numpy(tensor.numpy())
    import onnx

    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(
        tensor.view(torch.uint8).numpy(), onnx.TensorProto.FLOAT8E4M3FN
    )
