"""A worker of ranks that makes a thread of its own process fail; imported by the rank processes, not by pytest."""

import threading
from typing import Any

from stepvideo_serve.parallel.rank_process import JobContext
from stepvideo_serve.parallel.shared_memory import Array


class PlantedWorker:
    """Does nothing, and lets the thread that params["thread"] names fail at what it does next."""

    def info(self) -> dict[str, Any]:
        return {}

    def run(
        self, params: dict[str, Any], tensors: dict[str, Array], context: JobContext
    ) -> tuple[dict[str, Any], dict[str, Array]]:
        if params["thread"] == "heartbeat":
            send = context._channel.send

            def planted(wire: bytes) -> None:
                if threading.current_thread().name == "heartbeat":
                    raise OverflowError("planted")
                send(wire)

            context._channel.send = planted  # type: ignore[method-assign]
        elif params["thread"] == "channel":
            context.on_ack = planted_ack  # type: ignore[method-assign]
            context.report({}, {})  # is acknowledged
        if params["thread"]:
            threading.Event().wait()  # until the process ends
        return {}, tensors


def planted_ack() -> None:
    raise OverflowError("planted")


def build(settings: dict[str, Any]) -> PlantedWorker:  # noqa: ARG001  # as every factory
    return PlantedWorker()
