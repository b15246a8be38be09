"""The request that carries the options of a generation (fields.py).

What is not given (or None) is not sent: the server's defaults apply, and the server checks ranges.
"""

import operator
import os
import struct
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tritonclient.grpc import service_pb2

from stepvideo_client.errors import InvalidInput
from stepvideo_client.fields import INPUTS, Options

MAX_IMAGE_BYTES = 1 << 30  # a gRPC message cannot exceed 2 GiB


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
        field = INPUTS[option]
        shape, content = _tensor(option, value, field.datatype, field.dimensions)
        request.inputs.add(name=field.name, datatype=field.datatype, shape=shape)
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
