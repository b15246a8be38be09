"""Builds ONNX graphs with plugins by TensorRT-RTX, in a process of its own: the builder can crash, and its parser finds
its library by LD_LIBRARY_PATH.

    python -m tests.kernels.plugin_builds JOBS.json RESULTS.json
"""

import json
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from export.engines.toolkit import child_environment

BACKEND = "tensorrt_rtx"


@dataclass(frozen=True)
class Job:
    """One engine: the graph, the architecture, and input -> smallest, optimal and largest shape."""

    onnx: str
    sm: int
    profile: dict[str, list[list[int]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """engine: its bytes in hexadecimal, empty where there is none. layers: (type, name) of the parsed network.

    outputs   (type, shape) of the parsed network
    refusals  sentences of the plugins
    plan      what the builder printed about the finished engine
    """

    engine: str
    layers: list[list[str]]
    outputs: list[list[Any]]
    refusals: list[str]
    plan: str

    @property
    def plugin_layers(self) -> list[str]:
        return [name for kind, name in self.layers if kind == "PLUGIN_V3"]


def build(jobs: list[Job], root: Path, folder: Path) -> list[Result]:
    """One result for each job; fails with the child's output when it dies."""
    source, target = folder / "jobs.json", folder / "results.json"
    source.write_text(json.dumps([asdict(job) for job in jobs]), encoding="utf-8")
    environment = child_environment(BACKEND, folder / "library") | {"PYTHONPATH": f"{root / 'kernels'}:{root}"}
    command = [sys.executable, "-m", "tests.kernels.plugin_builds", str(source), str(target)]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return [Result(**one) for one in json.loads(target.read_text(encoding="utf-8"))]


def main() -> None:
    jobs = [Job(**one) for one in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))]
    import tensorrt_rtx

    logger = _logger(tensorrt_rtx)
    results = [asdict(_build(tensorrt_rtx, job, logger)) for job in jobs]
    Path(sys.argv[2]).write_text(json.dumps(results), encoding="utf-8")


def _build(trt: Any, job: Job, logger: Any) -> Result:
    from stepvideo_kernels.plugins.registration import register

    registration = register(trt, sm=job.sm)
    registration.refusals.clear()
    logger.lines.clear()
    builder = trt.Builder(logger)
    network, config = builder.create_network(0), builder.create_builder_config()
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(job.onnx):
        return Result("", [], [], list(registration.refusals), "")
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    outputs = [network.get_output(index) for index in range(network.num_outputs)]
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{job.sm}"), 0)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    profile = builder.create_optimization_profile()
    for name, ends in job.profile.items():
        profile.set_shape(name, *ends)
    config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    return Result(
        engine=bytes(engine).hex() if engine is not None else "",
        layers=[[layer.type.name, layer.name] for layer in layers],
        outputs=[[output.dtype.name, list(output.shape)] for output in outputs],
        refusals=list(registration.refusals),
        plan="\n".join(logger.lines),
    )


def _logger(trt: Any) -> Any:
    class Lines(trt.ILogger):  # type: ignore[misc]
        """Keeps every message."""

        def __init__(self) -> None:
            super().__init__()
            self.lines: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            del severity
            self.lines.append(message)

    return Lines()


if __name__ == "__main__":
    main()
