"""The options of a generation, and the request that carries them.

What is not given (or None) is not sent: the server's defaults apply, and the server checks ranges.
"""

import operator
import os
import struct
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray
from tritonclient.grpc import service_pb2

from stepvideo_client.errors import InvalidInput

MAX_IMAGE_BYTES = 1 << 30  # a gRPC message cannot exceed 2 GiB


class Options(TypedDict, total=False):
    """Keyword arguments of Client.generate; the defaults named here are the server's.

    negative_prompt, positive_suffix: replace the official texts. num_frames (102), height (544), width (992):
    multiples of 17, 16, 16. steps (50), cfg_scale (9.0), time_shift (7.0), motion_score (5.0): sampling.
    seed (random): int64, returned in the result. latents: float32 [latent frames, C, h, w] and encode_noise:
    float32 [1, C, h, w] replace what the seed would give. output ("mp4"): or "frames", or "latents".
    preview_every (0): a JPEG with every n-th step. timeout_s (none): the server gives up after it.
    priority: REQUEST_PRIORITY of the server. request_id: a name of the caller's choosing; sent again with the same
    inputs, it gets the run or the result of the first time.
    """

    negative_prompt: str | None
    positive_suffix: str | None
    num_frames: int | None
    height: int | None
    width: int | None
    steps: int | None
    cfg_scale: float | None
    time_shift: float | None
    motion_score: float | None
    seed: int | None
    latents: NDArray[np.float32] | None
    encode_noise: NDArray[np.float32] | None
    output: str | None
    preview_every: int | None
    timeout_s: float | None
    priority: int | None
    request_id: str | None


# Option -> input of the server, its datatype, and its number of dimensions.
_INPUTS: dict[str, tuple[str, str, int]] = {
    "prompt": ("PROMPT", "BYTES", 1),
    "image": ("IMAGE", "BYTES", 1),
    "negative_prompt": ("NEGATIVE_PROMPT", "BYTES", 1),
    "positive_suffix": ("POSITIVE_SUFFIX", "BYTES", 1),
    "num_frames": ("NUM_FRAMES", "INT32", 1),
    "height": ("HEIGHT", "INT32", 1),
    "width": ("WIDTH", "INT32", 1),
    "steps": ("STEPS", "INT32", 1),
    "cfg_scale": ("CFG_SCALE", "FP32", 1),
    "time_shift": ("TIME_SHIFT", "FP32", 1),
    "motion_score": ("MOTION_SCORE", "FP32", 1),
    "seed": ("SEED", "INT64", 1),
    "latents": ("LATENTS", "FP32", 4),
    "encode_noise": ("ENCODE_NOISE", "FP32", 4),
    "output": ("OUTPUT", "BYTES", 1),
    "preview_every": ("PREVIEW_EVERY", "INT32", 1),
    "timeout_s": ("TIMEOUT_S", "FP32", 1),
    "priority": ("REQUEST_PRIORITY", "INT32", 1),
    "request_id": ("REQUEST_ID", "BYTES", 1),
    "prompt_tokens": ("PROMPT_TOKENS", "INT32", 1),
    "negative_tokens": ("NEGATIVE_TOKENS", "INT32", 1),
}
_INTEGERS: dict[str, type[np.signedinteger[Any]]] = {"INT32": np.int32, "INT64": np.int64}


def inference_request(model: str, image: bytes | str | os.PathLike[str], prompt: str, options: Options) -> Any:
    """The ModelInferRequest of a generation. Raises InvalidInput for what cannot be sent."""
    return request_of(model, {**options, "prompt": prompt, "image": image_bytes(image)}, tuple(Options.__annotations__))


def request_of(model: str, values: Mapping[str, Any], allowed: Collection[str]) -> Any:
    """A ModelInferRequest with these values but None; `allowed`: the options that there are, besides prompt and image.
    Raises InvalidInput."""
    request = service_pb2.ModelInferRequest(model_name=model)
    for option, value in values.items():
        if option not in (*allowed, "prompt", "image"):
            raise InvalidInput(f"There is no option {option!r}; the options are {', '.join(allowed)}.")
        if value is None:
            continue
        name, datatype, dimensions = _INPUTS[option]
        shape, content = _tensor(option, value, datatype, dimensions)
        request.inputs.add(name=name, datatype=datatype, shape=shape)
        request.raw_input_contents.append(content)
    return request


def image_bytes(image: bytes | str | os.PathLike[str]) -> bytes:
    """The bytes of an image file, or `image` itself when it is the bytes. Raises InvalidInput."""
    if isinstance(image, bytes):
        content = image
    elif isinstance(image, str | os.PathLike):
        path = Path(image)
        try:
            too_large = path.stat().st_size > MAX_IMAGE_BYTES
            content = b"" if too_large else path.read_bytes()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InvalidInput(f"The image {str(path)!r} cannot be read: {reason}.") from error
        if too_large:
            raise InvalidInput(f"The image must have at most {MAX_IMAGE_BYTES} bytes; {str(path)!r} has more.")
    else:
        raise InvalidInput(f"The image must be bytes or the path of a file, got {type(image).__name__}.")
    if not 0 < len(content) <= MAX_IMAGE_BYTES:
        raise InvalidInput(f"The image must have 1 to {MAX_IMAGE_BYTES} bytes, got {len(content)}.")
    return content


def _tensor(option: str, value: Any, datatype: str, dimensions: int) -> tuple[list[int], bytes]:
    """Shape and little-endian content of one input."""
    if datatype == "BYTES":
        return [1], _bytes_element(option, value)
    if dimensions == 1:
        return [1], _number(option, value, datatype).tobytes()
    if not isinstance(value, np.ndarray) or value.dtype != np.float32 or value.ndim != dimensions:
        got = f"{value.dtype} with {value.ndim}" if isinstance(value, np.ndarray) else type(value).__name__
        raise InvalidInput(f"{option} must be a float32 numpy array with {dimensions} dimensions, got {got}.")
    return list(value.shape), value.tobytes()


def _bytes_element(option: str, value: Any) -> bytes:
    """One element of a BYTES tensor: its length as uint32, then the bytes; text goes as UTF-8."""
    if not isinstance(value, str | bytes):
        raise InvalidInput(f"{option} must be text, got {type(value).__name__}.")
    try:
        content = value.encode() if isinstance(value, str) else value
    except UnicodeEncodeError as error:
        raise InvalidInput(f"{option} must be valid Unicode text, and has a lone surrogate in it.") from error
    return struct.pack("<I", len(content)) + content


def _number(option: str, value: Any, datatype: str) -> np.generic:
    if datatype == "FP32":
        if not isinstance(value, int | float | np.integer | np.floating):
            raise InvalidInput(f"{option} must be a number, got {type(value).__name__}.")
        with np.errstate(over="ignore"):  # becomes infinite, which the server refuses with its range
            return np.float32(value)
    kind = _INTEGERS[datatype]
    try:
        integer = operator.index(value)
    except TypeError as error:
        raise InvalidInput(f"{option} must be a whole number, got {value!r}.") from error
    limits = np.iinfo(kind)
    if not limits.min <= integer <= limits.max:
        raise InvalidInput(f"{option} must lie between {limits.min} and {limits.max}, got {integer}.")
    return kind(integer)
