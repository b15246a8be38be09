"""The requests that clients send, as ModelInferRequests. All raise InvalidInput for what cannot be sent."""

import os
from typing import Any

from stepvideo_client.connection import STREAM_MODEL, UNARY_MODEL
from stepvideo_client.fields import Options, QuoteOptions
from stepvideo_client.options import inference_request, request_of
from stepvideo_client.quote import QUOTE_MODEL

CANCEL_MODEL = "ti2v_cancel"


def stream_request(image: bytes | str | os.PathLike[str], prompt: str, options: Options) -> Any:
    """A generation with progress; an empty response ends it."""
    request = inference_request(STREAM_MODEL, image, prompt, options)
    request.parameters["triton_enable_empty_final_response"].bool_param = True
    return request


def quote_request(options: QuoteOptions) -> Any:
    """What would a generation take?"""
    return request_of(QUOTE_MODEL, options, tuple(QuoteOptions.__annotations__))


def cancel_request(request_id: str) -> Any:
    """The run of that id is to end."""
    return request_of(CANCEL_MODEL, {"request_id": request_id}, ("request_id",))


def probe_request() -> Any:
    """How is the server, and what are its defaults?"""
    request = request_of(UNARY_MODEL, {"prompt": "", "image": b""}, ())
    request.parameters["probe"].bool_param = True
    return request
