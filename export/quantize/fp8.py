"""Puts FP8 and NVFP4 layers into the modules of graphs."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from onnx import GraphProto, TensorProto
from torch import Tensor, nn

from export.quantize.calibration import Calibration
from stepvideo_serve.assembly.graphs import Component
from stepvideo_serve.engine.manifest import content_key
from stepvideo_serve.engine.spec import TORCH_DTYPES
from stepvideo_serve.errors import ExportError
from stepvideo_serve.fused.fp8 import HEAD_GAINS, QuantizedAttention, QuantizedLinear, ScaledAttention, ScaledLinear
from stepvideo_serve.fused.layers import OPERANDS, SHARED_CORE, Layer, belongs, is_kept, layer_of, quantizable
from stepvideo_serve.fused.nvfp4 import BLOCK, Fp4Linear

Linears = Literal["fp8", "nvfp4"]


@dataclass(frozen=True)
class Fp8:
    """What to quantise: ranges of activations, and globs of layers that stay as they are (see fused/layers.py).

    `linears`: the format of linear layers, "fp8" or "nvfp4"; attention has FP8 with both.
    """

    calibration: Calibration
    keep: tuple[str, ...] = ()
    linears: Linears = "fp8"

    def key(self, component: Component) -> str:
        """Equal keys make equal graphs of equal weights."""
        amax = {
            tensor: value
            for tensor, value in self.calibration.amax.items()
            if belongs(component, layer_of(tensor)) and not is_kept(layer_of(tensor), self.keep)
        }
        shared = component.name.startswith("dit_core_") and is_kept(SHARED_CORE, self.keep)
        return content_key(amax=amax, keeps_shared_core=shared)


def quantize_module(component: Component, module: nn.Module, fp8: Fp8) -> list[str]:
    """Replaces the layers of `module` in place, one after the other, so that at most one is there twice. Returns the
    names of those replaced. Raises ExportError for one that was not calibrated."""
    dtype = TORCH_DTYPES[component.spec.outputs[0].dtype]
    done = []
    for layer in quantizable(component, module):
        if not is_kept(layer.name, fp8.keep):
            layer.put(quantized(layer, fp8.calibration, dtype, fp8.linears))
            done.append(layer.name)
    return done


def quantized(layer: Layer, calibration: Calibration, dtype: torch.dtype, linears: Linears = "fp8") -> nn.Module:
    """What takes the layer's place; `dtype` is that of its graph. A linear layer whose inputs are no whole blocks has
    FP8 instead of NVFP4. Raises ExportError when the layer was not calibrated."""
    if isinstance(layer.module, nn.Linear):
        if linears == "nvfp4" and layer.module.in_features % BLOCK == 0:
            return Fp4Linear(layer.module, calibration.of(layer.name))
        return QuantizedLinear(layer.module, calibration.of(layer.name))
    of = calibration.largest if layer.name == SHARED_CORE else calibration.of
    return QuantizedAttention(dtype, *(of(f"{layer.name}.{operand}") for operand in OPERANDS))


def scale_module(component: Component, module: nn.Module, fp8: Fp8) -> list[str]:
    """`quantize_module` for a graph whose weights are inputs: FP8 linear layers and attentions whose scales are inputs,
    too. Raises ExportError for a layer that was not calibrated."""
    dtype = TORCH_DTYPES[component.spec.outputs[0].dtype]
    done = []
    for layer in quantizable(component, module):
        if not is_kept(layer.name, fp8.keep):
            layer.put(scaled(layer, fp8.calibration, dtype))
            done.append(layer.name)
    return done


def norm_gains(attention: nn.Module) -> dict[str, Tensor]:
    """Of the norms of an attention's queries and keys."""
    return {norm: attention.get_parameter(f"{norm}.weight") for norm in ("q_norm", "k_norm")}


def require_gains(name: str, gains: Mapping[str, Tensor]) -> None:
    """Raises ExportError where the constant scale of queries and keys is not for an attention with norms of these
    gains."""
    low, high = HEAD_GAINS
    for norm, gain in gains.items():
        largest = float(gain.abs().max())
        if not low <= largest <= high:
            raise ExportError(
                f"{name} must have a largest norm gain of {low:g} to {high:g} for the scale of its queries and keys, "
                f"{norm} has {largest:.3g}: keep it in bf16 (--keep-bf16), or leave the weights constant."
            )


def scaled(layer: Layer, calibration: Calibration, dtype: torch.dtype) -> nn.Module:
    """`quantized` for a graph whose weights are inputs. Raises ExportError for norm gains beyond the constant scale."""
    if isinstance(layer.module, nn.Linear):
        return ScaledLinear(layer.module, calibration.of(layer.name), dtype)
    if hasattr(layer.parent, "q_norm"):  # plain or with fused operators
        require_gains(layer.name, norm_gains(layer.parent))
    of = calibration.largest if layer.name == SHARED_CORE else calibration.of
    return ScaledAttention(dtype, of(f"{layer.name}.v"))


def count_quantized(graph: GraphProto) -> dict[str, int]:
    """{"linears": n, "attentions": m, "fp4_linears": l}: FP8 products with weights, FP8 attentions, and NVFP4 products
    if there are any, that an engine of the exported graph must have. A linear layer is a weight that is dequantised,
    an attention a softmax that is quantised."""
    types = {value.name: value.type.tensor_type.elem_type for value in graph.input}
    types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    dequantised = [node for node in graph.node if node.op_type == "DequantizeLinear"]
    scales = {node.input[1] for node in dequantised}  # those of blocks are dequantised, too
    weights = [types[node.input[0]] for node in dequantised if node.input[0] in types and node.output[0] not in scales]
    fp4_linears = weights.count(TensorProto.FLOAT4E2M1)
    quantized = {node.input[0] for node in graph.node if node.op_type == "QuantizeLinear"}
    attentions = sum(node.op_type == "Softmax" and node.output[0] in quantized for node in graph.node)
    counts = {"linears": len(weights) - fp4_linears, "attentions": attentions}
    return counts | ({"fp4_linears": fp4_linears} if fp4_linears else {})
