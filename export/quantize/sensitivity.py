"""What the quantisation of each layer alone does to the latents at the end of a loop, and which layers fit a budget.

The errors of single layers are nearly independent, so that their squares add up: that is how the budget is shared out.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from export.compare.denoising import run_eager, run_loop
from export.compare.one_graph import error_row
from export.quantize.calibration import Calibration
from export.quantize.fp8 import Linears, quantized, scaled
from stepvideo_serve.assembly.checkpoint import Checkpoint
from stepvideo_serve.assembly.graphs import components
from stepvideo_serve.engine.runner import EagerRunner, EngineRunner
from stepvideo_serve.errors import ExportError
from stepvideo_serve.fused.layers import Layer, all_names, quantizable
from stepvideo_serve.request import GenerationRequest

GROUPINGS = ("layer", "block", "kind")

Tick = Callable[[], None]


@dataclass(frozen=True)
class Effect:
    """glob: the layers that were quantised; rms, error and cosine of the final latents (see compare.error_row)."""

    glob: str
    error: float
    rms: float
    cosine: float


@dataclass(frozen=True)
class Sensitivity:
    """effects, worst first; `bf16_rms`: what torch loses in bf16 in the same loop."""

    effects: tuple[Effect, ...]
    bf16_rms: float

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return {"bf16_rms": self.bf16_rms, "effects": [asdict(effect) for effect in self.effects]}

    def keep(self, ratio: float) -> list[str]:
        """The globs to keep in bf16, worst first, so that the rest is expected to lose at most `ratio` times what bf16
        loses, the loss of bf16 itself included. `ratio` >= 1."""
        if not ratio >= 1:
            raise ExportError(f"--budget must be at least 1, the loss of bf16 itself, got {ratio:g}: raise it.")
        left = (ratio**2 - 1) * self.bf16_rms**2
        quantised = 0
        for effect in reversed(self.effects):
            left -= effect.rms**2
            if left < 0:
                break
            quantised += 1
        return [effect.glob for effect in self.effects[: len(self.effects) - quantised]]


def globs(checkpoint: Checkpoint, grouping: str) -> list[str]:
    """What is quantised together: each layer, all of one block or LLM layer, or all of one kind over the blocks."""
    names = all_names(checkpoint.dit_config, checkpoint.llm_config)
    if grouping == "layer":
        return names
    if grouping not in GROUPINGS:
        raise ExportError(f"--by must be one of {', '.join(GROUPINGS)}, got {grouping!r}: correct it.")
    found = []
    for name in names:
        parts = name.split(".")
        at = next(i for i, part in enumerate(parts) if part.isdigit())
        found.append(".".join([*parts[: at + 1], "*"] if grouping == "block" else _starred(parts, at)))
    return list(dict.fromkeys(found))


def measure_sensitivity(
    checkpoint: Checkpoint,
    calibration: Calibration,
    request: GenerationRequest,
    groups: Sequence[str],
    tick: Tick,
    linears: Linears = "fp8",
    weights_outside: bool = False,
) -> Sensitivity:
    """Runs the loop once per group with that group quantised and everything else in fp32. All networks are in memory.
    `tick` is called after each run; `weights_outside`: with the scales of graphs that take their weights as inputs.
    Raises ExportError, CheckpointError and RequestError."""
    calibration.require(checkpoint)
    network = _Network(checkpoint, lambda layer: _put_in(layer, calibration, linears, weights_outside))
    reference = network.run(request)
    bf16 = run_eager(checkpoint, "bf16", request)[-1]
    effects = []
    for glob in groups:
        with_glob = network.run(request, glob)
        effects.append(Effect(glob, **error_row(with_glob, reference)))
        tick()
    ranked = sorted(effects, key=lambda effect: effect.rms, reverse=True)
    return Sensitivity(tuple(ranked), error_row(bf16, reference)["rms"])


def _put_in(layer: Layer, calibration: Calibration, linears: Linears, weights_outside: bool) -> nn.Module:
    """What takes the place of a layer in the loop."""
    if weights_outside:
        return scaled(layer, calibration, torch.float32)
    return quantized(layer, calibration, torch.float32, linears)


class _Network:
    """The model in fp32, loaded once; a group of its layers is quantised for a run and put back."""

    def __init__(self, checkpoint: Checkpoint, quantise: Callable[[Layer], nn.Module]) -> None:
        self._checkpoint, self._quantise = checkpoint, quantise
        self._components = components(checkpoint, "fp32")
        self._modules: dict[str, nn.Module] = {}
        self._layers: list[Layer] = []

    def run(self, request: GenerationRequest, glob: str | None = None) -> Tensor:
        """The final latents."""
        group = [layer for layer in self._layers if glob is not None and fnmatchcase(layer.name, glob)]
        try:
            for layer in group:
                layer.put(self._quantise(layer))
            return run_loop(self._checkpoint, self._open, torch.float32, request)[-1]
        finally:
            for layer in group:
                layer.put(layer.module)

    def _open(self, name: str) -> EngineRunner:
        component = self._components[name]
        if name not in self._modules:
            self._modules[name] = component.load()
            self._layers += quantizable(component, self._modules[name])
        return EagerRunner(component.spec, self._modules[name])


def _starred(parts: Iterable[str], at: int) -> list[str]:
    return ["*" if i == at else part for i, part in enumerate(parts)]
