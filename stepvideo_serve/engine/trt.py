"""Engines of TensorRT, for data-centre GPUs."""

from pathlib import Path
from typing import Any

from stepvideo_serve.engine._nvinfer import ActivationMemory, NvInferRunner
from stepvideo_serve.engine.manifest import GraphFile
from stepvideo_serve.engine.spec import EngineSpec
from stepvideo_serve.errors import EngineError


class TensorRtRunner(NvInferRunner):
    """See NvInferRunner."""

    def __init__(
        self,
        spec: EngineSpec,
        directory: Path,
        file: GraphFile,
        memory: ActivationMemory,
        engine_id: str,
        weight_bytes: int | None = None,
        capture: bool = False,
    ) -> None:
        super().__init__(load(), spec, directory, file, memory, engine_id, weight_bytes, capture)


def load() -> Any:
    """The module. Raises EngineError, with the command that installs it, where it is missing."""
    try:
        import tensorrt
    except ImportError as error:
        raise EngineError(
            f"The backend tensorrt needs the package tensorrt-cu13, found none ({error}): pip install tensorrt-cu13, "
            "in the version that built the engines."
        ) from error
    return tensorrt
