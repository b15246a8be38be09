"""How long engines with their weights as inputs take, over those with the weights inside, on this machine's GPU.

One engine of each kind that both folders have, at the sizes that its profile is tuned for; of a layout with slices
those of the first rank. Step-LLM whole is another graph than its layers, and has no pair.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from export.compare.engines import Opener
from export.graphs.example_inputs import sample_inputs
from stepvideo_serve.assembly.checkpoint import Checkpoint
from stepvideo_serve.assembly.layer_weights import LayerWeights
from stepvideo_serve.engine.manifest import FILE_NAME, LAYERS, EngineTarget, Manifest
from stepvideo_serve.engine.runner import EngineRunner
from stepvideo_serve.errors import ExportError
from stepvideo_serve.parallel.layout import Layout
from stepvideo_serve.weights.cuts import TensorPart
from stepvideo_serve.weights.weight_set import WeightSet

CALLS = 10


@dataclass(frozen=True)
class BothWays:
    """Seconds of one call of an engine, with weights as inputs and inside."""

    name: str
    input_s: float
    constant_s: float

    def __str__(self) -> str:
        ratio = self.input_s / self.constant_s
        return (
            f"{self.name:<22} {1e3 * self.input_s:>10.2f} ms with weights as inputs, "
            f"{1e3 * self.constant_s:>10.2f} ms as constants, ratio {ratio:.3f}"
        )


def time_both_ways(
    directory: Path, constants: Path, model_dir: Path, weight_set: Path | None, opener: Opener
) -> list[BothWays]:
    """directory, constants  engines of one checkpoint and layout; quantised ones with their `weight_set`. Raises
    ExportError where they have no kind in common, EngineError when one does not run."""
    shared = Manifest.load(directory)
    found_set = None if weight_set is None else WeightSet.load(weight_set)
    tp = Layout.parse(EngineTarget.of(shared, directory).layout).tp
    weights = LayerWeights(Checkpoint(model_dir), TensorPart(0, tp), found_set)
    pairs = list(_pairs(shared, constants))
    if not pairs:
        raise ExportError(
            f"{constants} must hold engines with the weights of {directory} inside, it has none of its kinds: build "
            "them for the same layout with WEIGHTS=constant."
        )
    open_shared, rows = opener(directory, shared), []
    for name, folder in pairs:
        with open_shared(name, weights.of(name, shared.graph(name).spec)) as runner:
            input_s = _seconds(runner)
        with opener(folder, Manifest.load(folder))(name) as runner:
            rows.append(BothWays(name, input_s, _seconds(runner)))
    return rows


def _pairs(shared: Manifest, constants: Path) -> Iterator[tuple[str, Path]]:
    """The first layer of each kind that is an engine of its own in `constants` or, of a layout with slices, in the
    folder of its first rank; and that folder."""
    folders = [constants, *sorted(file.parent for file in constants.glob(f"tp0of*/{FILE_NAME}"))]
    found = {folder: Manifest.load(folder).graphs for folder in folders}
    for kind, entry in shared.graphs.items():
        layers = entry.extras.get(LAYERS) or [None]
        name = kind if layers[0] is None else f"{kind.partition('.')[0]}_{layers[0]:02d}"
        there = [folder for folder, graphs in found.items() if name in graphs and not graphs[name].spec.weights]
        if entry.spec.weights and there:
            yield name, there[0]


def _seconds(runner: EngineRunner) -> float:
    """The median over some calls, after one that warms up."""
    sizes = {symbol: dim.opt for symbol, dim in runner.spec.dims.items()}
    inputs = {name: value.to(runner.device) for name, value in sample_inputs(runner.spec, sizes).items()}
    seconds = []
    for _ in range(CALLS + 1):
        torch.cuda.synchronize(runner.device)
        began_s = time.perf_counter()
        runner(**inputs)
        torch.cuda.synchronize(runner.device)
        seconds.append(time.perf_counter() - began_s)
    return sorted(seconds[1:])[CALLS // 2]
