"""Runs requests through the model in torch and records how large the inputs of its layers get."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from export.compare.graph_stages import GraphStages, Open, encode_prompts, prompts_of
from export.quantize.calibration import PARTS, Calibration, write_json
from export.quantize.observers import AmaxObserver
from stepvideo_serve.assembly.checkpoint import Checkpoint
from stepvideo_serve.assembly.graphs import Component, components
from stepvideo_serve.config import VideoConfig
from stepvideo_serve.engine.manifest import content_key
from stepvideo_serve.engine.runner import EagerRunner, EngineRunner
from stepvideo_serve.engine.spec import TORCH_DTYPES
from stepvideo_serve.errors import ExportError
from stepvideo_serve.fused.layers import OPERANDS, quantizable
from stepvideo_serve.pipeline.generate import Progress, generate
from stepvideo_serve.request import GenerationRequest

TEXTS = "texts"
"""Stands for all prompts together among the requests that are done."""

Tick = Callable[[], None]


@dataclass
class Observers:
    """An observer per tensor, and the names of the requests that they have seen; kept in a file from run to run."""

    path: Path
    key: str
    percentile: float
    done: list[str] = field(default_factory=list)
    by_name: dict[str, AmaxObserver] = field(default_factory=dict)

    @classmethod
    def resume(cls, path: Path, key: str, percentile: float) -> "Observers":
        """What an interrupted run left at `path` if it had the same key, else nothing. Raises ExportError."""
        fresh = cls(path, key, percentile)
        if not path.is_file():
            return fresh
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
            if state["key"] != key:
                return fresh
            fresh.by_name = {n: AmaxObserver.restore(s, percentile) for n, s in state["observers"].items()}
            fresh.done = list(state["done"])
        except (ValueError, KeyError, TypeError) as error:
            raise ExportError(f"{path} must be the rest of an interrupted run, found {error!r}: delete it.") from error
        return fresh

    def save(self, finished: str) -> None:
        """Records a request as done."""
        self.done.append(finished)
        observers = {name: observer.to_json() for name, observer in self.by_name.items()}
        write_json(self.path, {"key": self.key, "done": self.done, "observers": observers})

    def watch(self, component: Component, module: nn.Module) -> None:
        """Observes the inputs of the layers of a graph's module, for as long as it lives."""
        for layer in quantizable(component, module):
            layer.module.register_forward_pre_hook(self._hook(layer.name, isinstance(layer.module, nn.Linear)))

    def _hook(self, name: str, linear: bool) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        names = [name] if linear else [f"{name}.{operand}" for operand in OPERANDS]
        observers = [self.by_name.setdefault(name, AmaxObserver(self.percentile)) for name in names]

        def see(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            del module
            for observer, values in zip(observers, inputs, strict=True):
                observer.observe(values)

        return see


def measure(
    checkpoint: Checkpoint,
    requests: Mapping[str, GenerationRequest],
    partial: Path,
    settings: Mapping[str, Any],
    tick: Tick,
) -> Calibration:
    """Runs all requests, both guidance branches and every step of each; `tick` is called after each step.

    settings: "precision" ("fp32" or "bf16"), "device", "percentile", and whatever else identifies the requests.
    Progress is kept in `partial` after each request; a later call with equal settings goes on from there, and the file
    is gone at the end. Raises ExportError, CheckpointError and RequestError.
    """
    identity = {part: checkpoint.digest(part) for part in PARTS}
    key = content_key(checkpoint=identity, settings=dict(settings))
    observers = Observers.resume(partial, key, float(settings["percentile"]))
    table = components(checkpoint, settings["precision"])
    dtype = TORCH_DTYPES[table["dit_final"].spec.outputs[0].dtype]

    def opener(observed: bool) -> Open:
        def open_graph(name: str) -> EngineRunner:
            module = table[name].load()
            if observed:
                observers.watch(table[name], module)
            return EagerRunner(table[name].spec, module, settings["device"])

        return open_graph

    left = [name for name in requests if name not in observers.done]
    texts = encode_prompts(checkpoint, opener(TEXTS not in observers.done), prompts_of(requests.values()))
    if TEXTS not in observers.done:
        observers.save(TEXTS)
    stages = GraphStages(checkpoint, opener(True), texts, dtype)
    try:
        for name in left:
            for event in generate(requests[name], stages, VideoConfig(), _never):
                if isinstance(event, Progress):
                    tick()
            observers.save(name)
    finally:
        stages.close()
    amax = {name: observer.amax for name, observer in observers.by_name.items()}
    partial.unlink(missing_ok=True)
    return Calibration(identity, dict(settings), amax)


def _never() -> bool:
    return False
