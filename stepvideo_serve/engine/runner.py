"""The one call that the stages make to run a graph, whatever runs the graph; and the reference among the runners, which
runs a torch module as it is."""

import abc
from types import TracebackType
from typing import Self, final

import torch
from torch import nn

from stepvideo_serve.engine.spec import EngineSpec
from stepvideo_serve.errors import EngineError


class EngineRunner(abc.ABC):
    """Runs one graph: tensors by name in, tensors by name out.

    A runner checks the inputs against its spec before the backend sees them. The outputs are new tensors on
    `device` that the caller owns: no later call writes to them. A runner serves one thread at a time.
    Use it as a context manager, or call close().
    """

    def __init__(self, spec: EngineSpec, device: torch.device | str, engine_id: str) -> None:
        self._spec = spec
        self._device = _with_index(torch.device(device))
        self._engine_id = engine_id
        self._closed = False

    @property
    def spec(self) -> EngineSpec:
        return self._spec

    @property
    def device(self) -> torch.device:
        """Where the inputs must be and the outputs will be."""
        return self._device

    @property
    def engine_id(self) -> str:
        """The name of the graph in reports: backend and file, or the hash in the manifest."""
        return self._engine_id

    @final
    def __call__(self, /, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """The outputs by name, in the order of the spec.

        EngineError if the runner is closed, or the inputs or the backend's outputs do not fit the spec.
        """
        if self._closed:
            raise EngineError(f"Engine {self._spec.name} must be open to run, but it was closed: make a new runner.")
        dims = self._spec.check_inputs(inputs)
        for name, tensor in inputs.items():
            if tensor.device != self._device:
                raise EngineError(
                    f'Engine {self._spec.name}: input "{name}" must be on {self._device}, got {tensor.device}: move it.'
                )
        outputs = self._run({tensor.name: inputs[tensor.name] for tensor in self._spec.inputs}, dims)
        self._spec.check_outputs(outputs, dims)
        return {tensor.name: outputs[tensor.name] for tensor in self._spec.outputs}

    @final
    def from_cpu(self, /, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """Calls the runner with inputs that lie on the CPU; the outputs are on `device`."""
        return self(**{name: tensor.to(self._device) for name, tensor in inputs.items()})

    @final
    def close(self) -> None:
        """Frees what the backend holds; more calls of close() do nothing."""
        if not self._closed:
            self._closed = True
            self._release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @abc.abstractmethod
    def _run(self, inputs: dict[str, torch.Tensor], dims: dict[str, int]) -> dict[str, torch.Tensor]:
        """Runs the graph on checked inputs (in spec order, maybe not contiguous); returns new tensors."""

    @abc.abstractmethod
    def _release(self) -> None:
        """Frees what the backend holds; called once."""


def _with_index(device: torch.device) -> torch.device:
    """torch.device("cuda") as the current GPU, because tensors always name theirs."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


class EagerRunner(EngineRunner):
    """Calls `module` with the inputs positionally, in spec order; it returns a tensor or a tuple, as spec.outputs.

    The module is moved to `device` and put in eval mode.
    """

    def __init__(self, spec: EngineSpec, module: nn.Module, device: torch.device | str = "cpu") -> None:
        super().__init__(spec, device, engine_id=f"eager:{type(module).__name__}")
        self._module = module.to(self.device).eval()

    def _run(self, inputs: dict[str, torch.Tensor], dims: dict[str, int]) -> dict[str, torch.Tensor]:  # noqa: ARG002
        with torch.inference_mode():
            returned = self._module(*inputs.values())
        outputs = (returned,) if isinstance(returned, torch.Tensor) else tuple(returned)
        if len(outputs) != len(self.spec.outputs):
            raise EngineError(
                f"Engine {self.spec.name}: {type(self._module).__name__} must return {len(self.spec.outputs)} tensors, "
                f"got {len(outputs)}: make the module and the spec agree."
            )
        # Clones made outside inference mode can be written to, and share no memory with inputs, weights or each other.
        return {
            tensor.name: output.clone(memory_format=torch.contiguous_format)
            for tensor, output in zip(self.spec.outputs, outputs, strict=True)
        }

    def _release(self) -> None:
        del self._module
