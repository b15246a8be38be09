"""What a plan must look like, read off the ONNX graph that it was built from.

FP8 products   each matrix product with a quantised weight is a GEMM whose weight and input are FP8
fp32 products  a GEMM is in fp32 only where the graph says so
attention      each attention is one fused kernel: its scores are never written to memory. Scores that stay below
               1 GiB at the largest profile may be (the Video-VAE's attention goes by blocks of queries)
memory         activations stay below a stated bound
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import onnx

from export.engines.engine_plan import Plan, PlanLayer
from stepvideo_serve.engine.spec import EngineSpec

GIB = 2**30
MAX_SCORE_BYTES = GIB
SCORE_BYTES = 4  # softmax is computed in fp32

# Activation memory at the largest profile, as a multiple of the bytes of all inputs and outputs there. A block of the
# DiT needs 5.4 in bf16; the scores of one of its 48 heads alone would be another 5.
ACTIVATION_FACTOR = 12
# The decoder's inner tensors at pixel resolution have 128 channels in place of 3.
VAE_ACTIVATION_FACTOR = 400
LEAST_BOUND = 64 * 2**20

_THROUGH = ("Transpose", "Reshape", "Cast", "Identity", "Unsqueeze", "Squeeze", "DequantizeLinear", "QuantizeLinear")
_ATTENTION_OPS = ("Attention", "TRT_QuantizedAttention")
_PRODUCTS = ("MatMul", "Gemm")
PLUGIN_DOMAIN = "stepvideo"
FP8, FP4, FP32 = "FP8", "FP4E2M1", "Float"  # as TensorRT writes them


@dataclass(frozen=True)
class Expected:
    """Names of ONNX nodes by what the plan must make of them. `products`: all that have a weight."""

    fp8_products: tuple[str, ...]
    fp4_products: tuple[str, ...]
    fp32_products: tuple[str, ...]
    attentions: tuple[str, ...]
    plugins: tuple[str, ...]
    activation_bytes: int
    products: tuple[str, ...] = ()


def expected_of(path: Path, spec: EngineSpec) -> Expected:
    """What the graph in the ONNX file `path` asks for; `spec` has the ranges of the profile. Reads no weights."""
    graph = onnx.load(str(path), load_external_data=False).graph
    reader = _Graph(graph, (weight.name for weight in spec.weights))
    weights = {node.name: reader.weight_type(node) for node in graph.node if node.op_type in _PRODUCTS}
    return Expected(
        fp8_products=tuple(name for name, kind in weights.items() if kind == onnx.TensorProto.FLOAT8E4M3FN),
        fp4_products=tuple(name for name, kind in weights.items() if kind == onnx.TensorProto.FLOAT4E2M1),
        fp32_products=tuple(name for name, kind in weights.items() if kind == onnx.TensorProto.FLOAT),
        attentions=tuple(reader.attentions(spec)),
        plugins=tuple(node.name for node in graph.node if node.domain == PLUGIN_DOMAIN),
        activation_bytes=activation_bound(spec),
        products=tuple(name for name, kind in weights.items() if kind is not None),
    )


def activation_bound(spec: EngineSpec) -> int:
    """The most bytes of activations that an engine of this profile may need."""
    tensors = (*spec.inputs, *spec.outputs)
    used = sum(prod(spec.bounds(tensor)[2]) * tensor.torch_dtype.itemsize for tensor in tensors)
    factor = VAE_ACTIVATION_FACTOR if spec.name.startswith("vae_") else ACTIVATION_FACTOR
    return max(factor * used, LEAST_BOUND)


def violations(plan: Plan, expected: Expected) -> list[str]:
    """One sentence for each expectation that the plan does not meet: what was expected, what was found."""
    return [*_wrong_products(plan, expected), *_wrong_attentions(plan, expected), *_wrong_memory(plan, expected)]


def summary(plan: Plan) -> dict[str, int]:
    """The figures of a plan that the report shows."""
    products = [layer for layer in plan.layers if layer.is_matrix_product]
    return {
        "layers": len(plan.layers),
        "gemms": len(products),
        "fp8_gemms": sum(_computes_in(layer, FP8) for layer in products),
        "fp4_gemms": sum(_computes_in(layer, FP4) for layer in products),
        "fused_attentions": sum(layer.is_fused_attention for layer in plan.layers),
        "activation_bytes": plan.activation_bytes,
        "weight_bytes": plan.weight_bytes,
    }


def _wrong_products(plan: Plan, expected: Expected) -> Iterator[str]:
    products = [layer for layer in plan.layers if layer.is_matrix_product]
    for kind, dtype, names in (("FP8", FP8, expected.fp8_products), ("FP4", FP4, expected.fp4_products)):
        found = {node for layer in products if _computes_in(layer, dtype) for node in layer.onnx_nodes}
        if missing := [name for name in names if name not in found]:
            count = len(names)
            got = count - len(missing)
            yield f"{count} {kind} GEMMs were expected, {got} found; not in {kind}: {', '.join(missing)}"
    weighted, wide = set(expected.products), set(expected.fp32_products)
    unexpected = [
        layer.name
        for layer in products
        if (layer.weight or weighted & set(layer.onnx_nodes))
        and _computes_in(layer, FP32)
        and not wide & set(layer.onnx_nodes)
    ]
    if unexpected:
        yield f"no fp32 GEMM was expected but {len(expected.fp32_products)}, found also: {', '.join(unexpected)}"


def _wrong_attentions(plan: Plan, expected: Expected) -> Iterator[str]:
    fused = {node for layer in plan.layers if layer.is_fused_attention for node in layer.onnx_nodes}
    if missing := [name for name in expected.attentions if name not in fused]:
        count = len(expected.attentions)
        yield (
            f"{count} fused attention kernels were expected, {count - len(missing)} found; "
            f"with scores in memory: {', '.join(missing)}"
        )
    computed = {node for layer in plan.layers for node in layer.onnx_nodes}
    if missing := [name for name in expected.plugins if name not in computed]:
        yield f"{len(expected.plugins)} plugin layers were expected, missing: {', '.join(missing)}"


def _wrong_memory(plan: Plan, expected: Expected) -> Iterator[str]:
    if plan.activation_bytes > expected.activation_bytes:
        yield (
            f"activations of at most {expected.activation_bytes / GIB:.2f} GiB were expected, found "
            f"{plan.activation_bytes / GIB:.2f} GiB; narrow the shapes, or look for scores in memory"
        )


def _computes_in(layer: PlanLayer, dtype: str) -> bool:
    """Whether a product has operands of this type. A weight that is no constant of the layer is another input, or one
    that the plan does not list: then the input whose size is open tells."""
    same = [tensor for tensor in layer.inputs if tensor.dtype == dtype]
    if layer.weight:
        return layer.weight.dtype == dtype and bool(same)
    return len(same) > 1 or any(-1 in tensor.dims for tensor in same)


class _Graph:
    """The links of an ONNX graph."""

    def __init__(self, graph: onnx.GraphProto, weights: Iterable[str] = ()) -> None:
        """`weights`: the inputs that are weights."""
        self._graph = graph
        self._types = {tensor.name: tensor.data_type for tensor in graph.initializer}
        inputs = {value.name: value.type.tensor_type.elem_type for value in graph.input}
        self._types |= {name: inputs[name] for name in weights if name in inputs}
        self._producers = {name: node for node in graph.node for name in node.output}
        self._shapes = {
            value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
            for value in (*graph.value_info, *graph.output)
        }

    def weight_type(self, node: onnx.NodeProto) -> int | None:
        """TensorProto type in which a product's weight is stored; None for a product of activations."""
        for name in node.input[1::-1]:
            source: str | None = name
            while source in self._producers and self._producers[source].op_type in _THROUGH:
                source = self._producers[source].input[0]
            if source in self._types:
                return int(self._types[source])
        return None

    def attentions(self, spec: EngineSpec) -> Iterator[str]:
        """Nodes that a fused kernel has to contain: attention operators, and a softmax whose scores may be large."""
        largest = {symbol: dim.max for symbol, dim in spec.dims.items()}
        for node in self._graph.node:
            fp8 = node.op_type == "Softmax" and self._is_quantized(node.output[0])
            too_large = node.op_type == "Softmax" and self._bytes(node.output[0], largest) > MAX_SCORE_BYTES
            if node.op_type in _ATTENTION_OPS or fp8 or too_large:
                yield node.name

    def _is_quantized(self, tensor: str) -> bool:
        return any(node.op_type == "QuantizeLinear" and node.input[0] == tensor for node in self._graph.node)

    def _bytes(self, tensor: str, sizes: Mapping[str, int]) -> float:
        """Of a tensor in fp32 at these sizes; infinite where the graph does not tell."""
        shape = self._shapes.get(tensor)
        if shape is None:
            return float("inf")
        return SCORE_BYTES * prod(_size(dim, sizes) for dim in shape)


def _size(dim: int | str, sizes: Mapping[str, int]) -> float:
    """Of 5, "tokens" or a product such as "4*latent_height*latent_width"; infinite for any other expression."""
    factors = dim.split("*") if isinstance(dim, str) else [str(dim)]
    known = {name: float(size) for name, size in sizes.items()}
    return prod(float(factor) if factor.isdigit() else known.get(factor, float("inf")) for factor in factors)
