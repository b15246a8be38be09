"""A gateway as an endpoint: its jobs, which survive it and this program.

A clip's job is found again by its Idempotency-Key, so a batch that was killed gets what was made meanwhile. A job goes
when its clip is in the folder, when it is cancelled, and when it has failed (or its key would give the failure for
ever).
"""

import base64
import io
import threading
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, Final, TypeVar
from urllib.parse import quote as quoted

from PIL import Image

from stepvideo_client.errors import (
    ClientError,
    InvalidInput,
    InvalidRequest,
    MalformedResponse,
    QueueFull,
    RequestCancelled,
    RequestFailed,
    ServerFailed,
    ServerUnreachable,
    ServiceUnavailable,
)
from stepvideo_client.evaluation.endpoint import Cost
from stepvideo_client.evaluation.gateway_http import Answer, GatewayHttp
from stepvideo_client.events import Result, StepEvent
from stepvideo_client.fields import Options, QuoteOptions

T = TypeVar("T")

LONGEST_POLL_S: Final = 2.0  # how late it may be seen that a clip has begun, and another is wanted
_AGAIN_S: Final = 1.0
_UNAVAILABLE: Final = 503
_FAILED: Final = "failed"
_ENDED: Final = ("completed", _FAILED)
_POLL_HEADER: Final = "openai-poll-after-ms"
_CANCELLED: Final = "The clip was cancelled here."
_URGENCIES: Final = {1: "high", 2: "normal", 3: "low"}
_NAMES: Final = {
    "num_frames": "num_frames",
    "steps": "num_inference_steps",
    "cfg_scale": "guidance_scale",
    "time_shift": "flow_shift",
    "motion_score": "motion_score",
    "seed": "seed",
    "quality": "quality",
    "negative_prompt": "negative_prompt",
}
_FAILURES: Final[Mapping[str, type[RequestFailed]]] = {"invalid_request": InvalidRequest, "cancelled": RequestCancelled}


class GatewayEndpoint:
    """url: as it was given; patience_s: how long a job is asked for while the gateway is away."""

    def __init__(self, url: str, calls: GatewayHttp, patience_s: float) -> None:
        self._url, self._calls, self._patience_s = url, calls, patience_s
        self._closed = threading.Event()

    @property
    def url(self) -> str:
        """As it was given."""
        return self._url

    def servers(self) -> int:
        """Those behind the gateway that are ready; 1 where it does not tell."""
        try:
            known = self._calls.call("GET", "/health", accepted=(_UNAVAILABLE,)).json().get("servers")
        except ClientError:
            return 1
        return max(1, sum(ready is True for ready in known.values())) if isinstance(known, dict) else 1

    def defaults(self) -> dict[str, Any]:
        """Those of a server behind the gateway. Raises as `costs`."""
        for said in self._quotes({}).values():
            if isinstance(defaults := said["report"].get("defaults"), dict):
                return defaults
        raise MalformedResponse(f"The gateway at {self._url} does not tell its servers' defaults: are these older?")

    def costs(self, options: QuoteOptions) -> Mapping[str, Cost]:
        """As the servers behind the gateway quote."""
        try:
            return {
                url: Cost(float(said["seconds"]), float(said["report"]["gpu_seconds"]["total"]))
                for url, said in self._quotes(options).items()
            }
        except (KeyError, TypeError, ValueError) as error:
            raise MalformedResponse(f"The quote of the gateway at {self._url} cannot be read: {error!r}.") from error

    def generate(self, image: bytes, prompt: str, options: Options) -> Generator[StepEvent | Result, None, None]:
        """An event for each look at the job, then the result, whose `report` names the job. Closing the iterator before
        its end removes the job. Raises InvalidInput for what the API has not."""
        body = {"prompt": prompt, "input_reference": _data_url(image), **fields_of(options)}
        # A gateway takes the urgency as a part of the request: the same key with another one would be refused.
        key = f"{options['request_id']}-{options['priority']}"
        if self._closed.is_set():
            raise RequestCancelled(_CANCELLED)
        job, pause_s = self._begin(body, key)
        while job["status"] not in _ENDED:
            try:
                yield _event(job)
                self._closed.wait(pause_s)
                if self._closed.is_set():
                    raise RequestCancelled(_CANCELLED)
            except (GeneratorExit, RequestCancelled):
                self._remove(job)
                raise
            job, pause_s = self._patiently(partial(self._look, job))
        video = self._video(job)
        about = {name: job.get(name) for name in ("id", "created_at", "completed_at")}
        yield Result(seed=_seed(job), report={"gateway": about}, video=video)

    def _look(self, job: Mapping[str, Any]) -> tuple[dict[str, Any], float]:
        return _read(self._calls.call("GET", _path(job)))

    def _video(self, job: Mapping[str, Any]) -> bytes:
        """Of a job that has ended. Raises the error of one that failed; that, and one whose video was lost, is removed,
        so that its key makes another."""
        if job["status"] == _FAILED:
            self._remove(job)
            raise _failure(job)
        try:
            return self._patiently(lambda: self._calls.call("GET", f"{_path(job)}/content")).content
        except ServiceUnavailable:
            self._remove(job)
            raise

    def settle(self, result: Result) -> None:
        """Removes the job with its video."""
        self._remove(result.report["gateway"])

    def close(self) -> None:
        """The thread that follows a job removes it, soon."""
        self._closed.set()

    def _begin(self, body: Mapping[str, Any], key: str) -> tuple[dict[str, Any], float]:
        """The job of the key, and the seconds after which to look at it; never one that had failed before."""

        def create() -> tuple[dict[str, Any], float]:
            return _read(self._calls.call("POST", "/v1/videos", body, {"Idempotency-Key": key}))

        job, pause_s = create()
        if job["status"] == _FAILED:
            self._remove(job)
            job, pause_s = create()
        return job, pause_s

    def _patiently(self, ask: Callable[[], T]) -> T:
        """`ask`, again while the gateway is away: its jobs are there when it comes back."""
        began_s = time.monotonic()
        while True:
            try:
                return ask()
            except (ServerUnreachable, ServiceUnavailable, QueueFull):  # 429 here: asked too often
                if self._closed.is_set() or time.monotonic() - began_s >= self._patience_s:
                    raise
            self._closed.wait(_AGAIN_S)

    def _remove(self, job: Mapping[str, Any]) -> None:
        with suppress(ClientError):  # a gateway that is away keeps it until it expires
            self._calls.call("DELETE", _path(job))

    def _quotes(self, options: QuoteOptions) -> dict[str, Any]:
        """What each server says, by its address behind the gateway."""
        body = {"prompt": "a quote", "input_reference": _data_url(_any_picture()), **fields_of(options)}
        try:
            said = self._calls.call("POST", "/v1/quotes", body).json().get("servers")
        except RequestFailed as error:
            if error.code == "NOT_FOUND":
                raise InvalidInput(f"--url must be a gateway or HOST:PORT of a server's gRPC: {error}") from error
            raise
        if not isinstance(said, dict) or not said or not all(_is_quote(one) for one in said.values()):
            raise MalformedResponse(f"The quote of the gateway at {self._url} must name its servers, it does not.")
        return {f"{self._url} {url}": one for url, one in said.items()}


