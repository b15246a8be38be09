"""What a generation yields, and how it is read from the server's responses."""

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import numpy as np
from numpy.typing import NDArray
from tritonclient.grpc import InferResult
from tritonclient.utils import InferenceServerException

from stepvideo_client.errors import MalformedResponse

T = TypeVar("T")

_PREVIEW_TYPES: Final[dict[str, Callable[[bytes], bool]]] = {
    "image/jpeg": lambda content: content.startswith(b"\xff\xd8"),
    "image/webp": lambda content: content[:4] == b"RIFF" and content[8:12] == b"WEBP",
}


@dataclass(frozen=True)
class StepEvent:
    """One denoising step is done. `elapsed_s` counts seconds from when the server accepted the request.

    `preview` is a picture of this step, where one was asked for and due, `preview_type` its media type. A server that
    wants to say only that it is alive repeats a step (step 0: none is done yet). While the request waits,
    `queue_position` is its place (1: next) and `start_in_s` the estimated seconds until it begins or goes on, where the
    server knows. `evaluations` counts those of the model so far, fewer than the steps where `quality` says so (None
    from a server that does not tell).
    """

    step: int
    total_steps: int
    elapsed_s: float
    preview: bytes | None = None
    queue_position: int | None = None
    start_in_s: float | None = None
    evaluations: int | None = None

    @property
    def preview_type(self) -> str | None:
        """image/webp, image/jpeg, or application/octet-stream for a picture of another kind; None without a preview."""
        if self.preview is None:
            return None
        kinds = (kind for kind, is_one in _PREVIEW_TYPES.items() if is_one(self.preview))
        return next(kinds, "application/octet-stream")


@dataclass(frozen=True, eq=False)
class Result:
    """The end of a generation; exactly one of `video`, `frames` and `latents` is set, as `output` was asked for.

    video: bytes of an H.264 mp4. frames: uint8 [F, H, W, 3], RGB. latents: float32 [latent frames, C, h, w].
    seed: gives the same video again. report: the server's seconds per stage and step, layout, precision, engines.
    """

    seed: int
    report: dict[str, Any]
    video: bytes | None = None
    frames: NDArray[np.uint8] | None = None
    latents: NDArray[np.float32] | None = None

    @property
    def data(self) -> bytes | NDArray[np.uint8] | NDArray[np.float32]:
        """Whichever of video, frames and latents is set."""
        for value in (self.video, self.frames, self.latents):
            if value is not None:
                return value
        raise MalformedResponse("A result must carry one of VIDEO, FRAMES and LATENTS, and carries none.")


def read_response(response: Any) -> StepEvent | Result | None:
    """The event in a ModelInferResponse, or None if it has no outputs (the empty final response).

    Raises MalformedResponse.
    """
    names = {output.name for output in response.outputs}
    if not names:
        return None
    outputs = InferResult(response)
    try:
        if "STEP" in names:
            return _step_event(outputs, names)
        if names & {"VIDEO", "FRAMES", "LATENTS"}:
            return _result(outputs, names)
    except (InferenceServerException, ValueError, TypeError, struct.error) as error:
        raise MalformedResponse(f"The outputs {', '.join(sorted(names))} cannot be read: {error}.") from error
    raise MalformedResponse(
        f"Expected STEP, or one of VIDEO, FRAMES and LATENTS, got {', '.join(sorted(names))}: "
        "is this server newer than the client?"
    )


def is_final(response: Any) -> bool:
    """Whether the server marked this ModelInferResponse as the last one of its request."""
    parameters = response.parameters
    return "triton_final_response" in parameters and bool(parameters["triton_final_response"].bool_param)


def _step_event(outputs: InferResult, names: set[str]) -> StepEvent:
    return StepEvent(
        step=_scalar(outputs, "STEP", int),
        total_steps=_scalar(outputs, "TOTAL_STEPS", int),
        elapsed_s=_scalar(outputs, "ELAPSED_S", float),
        preview=_scalar(outputs, "PREVIEW", bytes) if "PREVIEW" in names else None,
        queue_position=_scalar(outputs, "QUEUE_POSITION", int) if "QUEUE_POSITION" in names else None,
        start_in_s=_scalar(outputs, "START_IN_S", float) if "START_IN_S" in names else None,
        evaluations=_scalar(outputs, "EVALUATIONS", int) if "EVALUATIONS" in names else None,
    )


def read_cancelled(response: Any) -> bool:
    """CANCELLED of a ModelInferResponse. Raises MalformedResponse."""
    return _scalar(InferResult(response), "CANCELLED", bool)


def _result(outputs: InferResult, names: set[str]) -> Result:
    report = json.loads(_scalar(outputs, "REPORT", bytes))
    if not isinstance(report, dict):
        raise MalformedResponse(f"REPORT must be a JSON object, got {type(report).__name__}.")
    return Result(
        seed=_scalar(outputs, "SEED", int),
        report=report,
        video=_scalar(outputs, "VIDEO", bytes) if "VIDEO" in names else None,
        # Copies, because the arrays made from the message are read-only and keep all of it alive.
        frames=outputs.as_numpy("FRAMES").astype(np.uint8) if "FRAMES" in names else None,
        latents=outputs.as_numpy("LATENTS").astype(np.float32) if "LATENTS" in names else None,
    )


def _scalar(outputs: InferResult, name: str, kind: Callable[[Any], T]) -> T:
    array = outputs.as_numpy(name)
    if array is None or array.size != 1:
        raise MalformedResponse(f"{name} must have one element, got {'none' if array is None else array.size}.")
    return kind(array.reshape(-1)[0])
