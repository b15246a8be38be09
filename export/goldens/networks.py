"""The networks that goldens are recomputed with: torch modules, or ONNX graphs in ONNX Runtime."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from stepvideo_serve.components import components, dit_graph_names
from stepvideo_serve.engine.eager import EagerRunner
from stepvideo_serve.engine.manifest import Manifest
from stepvideo_serve.engine.ort import OrtRunner
from stepvideo_serve.engine.runner import EngineRunner
from stepvideo_serve.weights.checkpoint import Checkpoint

BACKENDS = ("eager", "ort")


class Networks:
    """A checkpoint and its graphs by name, opened when first asked for."""

    def __init__(self, checkpoint: Checkpoint, backend: str, open_runner: Callable[[str], EngineRunner]) -> None:
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
    """The networks of the checkpoint in `folder`; for "ort" from the export in `onnx`, or from one made for the
    occasion. Raises SetupError."""
    checkpoint = Checkpoint(folder)
    with ExitStack() as stack:
        if backend == "eager":
            open_runner = _eager(checkpoint)
        elif onnx is not None:
            open_runner = _ort(onnx)
        else:
            from export.to_onnx import export_graphs  # needs the packages that only an export needs

            out = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="stepvideo-onnx-")))
            export_graphs(checkpoint, out)
            open_runner = _ort(out)
        networks = Networks(checkpoint, backend, open_runner)
        stack.callback(networks.close)
        yield networks


def _eager(checkpoint: Checkpoint) -> Callable[[str], EngineRunner]:
    def open_runner(name: str) -> EngineRunner:
        component = components(checkpoint, "fp32")[name]
        return EagerRunner(component.spec, component.load())

    return open_runner


def _ort(directory: Path) -> Callable[[str], EngineRunner]:
    manifest = Manifest.load(directory)
    manifest.require(precision="fp32")
    manifest.verify(directory)

    def open_runner(name: str) -> EngineRunner:
        entry = manifest.graph(name)
        return OrtRunner(entry.spec, directory / entry.file)

    return open_runner