def fields_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """The API's fields for these options. Raises InvalidInput for options that it has no field for."""
    fields: dict[str, Any] = {}
    given = {name: value for name, value in options.items() if value is not None and name != "request_id"}
    if "height" in given and "width" in given:
        fields["size"] = f"{given.pop('width')}x{given.pop('height')}"
    for name, value in given.items():
        if name == "priority":
            fields["priority"] = _URGENCIES[value]
        elif name in _NAMES and value != "":
            fields[_NAMES[name]] = value
        elif (name, value) != ("output", "mp4"):
            raise InvalidInput(f"A gateway has no {name} of {value!r}: leave that out, or name its servers over gRPC.")
    return fields


def _read(answer: Answer) -> tuple[dict[str, Any], float]:
    """A job, and the seconds after which to look at it again. Raises MalformedResponse."""
    job = answer.json()
    if not isinstance(job.get("id"), str) or not isinstance(job.get("status"), str):
        raise MalformedResponse("The gateway must answer with a video object, it has no id or no status.")
    after = {name.lower(): value for name, value in answer.headers.items()}.get(_POLL_HEADER, "")
    return job, min(int(after) / 1000 if after.isdecimal() else LONGEST_POLL_S, LONGEST_POLL_S)


def _event(job: Mapping[str, Any]) -> StepEvent:
    """A job that waits again, because its server was lost, is at step 0 again."""
    step, total, place = (job.get(name) for name in ("step", "total_steps", "queue_position"))
    runs = job["status"] == "in_progress" and isinstance(step, int)
    return StepEvent(
        step=int(step or 0) if runs else 0,
        total_steps=total if isinstance(total, int) else 0,
        elapsed_s=0.0,
        queue_position=place if isinstance(place, int) and not runs else None,
    )


def _failure(job: Mapping[str, Any]) -> ClientError:
    said = job.get("error")
    code, message = (said.get("code"), said.get("message")) if isinstance(said, dict) else (None, None)
    return _FAILURES.get(str(code), ServerFailed)(str(message or "The gateway gave no reason."))


def _seed(job: Mapping[str, Any]) -> int:
    seed = job.get("seed")
    if not isinstance(seed, int):
        raise MalformedResponse(f"The gateway must tell the seed of a finished video, got {seed!r}.")
    return seed


def _is_quote(said: Any) -> bool:
    return isinstance(said, dict) and isinstance(said.get("report"), dict)


def _path(job: Mapping[str, Any]) -> str:
    return f"/v1/videos/{quoted(str(job['id']), safe='')}"


def _data_url(image: bytes) -> str:
    return f"data:application/octet-stream;base64,{base64.b64encode(image).decode()}"


def _any_picture() -> bytes:
    """Quotes are asked for like videos, with a picture that none of them depends on."""
    out = io.BytesIO()
    Image.new("RGB", (16, 16)).save(out, "PNG")
    return out.getvalue()
