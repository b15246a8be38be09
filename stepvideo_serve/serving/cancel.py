"""The public model `ti2v_cancel`: ends the run of a REQUEST_ID, and forgets its result. Free of torch."""

import json
from typing import Any

import numpy as np

from stepvideo_serve.config import ServeConfig
from stepvideo_serve.errors import ServiceUnavailable
from stepvideo_serve.request.parse import read_request_id
from stepvideo_serve.scheduling.request_signs import cancel
from stepvideo_serve.serving.adapter import (
    Arrays,
    bytes_array,
    clear_setup_errors,
    error_response,
    is_probe,
    read_inputs,
    response,
)
from stepvideo_serve.serving.launcher_folder import signs_folder
from stepvideo_serve.serving.observe.logs import configure_logging
from stepvideo_serve.serving.observe.thread_deaths import ThreadDeaths


class CancelModel:
    """REQUEST_ID -> CANCELLED, whether a run or a kept result of that id was known; REPORT names the models.

    A run that waits or computes ends within a step, and all who wait for it hear that it was cancelled.
    """

    def initialize(self, args: dict[str, str]) -> None:
        with clear_setup_errors():
            config = ServeConfig.from_environment()
            configure_logging(config.logging, args["model_name"], in_stub=True)
        self._name, self._limits, self._deaths = args["model_name"], config.limits, ThreadDeaths.watched()
        self._folder = signs_folder()

    def is_ready(self) -> bool:
        """Asked by servers from 26.03 on."""
        return self._deaths.none

    def execute(self, requests: list[Any]) -> list[Any]:
        return [self._respond(request) for request in requests]

    def _respond(self, request: Any) -> Any:
        try:
            if is_probe(request):
                self._deaths.check(self._name)
                return response({})
            return response(self._answer(read_inputs(request)))
        except Exception as error:  # every error becomes this request's response
            return error_response(error)

    def _answer(self, inputs: Arrays) -> Arrays:
        request_id = read_request_id(inputs, self._limits)
        if self._folder is None:
            raise ServiceUnavailable(
                "Cancelling by REQUEST_ID needs a server started by `python -m stepvideo_serve serve`, this one was "
                "started otherwise: close the request's connection instead."
            )
        models = cancel(self._folder, request_id)
        return {
            "CANCELLED": np.array([bool(models)]),
            "REPORT": bytes_array(json.dumps({"models": models}).encode()),
        }
