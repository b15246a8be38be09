"""The models that hold one stage each. Only `ti2v` and `ti2v_unary` call them."""

from typing import Any

import numpy as np
import torch

from stepvideo_serve.assembly import FrameDecoder, ImageEncoder, build_text_encoder
from stepvideo_serve.config import ServeConfig
from stepvideo_serve.errors import InvalidRequest
from stepvideo_serve.serving.adapter import (
    Arrays,
    Sender,
    clear_setup_errors,
    end_process,
    error_response,
    read_inputs,
    response,
)


class StageModel:
    """A model that answers each request with one response."""

    def initialize(self, args: dict[str, str]) -> None:  # noqa: ARG002  # the signature is Triton's
        with clear_setup_errors():
            self.load(ServeConfig.from_environment())

    def execute(self, requests: list[Any]) -> list[Any]:
        return [self._respond(request) for request in requests]

    def finalize(self) -> None:
        end_process()

    def load(self, config: ServeConfig) -> None:
        raise TypeError(f"{type(self).__name__} must say what to load")

    def answer(self, inputs: Arrays) -> Arrays:
        raise TypeError(f"{type(self).__name__} must say how to answer")

    def _respond(self, request: Any) -> Any:
        try:
            return response(self.answer(read_inputs(request)))
        except Exception as error:  # every error becomes this request's response, never the end of the model
            return error_response(error)


class TextEncoderModel(StageModel):
    """PROMPT -> LLM_STATES, CLIP_STATES, CACHED."""

    def load(self, config: ServeConfig) -> None:
        self._encoder = build_text_encoder(config)

    def answer(self, inputs: Arrays) -> Arrays:
        states, cached = self._encoder.encode(_text(inputs["PROMPT"]))
        return {"LLM_STATES": states.llm.numpy(), "CLIP_STATES": states.clip.numpy(), "CACHED": np.array([cached])}


class VaeEncoderModel(StageModel):
    """PIXELS, NOISE -> LATENT."""

    def load(self, config: ServeConfig) -> None:
        self._encoder = ImageEncoder(config)

    def answer(self, inputs: Arrays) -> Arrays:
        pixels, noise = (torch.from_numpy(inputs[name]) for name in ("PIXELS", "NOISE"))
        return {"LATENT": self._encoder.encode(pixels, noise).numpy()}


class VaeDecoderModel:
    """LATENTS -> FRAMES, one response per chunk."""

    def initialize(self, args: dict[str, str]) -> None:  # noqa: ARG002  # the signature is Triton's
        with clear_setup_errors():
            self._decoder = FrameDecoder(ServeConfig.from_environment())

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            sender = Sender(request)
            try:
                latents = torch.from_numpy(read_inputs(request)["LATENTS"])
                for frames in self._decoder.decode(latents):
                    if sender.cancelled():
                        break
                    sender.send({"FRAMES": frames})
            except Exception as error:  # as in StageModel
                sender.fail(error)
            sender.close()

    def finalize(self) -> None:
        end_process()


def _text(array: Any) -> str:
    try:
        return str(array.flat[0].decode("utf-8"))
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"PROMPT must be UTF-8, got byte {error.start} that is not: encode the text again.") from None
