"""The toy graph as an engine on the GPU of this machine."""

from pathlib import Path

import torch

from export.engines.child import Job
from export.engines.process import run_child
from export.engines.toolkit import child_environment
from stepvideo_serve.engine.manifest import GraphFile
from stepvideo_serve.engine.nvinfer import ActivationMemory, NvInferRunner, load_tensorrt
from tests.engine.toy import Graph


def open_engine(toy: Graph, backend: str) -> NvInferRunner:
    """Builds the engine anew."""
    folder = toy.onnx_path.parent / backend
    folder.mkdir(exist_ok=True)
    device = torch.device("cuda", torch.cuda.current_device())
    build_toy(toy, backend, folder, sm=_sm(device))
    file = GraphFile.of(folder, "toy.engine")
    trt, memory = load_tensorrt(backend), ActivationMemory(device)
    return NvInferRunner(trt, toy.spec, folder, file, memory, engine_id=f"toy:{backend}")


def build_toy(toy: Graph, backend: str, folder: Path, sm: int) -> None:
    job = Job(
        backend,
        sm,
        str(toy.onnx_path),
        str(folder / "toy.engine"),
        str(folder / "log"),
        str(folder / "result"),
        {name: shapes for name, shapes in toy.spec.profile().items() if name != "gain"},
    )
    run_child(job, folder, child_environment(backend, folder / "lib"), lambda _: None)


def _sm(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
