"""What a scripted server answers to a batch, and what it was asked for."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from stepvideo_client.evaluation.results import Clip, read_clips
from tests.client.fake_server import Action, FakeServer, final, respond, result, step

DEFAULTS = {"num_frames": 17, "height": 32, "width": 48, "steps": 2, "cfg_scale": 9.0, "time_shift": 7.0}
NUMBERS = {"SECONDS": 7200.0, "GPU_SECONDS": 14400.0, "PEAK_MEMORY_MIB": 1.0, "QUEUE_WAIT_S": 0.0}
DONE = [step(1, 2), step(2, 2), result(), final()]


def told() -> Action:
    """The answer to every question: defaults, and quotes of two hours on two GPUs."""
    report = json.dumps({"defaults": {**DEFAULTS, "motion_score": 5.0}}).encode()
    return respond(REPORT=report, **{name: np.array([value], np.float32) for name, value in NUMBERS.items()})


def times(count: int, action: Action) -> Action:
    """The action for the first `count` streams that come to it, nothing for others."""
    left = [None] * count

    def act(server: FakeServer, context: Any) -> Any:
        return action(server, context) if left and left.pop() is None else None

    return act


def streams(server: FakeServer) -> list[dict[str, Any]]:
    """The inputs of every generation that was asked for."""
    return [server.sent(index) for index, request in enumerate(server.requests) if request.model_name == "ti2v"]


def clips(out: Path) -> list[Clip]:
    return list(read_clips(out).values())
