"""Before a rank says that it is ready, each of its graphs runs once, at its smallest size; on a GPU also one graph of
each kind at the largest size that requests may ask for, which shows that the memory is there.

What is wrong with an engine, with its plugins or with the GPU then ends the start with a sentence, and not the first
request. What the graphs give is not compared (make verify does that); it must be finite.
"""

import logging
import re
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from stepvideo_serve.engine.runner import EngineRunner
from stepvideo_serve.engine.spec import EngineSpec
from stepvideo_serve.errors import EngineError, SetupError

SEED = 0
LimitsOf = Callable[[str], Mapping[str, int]]
"""Name of a graph -> the largest size of symbols of its spec that requests may ask for."""

_logger = logging.getLogger(__name__)


def warm_up(runners: Mapping[str, EngineRunner], rank: int, limits_of: LimitsOf | None = None) -> None:
    """Runs every graph at its smallest size, and with `limits_of` one of each kind at the largest.

    Raises SetupError, which names rank, graph and sizes, for what the graph itself says, for values that are not finite
    and for memory that does not suffice; RuntimeError with such a sentence for what may be a passing fault of a GPU.
    """
    began_s = time.monotonic()
    for name, runner in runners.items():
        outputs = _run(runner, rank, {symbol: dim.min for symbol, dim in runner.spec.dims.items()})
        if wrong := [output for output, tensor in outputs.items() if not bool(tensor.float().isfinite().all())]:
            raise SetupError(
                f"Rank {rank}: {name} must give finite values before the server is ready, {', '.join(wrong)} has not: "
                "check the weights, and the engine with `make verify GPU=1`."
            )
    kinds = {kind_of(name): name for name, runner in runners.items() if limits_of is not None and runner.spec.dims}
    for name in kinds.values():
        spec = runners[name].spec
        _run(runners[name], rank, sizes_within(spec, {} if limits_of is None else limits_of(name)))
    if kinds:
        torch.cuda.empty_cache()  # what these took is there for what does not allocate by torch, too
    took_s = time.monotonic() - began_s
    _logger.info("%d graphs ran once, %d of them at their largest, in %.1f s", len(runners), len(kinds), took_s)


def kind_of(name: str) -> str:
    """The name without the number of a layer: dit_block_07 -> dit_block."""
    return re.sub(r"_\d+$", "", name)


def sizes_within(spec: EngineSpec, limits: Mapping[str, int]) -> dict[str, int]:
    """The largest size of each symbol that is within the limits, if they name it."""
    return {symbol: max(dim.min, min(dim.max, limits.get(symbol, dim.max))) for symbol, dim in spec.dims.items()}


def _run(runner: EngineRunner, rank: int, sizes: Mapping[str, int]) -> dict[str, Tensor]:
    where = f"Rank {rank}: {runner.spec.name} must run with {_words(sizes)} before the server is ready"
    try:
        outputs = runner(**_inputs(runner, sizes))
        if runner.device.type == "cuda":
            torch.cuda.synchronize(runner.device)  # kernels fail after their launch
    except EngineError as error:
        raise SetupError(f"{where}, and cannot: {error}") from error
    except torch.OutOfMemoryError as error:
        raise SetupError(
            f"{where}, and the GPU's memory does not suffice: lower [limits], choose a layout with more ranks, or end "
            "what else uses the GPU (nvidia-smi)."
        ) from error
    except RuntimeError as error:
        raise RuntimeError(f"{where}, and {type(error).__name__} came: {' '.join(str(error).split())}") from error
    return outputs


def _inputs(runner: EngineRunner, sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """Standard normal values; ones for token ids and masks."""
    generator = torch.Generator(runner.device).manual_seed(SEED)
    inputs = {}
    for tensor in runner.spec.inputs:
        shape, dtype = tensor.resolve(sizes), tensor.torch_dtype
        if dtype.is_floating_point:
            normal = dtype if dtype.itemsize > 1 else torch.float32
            drawn = torch.randn(shape, generator=generator, dtype=normal, device=runner.device)
            inputs[tensor.name] = drawn.to(dtype)
        else:
            inputs[tensor.name] = torch.ones(shape, dtype=dtype, device=runner.device)
    return inputs


def _words(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{symbol} = {size}" for symbol, size in sizes.items()) or "its one size"
