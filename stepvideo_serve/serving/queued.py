"""What `dit_denoiser` and `vae_decoder` share: decoupled models that do one run at a time, on a thread of their own.

A request with RUN_ID is a run. A request with CANCEL_RUN ends the run of that id, waiting or under way, and is answered
with nothing: servers before 25.04 cannot cancel one model's call of another. A request with ASK_RUN is answered with
nothing while the run of that id waits or is under way, and with an error once it is not: where a process died and was
replaced, its runs are gone, and nobody else tells their callers. The other way round, a run is ended when nobody has
asked for LEASE_S: its caller's process has died, and no server tells.
"""

from abc import ABC, abstractmethod
from typing import Any

from stepvideo_serve.errors import InvalidRequest, WorkerFailed
from stepvideo_serve.serving.adapter import Arrays, CallSender, end_process, read_inputs
from stepvideo_serve.serving.run_queue import QueuedRun, RunQueue
from stepvideo_serve.serving.telemetry import origin_of

LEASE_S = 60.0  # six times as long as callers wait between two signs (model_run.py)


class QueuedModel(ABC):
    """A subclass starts `self.queue` in `initialize`."""

    queue: RunQueue

    @abstractmethod
    def describe_run(self, inputs: Arrays) -> dict[str, Any]:
        """The run's parameters, from its inputs. Raises InvalidRequest. `timeout_s` is its deadline, if there."""

    def answer_at_once(self, inputs: Arrays) -> Arrays | None:  # noqa: ARG002  # for subclasses
        """The answer to a request that is not a run; None where it is one."""
        return None

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            sender = CallSender(request)
            try:
                inputs = read_inputs(request)
                self.queue.end_abandoned(LEASE_S)  # in time: who would wait for them comes by here
                if "CANCEL_RUN" in inputs:
                    self.queue.cancel(_identity(inputs, "CANCEL_RUN"))
                    sender.close()
                elif "ASK_RUN" in inputs:
                    self._vouch_for(_identity(inputs, "ASK_RUN"))
                    sender.close()
                elif (answer := self.answer_at_once(inputs)) is not None:
                    sender.finish(answer)
                else:
                    run_id = _identity(inputs, "RUN_ID")
                    sender.send({})  # a caller by BLS holds one of the server's 32 threads until the first response
                    run = QueuedRun(run_id, self.describe_run(inputs), inputs, sender)
                    origin = origin_of(request)
                    run.request_id, run.traceparent = origin.request_id, origin.traceparent
                    self.queue.put(run)
            except Exception as error:  # every error becomes this request's response
                sender.fail(error)

    def finalize(self) -> None:
        self.queue.close()
        end_process()

    def _vouch_for(self, run_id: str) -> None:
        if not self.queue.renew(run_id):
            raise WorkerFailed("The run must be known to this process, it is not: it has ended, or began in another.")


def _identity(inputs: Arrays, name: str) -> str:
    if name not in inputs:
        raise InvalidRequest(f"A run needs {name}, got none: call the model ti2v instead.")
    return str(inputs[name].flat[0].decode(errors="backslashreplace"))
