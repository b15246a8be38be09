"""Jobs that know their own progress, so that they can go on from there after a failure.

A job is given to the ranks as parameters (JSON) and tensors (numpy), and reports by StepEvents (parallel/job.py).
"""

from typing import Any, Protocol

from numpy.typing import NDArray

from stepvideo_serve.parallel.job import ResultEvent, StepEvent
from stepvideo_serve.request import Setting

Arrays = dict[str, NDArray[Any]]


class Resumable(Protocol):
    """A job and its progress."""

    @property
    def kind(self) -> str:
        """What the ranks are to do: "denoise", "decode" or "text"."""
        ...

    @property
    def tensors(self) -> Arrays:
        """The tensors to go on with."""
        ...

    @property
    def steps_left(self) -> int:
        """Denoising steps that are still to be computed."""
        ...

    def begin(self) -> tuple[dict[str, Any], Arrays]:
        """Parameters and tensors of a job for the ranks that goes on from here."""
        ...

    def take(self, event: StepEvent) -> bool:
        """Takes the event into the progress. True where the job's consumer has not seen the event yet."""
        ...

    def result(self) -> ResultEvent | None:
        """The result, where nothing is left to be computed; else None."""
        ...


class ResumableDenoise:
    """A denoising job that goes on after the last step whose latents were reported.

    params: JSON, whatever the ranks need. tensors["latents"] is fp32 [F, C, h, w]. steps: of the whole job.
    evaluations, guided_evaluations: steps so far that evaluated the DiT, and those of them with guidance. A loop that
    tells neither has evaluated, and guided, every step.
    A loop that forecasts steps reports its state too: params["state"], whose "tensors" names those that belong to it.
    """

    kind = "denoise"

    def __init__(self, params: dict[str, Any], tensors: Arrays, steps: int) -> None:
        self._params, self.tensors, self.steps = params, tensors, steps
        self._step = self.evaluations = self.guided_evaluations = 0
        self._state: dict[str, Any] | None = None
        self._state_tensors: Arrays = {}

    @property
    def steps_left(self) -> int:
        return self.steps - self._step

    @property
    def settings(self) -> dict[str, Setting]:
        """The request's values that the ranks get."""
        settings: dict[str, Setting] = self._params["settings"]
        return settings

    def begin(self) -> tuple[dict[str, Any], Arrays]:
        state = {} if self._state is None else {"state": self._state}
        return {**self._params, **state, "start_step": self._step}, {**self.tensors, **self._state_tensors}

    def take(self, event: StepEvent) -> bool:
        self._step = event.params["step"]
        if event.params.get("evaluated", True):
            self.evaluations += 1
            self.guided_evaluations += event.params.get("guided", True)
        self.tensors = {**self.tensors, "latents": event.tensors["latents"]}
        self._state = event.params.get("state")
        if self._state is not None:  # tensors that did not change are not reported again
            known = {**self._state_tensors, **event.tensors}
            self._state_tensors = {name: known[name] for name in self._state["tensors"]}
        return True

    def result(self) -> ResultEvent | None:
        return None if self.steps_left > 0 else ResultEvent({}, {"latents": self.tensors["latents"]})


class Repeated:
    """A job that begins anew after a failure, and drops the reports that its consumer has already: decoding, text."""

    steps_left = 0

    def __init__(self, kind: str, tensors: Arrays) -> None:
        self.kind, self.tensors = kind, tensors
        self._seen = self._at = 0

    def begin(self) -> tuple[dict[str, Any], Arrays]:
        self._at = 0
        return {"kind": self.kind}, self.tensors

    def take(self, event: StepEvent) -> bool:  # noqa: ARG002  # chunks come in order
        self._at += 1
        news = self._at > self._seen
        self._seen = max(self._seen, self._at)
        return news

    def result(self) -> ResultEvent | None:
        return None
