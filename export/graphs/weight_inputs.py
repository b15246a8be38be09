"""Weights as inputs of a graph: which there are, where each comes from, and the module that takes them.

A graph without its weights fits every layer of its kind, every tensor-parallel rank and every checkpoint of that shape.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from stepvideo_serve.assembly.checkpoint import Checkpoint
from stepvideo_serve.assembly.graphs import Component
from stepvideo_serve.dit.config import BLOCKS_PREFIX
from stepvideo_serve.dit.segments import CoreSegment
from stepvideo_serve.engine.manifest import split_layer
from stepvideo_serve.engine.spec import (
    CODES,
    INPUT_INVERSE,
    LAYER,
    OF_ONE_NUMBER,
    OUTPUT_SCALE,
    PLAIN,
    SLOPES,
    VALUE_INVERSE,
    VALUE_SCALE,
    EngineSpec,
    TensorSpec,
    WeightSpec,
)
from stepvideo_serve.fused.fp8 import ScaledAttention, ScaledLinear
from stepvideo_serve.fused.layers import SHARED_CORE
from stepvideo_serve.text.step_llm import LAYERS_PREFIX

_WRAPPERS = ("block.", "outer.", "bert.")  # what graphs put before the checkpoint's names
_LINEAR = {"weight": CODES, "output_scale": OUTPUT_SCALE, "input_inverse": INPUT_INVERSE}
_ATTENTION = {"value_scale": VALUE_SCALE, "value_inverse": VALUE_INVERSE}


class WeightsOutside(nn.Module):
    """`module` called with its weights: first the inputs, then a tensor for each weight of `spec`, in their order. What
    is no weight, such as a constant scale, stays a constant."""

    def __init__(self, module: nn.Module, spec: EngineSpec) -> None:
        super().__init__()
        self._held = (module,)  # not as a part, or its weights would be constants
        self._inputs, self._names = len(spec.inputs), [weight.name for weight in spec.weights]
        constants = [name for name in state_of(module) if name not in self._names]
        self._constants = {name: f"constant_{index}" for index, name in enumerate(constants)}
        for name, buffer in self._constants.items():
            self.register_buffer(buffer, state_of(module)[name], persistent=False)

    def forward(self, *tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
        constants = {name: self.get_buffer(buffer) for name, buffer in self._constants.items()}
        weights = dict(zip(self._names, tensors[self._inputs :], strict=True))
        called: Tensor | tuple[Tensor, ...] = torch.func.functional_call(
            self._held[0], {**constants, **weights}, tensors[: self._inputs]
        )
        return called


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers by their names."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def with_weights(component: Component, module: nn.Module, checkpoint: Checkpoint, parts: int) -> EngineSpec:
    """The component's spec with the weights of `module`, a slice for one of `parts` tensor-parallel ranks."""
    state = state_of(module)
    weights = []
    for name, key, form in _sources(component, module):
        axis = _axis(component, checkpoint, key, form, parts)
        shape, dtype = tuple(state[name].shape), str(state[name].dtype).removeprefix("torch.")
        tensor = TensorSpec(name, dtype, shape)
        weights.append(WeightSpec(tensor, key, form, axis, 1 if axis is None else parts))
    return replace(component.spec, weights=tuple(weights))


def values_of(module: nn.Module, spec: EngineSpec) -> dict[str, Tensor]:
    """The weights of `spec` in `module`."""
    state = state_of(module)
    return {weight.name: state[weight.name].detach().contiguous() for weight in spec.weights}


def _sources(component: Component, module: nn.Module) -> Iterator[tuple[str, str, str]]:
    """Name, key and form of every weight."""
    for path, part in module.named_modules():
        before = f"{path}." if path else ""
        if isinstance(part, ScaledLinear):
            for name, form in _LINEAR.items():
                yield before + name, _key(component, module, path) + (".weight" if form == CODES else ""), form
        elif isinstance(part, ScaledAttention):
            for name, form in _ATTENTION.items():
                yield before + name, _key(component, module, path), form
        else:
            for name, _ in part.named_parameters(recurse=False):
                yield before + name, _key(component, module, before + name), PLAIN
            if "slopes" in dict(part.named_buffers(recurse=False)):
                yield f"{before}slopes", SLOPES, SLOPES
            for name, (layer, form) in getattr(part, "scale_inputs", {}).items():  # fused/shared_scales.py
                yield before + name, _key(component, module, layer) + (".weight" if form == CODES else ""), form


def _key(component: Component, module: nn.Module, path: str) -> str:
    """The checkpoint's name of what is at `path`, with LAYER for the number of the layer."""
    if isinstance(module, CoreSegment):
        return SHARED_CORE
    for wrapper in _WRAPPERS:
        path = path.removeprefix(wrapper)
    if component.part == "dit":
        return (f"{BLOCKS_PREFIX}{LAYER}." if component.prefix else "") + path
    layered = component.part == "llm" and split_layer(component.name)[1] is not None
    return (f"{LAYERS_PREFIX}{LAYER}." if layered else "") + path


def _axis(component: Component, checkpoint: Checkpoint, key: str, form: str, parts: int) -> int | None:
    if parts == 1 or form in OF_ONE_NUMBER:
        return None
    if form == SLOPES:
        return 0
    weight = f"{key}.weight" if form == OUTPUT_SCALE else key
    axis = checkpoint.cut_axis(component.part, weight.replace(LAYER, "0"), parts)
    return None if form == OUTPUT_SCALE and axis == 1 else axis
