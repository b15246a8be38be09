"""Runners beside each other, by Polygraphy's Comparator, judged by this project's rule: in low precision twice what
torch loses in it.

The Comparator opens one runner at a time, gives all the same inputs and compares pairs; its JSON is read by its own
tools (`polygraphy inspect data`, `polygraphy check accuracy`, `polygraphy run --load-outputs`). It passes arrays of
numpy, which has no bf16 and no FP8: inputs go by their number, each runner has them in its own types, and outputs are
fp32.

An export compares its graphs without the Comparator (one_graph.py), and so does the loop (denoising.py): both keep rows
of figures alone, and subtracting the outputs of three runs is less code than wrapping the runs for Polygraphy.
"""

import gc
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata
from polygraphy.comparator import Comparator, SimpleCompareFunc
from polygraphy.logger import G_LOGGER
from torch import Tensor

from stepvideo_serve.engine.runner import EngineRunner

REFERENCE, MEASURE = "reference", "measure"
NUMBER = "number of the inputs"
Arrays = Mapping[str, np.ndarray[Any, Any]]


@dataclass(frozen=True)
class Contestant:
    """A runner that is opened when its turn comes, closed after it, and runs `within` a context. inputs: one set after
    the other, by name, in the types of this runner."""

    name: str
    open: Callable[[], EngineRunner]
    inputs: Sequence[Mapping[str, Tensor]]
    within: Callable[[], AbstractContextManager[Any]] = nullcontext


def compare_runners(contestants: Sequence[Contestant], least: float, save: Path | None = None) -> Any:
    """Polygraphy's RunResults: name -> its outputs for each set of inputs. The first contestant is the REFERENCE, the
    second the MEASURE, all others are judged.

    least  the least loss of the measure that counts, relative to the largest magnitude of the reference
    save   writes `save`.outputs.json, all outputs, and `save`.accuracy.json, all against the reference with tolerances
    Raises EngineError from a runner.
    """
    count = len(contestants[0].inputs)
    feeds = [{NUMBER: np.array([number])} for number in range(count)]
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL), np.errstate(all="ignore"):  # of infinities, which fail
        found = Comparator.run([_Opened(one) for one in contestants], data_loader=feeds)
        if save is not None:
            pairs = [(0, index) for index in range(1, len(contestants))]
            accuracy = Comparator.compare_accuracy(found, comparisons=pairs, compare_func=TwiceTheLoss(least))
            found.save(f"{save}.outputs.json")
            accuracy.save(f"{save}.accuracy.json")
    return found


class TwiceTheLoss:
    """The rule as a comparison function of Polygraphy's: its own, of the largest difference, with tolerances from what
    the measure lost on the same inputs just before."""

    def __init__(self, least: float) -> None:
        self._least = least
        self._allowed: dict[str, float] = {}

    def __call__(self, reference: Any, found: Any) -> Any:
        """Both are IterationResults; raises KeyError where the measure is not compared first."""
        scales = {name: max(float(np.abs(values).max()), 1e-30) for name, values in reference.items()}
        if found.runner_name == MEASURE:
            self._allowed = {
                name: 2 * max(float(np.abs(found[name] - reference[name]).max()) / scale, self._least)
                for name, scale in scales.items()
            }
        tolerances = {name: self._allowed[name] * scale for name, scale in scales.items()}
        return SimpleCompareFunc(check_error_stat="max", atol=tolerances, rtol=0.0)(reference, found)


class _Opened(BaseRunner):  # type: ignore[misc]
    """A contestant as a runner of Polygraphy's."""

    def __init__(self, contestant: Contestant) -> None:
        super().__init__(name=contestant.name)
        self._contestant = contestant

    def activate_impl(self) -> None:
        self._runner = self._contestant.open()

    def get_input_metadata_impl(self) -> Any:
        return TensorMetadata().add(NUMBER, np.int64, (1,))

    def infer_impl(self, feed_dict: Arrays) -> Arrays:
        runner, began_s = self._runner, time.monotonic()
        values = self._contestant.inputs[int(feed_dict[NUMBER][0])]
        with self._contestant.within():
            outputs = runner(**{name: tensor.to(runner.device) for name, tensor in values.items()})
        arrays = OrderedDict((name, tensor.float().cpu().numpy()) for name, tensor in outputs.items())
        self.inference_time = time.monotonic() - began_s
        return arrays

    def deactivate_impl(self) -> None:
        self._runner.close()
        del self._runner
        gc.collect()
