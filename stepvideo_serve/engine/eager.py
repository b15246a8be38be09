"""Runs a torch module as it is: the reference that the other runners are compared with."""

import torch
from torch import nn

from stepvideo_serve.engine.runner import EngineRunner
from stepvideo_serve.engine.spec import EngineSpec
from stepvideo_serve.errors import EngineError


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
