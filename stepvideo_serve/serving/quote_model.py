"""The model `ti2v_quote`: what a request would take on this server, from what it has measured."""

import json
from functools import cached_property
from typing import Any

import numpy as np

from stepvideo_serve.assembly import latent_channels
from stepvideo_serve.config import ServeConfig
from stepvideo_serve.errors import ServiceUnavailable
from stepvideo_serve.serving.adapter import Arrays, bytes_array
from stepvideo_serve.serving.model_run import ANSWER_S, call, in_time
from stepvideo_serve.serving.quote import QuoteRequest, Server, quote
from stepvideo_serve.serving.stages import StageModel


class QuoteModel(StageModel):
    """Sizes and steps -> SECONDS, GPU_SECONDS, PEAK_MEMORY_MIB, QUEUE_WAIT_S and the parts in REPORT."""

    def load(self, config: ServeConfig) -> None:
        self._config = config
        self._latent_channels = latent_channels(config)

    def answer(self, inputs: Arrays) -> Arrays:
        asked = QuoteRequest.parse(inputs, self._config, self._latent_channels)
        question = {"KIND": bytes_array(b"pace"), "PRIORITY": np.array([asked.request.priority], np.int32)}
        try:
            state = in_time(lambda: call("dit_denoiser", question, ("REPORT",)))
        except TimeoutError:
            raise ServiceUnavailable(
                f"dit_denoiser must answer within {ANSWER_S:g} s, it does not: see python -m stepvideo_serve.health."
            ) from None
        return outputs_of(quote(asked, self._server, json.loads(state["REPORT"].flat[0])))

    @cached_property
    def _server(self) -> Server:
        """Counting the parameters costs seconds of CPU time, which no start should pay for."""
        return Server.of(self._config)


def outputs_of(report: dict[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
    """The model's outputs for a quote."""
    return {
        "SECONDS": np.array([report["seconds"]["total"]], np.float32),
        "GPU_SECONDS": np.array([report["gpu_seconds"]["total"]], np.float32),
        "PEAK_MEMORY_MIB": np.array([report["peak_memory_mib"]], np.float32),
        "QUEUE_WAIT_S": np.array([report["queue_wait_s"]], np.float32),
        "REPORT": bytes_array(json.dumps(report).encode()),
    }
