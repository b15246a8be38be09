"""How large the message with a result is: known beforehand for arrays, and exactly once the result is there.

A caller whose transport has a limit (gRPC's default is 4 MiB) would lose the result after all the work. Sizes are those
of the gRPC message; an HTTP response with binary outputs is of about the same size.
"""

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from stepvideo_serve.errors import InvalidRequest
from stepvideo_serve.request.fields import OUTPUT_FRAMES, OUTPUT_LATENTS
from stepvideo_serve.request.parse import GenerationRequest

MESSAGE_BYTES: Final = 1024  # names, types and shapes of all outputs, model, request id of the protocol: about 300
ITEM_BYTES: Final = 4  # before each item of a BYTES tensor
LEAST_REPORT_BYTES: Final = 512
STEP_BYTES: Final = 5  # of REPORT for each step: "0.0, "
FRAME_BYTES: Final = 8  # of an mp4 for each frame, at the very least: a length and the shortest slice


def least_response_bytes(request: GenerationRequest, latent_channels: int, frame_size: tuple[int, int]) -> int:
    """What the result's message has at the least: for frames and latents all but the length of REPORT is exact, of an
    mp4 little is known before it is encoded. `frame_size`: height and width of the frames that are handed out."""
    around = MESSAGE_BYTES + LEAST_REPORT_BYTES + STEP_BYTES * request.steps
    if request.output == OUTPUT_LATENTS:
        frames, channels, height, width = request.geometry.latent_shape(latent_channels)
        return around + 4 * frames * channels * height * width
    if request.output == OUTPUT_FRAMES:
        return around + 3 * request.num_frames * frame_size[0] * frame_size[1]
    return around + FRAME_BYTES * request.num_frames


def response_bytes(outputs: Mapping[str, NDArray[Any]]) -> int:
    """What the message with these outputs has at the most."""
    return MESSAGE_BYTES + sum(map(_tensor_bytes, outputs.values()))


def check_fits(request: GenerationRequest, latent_channels: int, frame_size: tuple[int, int]) -> None:
    """InvalidRequest for a request whose result cannot fit into its MAX_RESPONSE_BYTES; see `least_response_bytes`."""
    most = request.max_response_bytes
    if most is None:
        return
    least = least_response_bytes(request, latent_channels, frame_size)
    if least > most:
        raise InvalidRequest(
            f"The result must fit into MAX_RESPONSE_BYTES = {most}, but takes at least {least} bytes: allow more, or "
            "ask for another OUTPUT, fewer frames or a smaller size."
        )


def too_large(most: int, size: int) -> InvalidRequest:
    """The error for a result that turned out larger than its caller allows."""
    return InvalidRequest(
        f"The result must fit into MAX_RESPONSE_BYTES = {most}, but takes {size} bytes: allow as many and send the "
        "request again, with the REQUEST_ID, if it had one, under which the result is kept."
    )


def _tensor_bytes(array: NDArray[Any]) -> int:
    if array.dtype == np.object_:
        return sum(ITEM_BYTES + len(value) for value in array.flat)
    return int(array.nbytes)
