"""The plan of an engine of data-centre TensorRT: what its EngineInspector says in JSON, beside what the engine itself
says about its inputs, outputs and memory.

10.x and 11.x write a tensor's type in two ways, "Format/Datatype": "Half" or "Row major linear FP16 format", and
"Datatype": "BFloat16" with a "Format" of its own; only the latter lists "Constants". Where a product's weight is not
listed, its type is that of the input: TensorRT multiplies tensors of one type.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from export.engines.engine_plan import Binding, Plan, PlanLayer, PlanTensor, onnx_nodes
from stepvideo_serve.errors import ExportError

# What words of a format mean, the first that occurs; the values are what TensorRT prints at the end of a build.
_TYPES = (
    ("BF16", "BFloat16"),
    ("BFLOAT16", "BFloat16"),
    ("FP16", "Half"),
    ("HALF", "Half"),
    ("FP8", "FP8"),
    ("FP4", "FP4E2M1"),
    ("FP32", "Float"),
    ("FLOAT", "Float"),
    ("INT64", "Int64"),
    ("INT32", "Int32"),
    ("UINT8", "UInt8"),
    ("INT8", "Int8"),
    ("INT4", "Int4"),
    ("BOOL", "Bool"),
)
_MODES = {"INPUT": "Input", "OUTPUT": "Output"}


def describe(trt: Any, content: Any) -> dict[str, Any]:
    """What a serialized engine is, for `read_inspection`: "inspector" is the inspector's text. Loads the engine on the
    GPU by Polygraphy, whose exception it raises when TensorRT refuses."""
    from polygraphy.backend.trt import EngineFromBytes

    engine = EngineFromBytes(content)()
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    inspector = engine.create_engine_inspector()
    return {
        "inspector": inspector.get_engine_information(trt.LayerInformationFormat.JSON),
        "bindings": [_binding(trt, engine, name) for name in names],
        "activation_bytes": engine.device_memory_size_v2,
        "engine_bytes": memoryview(content).nbytes,
    }


def _binding(trt: Any, engine: Any, name: str) -> dict[str, Any]:
    mode = engine.get_tensor_mode(name)
    is_input = mode == trt.TensorIOMode.INPUT
    shapes = engine.get_tensor_profile_shape(name, 0) if is_input else ()
    return {
        "name": name,
        "mode": mode.name,
        "dtype": engine.get_tensor_dtype(name).name,
        "dims": list(engine.get_tensor_shape(name)),
        "profile": [list(shape) for shape in shapes],
    }


def read_inspection(path: Path) -> Plan:
    """The plan in a file of `describe`. Raises ExportError when the inspector wrote another form than those known."""
    found = json.loads(path.read_text(encoding="utf-8"))
    try:
        layers = json.loads(found["inspector"])["Layers"]
        plan_layers = tuple(_layer(layer) for layer in layers)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ExportError(
            f"TensorRT's EngineInspector must describe each layer in detail, in a form of 10.x or 11.x, found another "
            f"({type(error).__name__}: {error}): this version of TensorRT writes it in another form."
        ) from None
    bindings = tuple(
        Binding(
            name=row["name"],
            mode=_MODES[row["mode"]],
            dtype=_dtype(row["dtype"]),
            dims=tuple(row["dims"]),
            profile=tuple(tuple(shape) for shape in row["profile"]),
        )
        for row in found["bindings"]
    )
    return Plan(plan_layers, bindings, found["activation_bytes"], found["engine_bytes"])


def _layer(layer: Mapping[str, Any]) -> PlanLayer:
    return PlanLayer(
        name=layer["Name"],
        kind=layer["LayerType"],
        tactic=layer.get("TacticName", ""),
        inputs=tuple(_tensors(layer, "Inputs")),
        constants=tuple(_tensors(layer, "Constants")),
        outputs=tuple(_tensors(layer, "Outputs")),
        onnx_nodes=onnx_nodes(layer.get("Metadata", "")),
    )


def _tensors(layer: Mapping[str, Any], section: str) -> Iterator[PlanTensor]:
    for tensor in layer.get(section, []):
        text = tensor["Datatype"] if "Datatype" in tensor else tensor["Format/Datatype"]
        yield PlanTensor(tensor["Name"], tuple(tensor["Dimensions"]), _dtype(text))


def _dtype(text: str) -> str:
    """ "Row major linear FP16 format" -> "Half", "BF16" -> "BFloat16". What is not known stays as it is."""
    upper = text.upper()
    return next((dtype for word, dtype in _TYPES if word in upper), text)
