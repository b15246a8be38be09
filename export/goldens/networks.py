"""The networks that goldens are recomputed with: torch modules, or ONNX graphs in ONNX Runtime."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from export.compare.shared_graphs import with_step_llm
from stepvideo_serve.assembly.checkpoint import Checkpoint
from stepvideo_serve.assembly.graphs import components, dit_graph_names
from stepvideo_serve.assembly.layer_weights import LayerWeights
from stepvideo_serve.engine.manifest import Manifest
from stepvideo_serve.engine.ort import OrtRunner
from stepvideo_serve.engine.runner import EagerRunner, EngineRunner

BACKENDS = ("eager", "ort")

OpenRunner = Callable[[str], EngineRunner]


class Networks:
    """A checkpoint and its graphs by name, opened when first asked for."""

    def __init__(self, checkpoint: Checkpoint, backend: str, open_runner: OpenRunner) -> None:
        self.checkpoint = checkpoint
        self.backend = backend
        self._open_runner = open_runner
        self._runners: dict[str, EngineRunner] = {}

    @property
    def has_modules(self) -> bool:
        """Whether torch modules are under test, and so whatever is inside them can be looked at."""
        return self.backend == "eager"

    def graph(self, name: str) -> EngineRunner:
        if name not in self._runners:
            self._runners[name] = self._open_runner(name)
        return self._runners[name]

    def dit_graphs(self) -> dict[str, EngineRunner]:
        return {name: self.graph(name) for name in dit_graph_names(self.checkpoint.dit_config.num_layers)}

    def close(self) -> None:
        for runner in self._runners.values():
            runner.close()
        self._runners.clear()


@contextmanager
def open_networks(folder: Path, backend: str, onnx: Path | None) -> Iterator[Networks]:
    """The networks of the checkpoint in `folder`; for "ort" from the graphs in `onnx`, or from graphs exported when
    first asked for. Raises SetupError."""
    checkpoint = Checkpoint(folder)
    with ExitStack() as stack:
        if backend == "eager":
            open_runner = _eager(checkpoint)
        elif onnx is not None:
            open_runner = _exported(checkpoint, onnx)
        else:
            out = stack.enter_context(tempfile.TemporaryDirectory(prefix="stepvideo-onnx-"))
            open_runner = _exported_on_demand(checkpoint, Path(out))
        networks = Networks(checkpoint, backend, open_runner)
        stack.callback(networks.close)
        yield networks


def _eager(checkpoint: Checkpoint) -> OpenRunner:
    def open_runner(name: str) -> EngineRunner:
        component = components(checkpoint, "fp32")[name]
        return EagerRunner(component.spec, component.load())

    return open_runner


def _exported(checkpoint: Checkpoint, directory: Path) -> OpenRunner:
    """The weights of the checkpoint go into graphs that take them as inputs."""
    manifest, weights = Manifest.load(directory), LayerWeights(checkpoint)
    manifest.require(precision="fp32")
    manifest.verify(directory)
    return with_step_llm(checkpoint, manifest, "float32", lambda name: _open(manifest, directory, name, weights))


def _exported_on_demand(checkpoint: Checkpoint, out: Path) -> OpenRunner:
    from export.to_onnx import export_graphs  # needs packages that only an export needs

    def open_runner(name: str) -> EngineRunner:
        return _open(export_graphs(checkpoint, out, only=[name]), out, name, LayerWeights(checkpoint))

    return open_runner


def _open(manifest: Manifest, directory: Path, name: str, weights: LayerWeights) -> EngineRunner:
    entry = manifest.graph(name)
    given = weights.of(name, entry.spec)
    return OrtRunner(entry.spec, directory / entry.file, content=entry.read(directory), weights=given)
