"""A model with the outputs of ti2v and ti2v_unary that computes nothing: for what perf_analyzer makes of them."""

import json
import os
import threading
import time
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

STEPS = 4
REPORT = json.dumps({"seconds": {"total": 0.1, "image": 0.01}, "step_seconds": [0.01] * STEPS}).encode()


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        self._streams = args["model_name"] == "ti2v"

    def execute(self, requests: list[Any]) -> list[Any] | None:
        if not self._streams:
            return [result() for _ in requests]
        for request in requests:
            threading.Thread(target=answer, args=(request.get_response_sender(),)).start()
        return None


def answer(sender: Any) -> None:
    for step in range(1, STEPS + 1):
        time.sleep(0.01)
        sender.send(
            response(
                STEP=np.array([step], np.int32),
                TOTAL_STEPS=np.array([STEPS], np.int32),
                ELAPSED_S=np.array([0.01 * step], np.float32),
            )
        )
    sender.send(result())
    sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)


def result() -> Any:
    return response(
        VIDEO=np.array([os.urandom(200_000)], np.object_),
        SEED=np.array([1], np.int64),
        REPORT=np.array([REPORT], np.object_),
    )


def response(**outputs: Any) -> Any:
    return pb_utils.InferenceResponse([pb_utils.Tensor(name, array) for name, array in outputs.items()])
