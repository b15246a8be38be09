"""What one step of the denoising loop does, as torch.profiler sees the step: a trace for chrome://tracing or Perfetto.

Each call of a graph is a range of the graph's name, so that a trace says something on backends too whose work torch
does not see. Where CUDA is, the ranges go to NVTX as well, for Nsight Systems.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from stepvideo_serve.dit.velocity import Graph
from stepvideo_serve.sampling.job import StepDone
from stepvideo_serve.scheduling.run_queue import Waiting

STEP_RANGE = "denoise step"


def ranged(name: str, graph: Graph) -> Graph:
    """The graph, each of whose calls is a range `name`."""

    def call(**inputs: Tensor) -> dict[str, Tensor]:
        with named_range(name):
            return graph(**inputs)

    return call


@contextmanager
def named_range(name: str) -> Iterator[None]:
    """A range of torch.profiler, and of NVTX where CUDA is."""
    with record_function(name):
        if not torch.cuda.is_available():
            yield
            return
        with torch.cuda.nvtx.range(name):
            yield


def profiled(
    steps: Iterator[StepDone | Waiting], trace: Path, written: Callable[[int], None]
) -> Iterator[StepDone | Waiting]:
    """The same steps. The first one that evaluates the DiT, behind step 1, runs under the profiler: its trace is
    written to the file `trace` (Chrome's JSON format), then `written` is called with the step's number.

    Step 1 pays for what happens once: memory, kernels that are chosen, caches. Raises OSError.
    """
    yield from _first(steps)
    while True:
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])
        with profile(activities=activities, record_shapes=True) as profiler, named_range(STEP_RANGE):
            done = next(steps, None)
        if done is None:
            return
        if isinstance(done, StepDone) and done.evaluated:
            trace.touch()  # the profiler only warns where it cannot write
            profiler.export_chrome_trace(str(trace))
            written(done.step)
            yield done
            break
        yield done
    yield from steps


def _first(steps: Iterator[StepDone | Waiting]) -> Iterator[StepDone | Waiting]:
    """All up to step 1, or to the end."""
    for done in steps:
        yield done
        if isinstance(done, StepDone):
            return
