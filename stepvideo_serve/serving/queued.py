"""What `dit_denoiser` and `vae_decoder` share: decoupled models that do one run at a time, on a thread of their own.

A request with RUN_ID is a run. A request with CANCEL_RUN ends the run of that id, waiting or under way, and is answered
with nothing: servers before 25.04 cannot cancel one model's call of another.
"""

from abc import ABC, abstractmethod
from typing import Any

from stepvideo_serve.errors import InvalidRequest
from stepvideo_serve.serving.adapter import Arrays, CallSender, end_process, read_inputs
from stepvideo_serve.serving.run_queue import QueuedRun, RunQueue


class QueuedModel(ABC):
    """A subclass starts `self.queue` in `initialize`."""

    queue: RunQueue

    @abstractmethod
    def describe_run(self, inputs: Arrays) -> dict[str, Any]:
        """The run's parameters, from its inputs. Raises InvalidRequest. `timeout_s` is its deadline, if there."""

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            sender = CallSender(request)
            try:
                inputs = read_inputs(request)
                if "CANCEL_RUN" in inputs:
                    self.queue.cancel(_identity(inputs, "CANCEL_RUN"))
                    sender.close()
                else:
                    run_id = _identity(inputs, "RUN_ID")
                    sender.send({})  # a caller by BLS holds one of the server's 32 threads until the first response
                    self.queue.put(QueuedRun(run_id, self.describe_run(inputs), inputs, sender))
            except Exception as error:  # every error becomes this request's response
                sender.fail(error)

    def finalize(self) -> None:
        self.queue.close()
        end_process()


def _identity(inputs: Arrays, name: str) -> str:
    if name not in inputs:
        raise InvalidRequest(f"A run needs {name}, got none: call the model ti2v instead.")
    return str(inputs[name].flat[0].decode(errors="backslashreplace"))
