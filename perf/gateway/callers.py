"""Callers who ask for videos, one after the other: of servers directly, and of a gateway over HTTP."""

import base64
import http.client
import json
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from stepvideo_client import Client, Result

PROMPT = "红色圆形向右移动。"
PATIENCE_S = 900.0  # for one video; what takes longer is stuck


@dataclass(frozen=True)
class Work:
    """How many jobs by how many callers, and what each asks for."""

    jobs: int
    callers: int
    image: bytes
    steps: int
    num_frames: int
    height: int
    width: int


@dataclass
class Taken:
    """Seconds from the first request to the last video, and of every GET of a video object."""

    wall_s: float = 0.0
    get_s: list[float] = field(default_factory=list)
    ended: int = 0


def all_jobs(work: Work, ask: Callable[[int], None], taken: Taken) -> Taken:
    """Every job once, by callers who each wait for their video before they ask for the next. Raises what `ask` does."""
    lock = threading.Lock()

    def one(number: int) -> None:
        ask(number)
        with lock:
            taken.ended += 1

    began_s = time.perf_counter()
    with ThreadPoolExecutor(work.callers) as pool:
        try:
            list(pool.map(one, range(work.jobs)))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    taken.wall_s = time.perf_counter() - began_s
    return taken


def directly(work: Work, urls: Sequence[str]) -> Taken:
    """Over gRPC, the servers in turn."""
    clients = [Client(url, idle_timeout_s=300.0) for url in urls]

    def ask(number: int) -> None:
        events = clients[number % len(clients)].generate(
            work.image,
            PROMPT,
            seed=number,
            steps=work.steps,
            num_frames=work.num_frames,
            height=work.height,
            width=work.width,
        )
        if not any(isinstance(event, Result) and event.video for event in events):
            raise RuntimeError(f"job {number} ended without a video")

    try:
        return all_jobs(work, ask, Taken())
    finally:
        for client in clients:
            client.close()


class OverHttp:
    """Through the gateway at `address` (HOST:PORT); `taken` fills while the callers are at work."""

    def __init__(self, work: Work, address: str) -> None:
        self._work, self._address = work, address
        self._picture = f"data:image/png;base64,{base64.b64encode(work.image).decode()}"
        self.taken = Taken()

    def run(self) -> Taken:
        """All jobs."""
        return all_jobs(self._work, self._ask, self.taken)

    def _ask(self, number: int) -> None:
        work, deadline_s = self._work, time.monotonic() + PATIENCE_S
        body = {
            "prompt": PROMPT,
            "input_reference": self._picture,
            "size": f"{work.width}x{work.height}",
            "num_frames": work.num_frames,
            "num_inference_steps": work.steps,
            "seed": number,
        }
        with closing(http.client.HTTPConnection(self._address, timeout=PATIENCE_S)) as connection:
            video, wait_s = _call(connection, "POST", "/v1/videos", json.dumps(body).encode())
            path = f"/v1/videos/{video['id']}"
            while video["status"] not in ("completed", "failed"):
                if time.monotonic() > deadline_s:
                    raise RuntimeError(f"job {number} takes longer than {PATIENCE_S:g} s")
                time.sleep(wait_s)
                began_s = time.perf_counter()
                video, wait_s = _call(connection, "GET", path)
                self.taken.get_s.append(time.perf_counter() - began_s)
            if video["status"] == "failed":
                raise RuntimeError(f"job {number} failed: {video['error']}")
            connection.request("GET", f"{path}/content")
            answer = connection.getresponse()
            if b"ftyp" not in answer.read()[:12]:
                raise RuntimeError(f"job {number} has no video, got HTTP {answer.status}")


def _call(
    connection: http.client.HTTPConnection, method: str, path: str, body: bytes | None = None
) -> tuple[dict[str, Any], float]:
    """The video object, and when asking again is worth it, in seconds."""
    connection.request(method, path, body, {"content-type": "application/json"} if body else {})
    answer = connection.getresponse()
    content = answer.read()
    if answer.status != http.client.OK:
        raise RuntimeError(f"{method} {path} must be answered with 200, got {answer.status}: {content[:300]!r}")
    return json.loads(content), float(answer.headers.get("openai-poll-after-ms") or 500) / 1000
