"""As much of a gateway as a batch asks for: jobs that run some at a time, and troubles that a real one rarely has."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

from tests.client.fake_server import MP4
from tests.evaluation.scripted import DEFAULTS

REPORT = {"gpu_seconds": {"total": 14400.0}, "defaults": {**DEFAULTS, "motion_score": 5.0}}
LOOKS = 2  # at a job that runs, after which it is completed
PATIENCE_S = 60.0


@dataclass(frozen=True)
class Trouble:
    """What is answered instead; length: what content-length says, where that is not true."""

    status: int
    content: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    length: int | None = None


def refusal(status: int, sentence: str) -> Trouble:
    """As a gateway says it."""
    return Trouble(status, json.dumps({"error": {"message": sentence, "code": "x"}}).encode())


class ScriptedGateway(ThreadingHTTPServer):
    """servers: how many jobs run at a time; most_waiting, most_running: at any time so far. crowd: none is completed
    before so many have come (or PATIENCE_S have passed). asked: method, path, headers and body of every call. troubles:
    by the beginning of "METHOD path", what comes before the right answers. failing: code and message of the next jobs.
    """

    daemon_threads = True

    def __init__(self, servers: int, crowd: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.count, self._crowd, self._began_s = servers, crowd, time.monotonic()
        self.lock = threading.Lock()
        self.jobs: dict[str, dict[str, Any]] = {}
        self.asked: list[tuple[str, str, dict[str, str], dict[str, Any]]] = []
        self.troubles: dict[str, list[Trouble]] = {}
        self.failing: list[tuple[str, str]] = []
        self.most_waiting = self.most_running = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def calls(self, begin: str) -> list[tuple[str, str, dict[str, str], dict[str, Any]]]:
        """Those whose "METHOD path" begins so."""
        return [call for call in self.asked if f"{call[0]} {call[1]}".startswith(begin)]

    def trouble(self, call: str) -> Trouble | None:
        for begin, waiting in self.troubles.items():
            if call.startswith(begin) and waiting:
                return waiting.pop(0)
        return None

    def status(self, status: str) -> list[dict[str, Any]]:
        return [job for job in self.jobs.values() if job["status"] == status]

    def create(self, headers: dict[str, str], body: dict[str, Any]) -> dict[str, Any]:
        key = headers["idempotency-key"]
        for job in self.jobs.values():
            if job["key"] == key:
                return job
        name = f"video_{len(self.calls('POST /v1/videos'))}"
        job = {"id": name, "key": key, "status": "queued", "step": 0, "total_steps": LOOKS, "seed": body["seed"]}
        self.jobs[name] = job
        self.most_waiting = max(self.most_waiting, len(self.status("queued")))
        return job

    def look(self, job: dict[str, Any]) -> dict[str, Any]:
        """One look further."""
        if job["status"] == "queued" and len(self.status("in_progress")) < self.count:
            job["status"] = "in_progress"
        if job["status"] == "in_progress":
            self.most_running = max(self.most_running, len(self.status("in_progress")))
            if self.failing:
                code, message = self.failing.pop(0)
                job |= {"status": "failed", "error": {"code": code, "message": message}}
            elif job["step"] == LOOKS and self._has_crowd():
                job["status"] = "completed"
            else:
                job["step"] = min(job["step"] + 1, LOOKS)
        return job

    def _has_crowd(self) -> bool:
        return len(self.calls("POST /v1/videos")) >= self._crowd or time.monotonic() - self._began_s > PATIENCE_S


class _Handler(BaseHTTPRequestHandler):
    server: ScriptedGateway

    def do_GET(self) -> None:
        self._answer({})

    def do_DELETE(self) -> None:
        self._answer({})

    def do_POST(self) -> None:
        self._answer(json.loads(self.rfile.read(int(self.headers["content-length"]))))

    def _answer(self, body: dict[str, Any]) -> None:
        self.path = urlsplit(self.path).path  # a proxy is told the whole address
        headers = {name.lower(): value for name, value in self.headers.items()}
        with self.server.lock:
            self.server.asked.append((self.command, self.path, headers, body))
            found = self.server.trouble(f"{self.command} {self.path}") or self._right(headers, body)
        self.send_response(found.status)
        self.send_header("content-length", str(len(found.content) if found.length is None else found.length))
        for name, value in found.headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(found.content)

    def _right(self, headers: dict[str, str], body: dict[str, Any]) -> Trouble:
        if self.path == "/health":
            return _json({"servers": {f"server-{number}:8001": True for number in range(self.server.count)}})
        if self.path == "/v1/quotes":
            said = {"seconds": 7200.0, "wait_s": 0.0, "report": REPORT}
            return _json({"servers": {f"server-{number}:8001": said for number in range(self.server.count)}})
        if self.command == "POST":
            return _json(self.server.create(headers, body))
        name, _, rest = self.path.removeprefix("/v1/videos/").partition("/")
        if name not in self.server.jobs:
            return refusal(404, f"There is no video {name!r}.")
        if self.command == "DELETE":
            del self.server.jobs[name]
            return _json({"id": name, "deleted": True})
        return Trouble(200, MP4) if rest == "content" else _json(self.server.look(self.server.jobs[name]))

    def log_message(self, *_: object) -> None:
        """Says nothing."""


def _json(values: dict[str, Any]) -> Trouble:
    return Trouble(200, json.dumps(values).encode(), {"openai-poll-after-ms": "30"})


@contextmanager
def scripted_gateway(servers: int = 1, crowd: int = 0) -> Iterator[ScriptedGateway]:
    """One that listens."""
    with ScriptedGateway(servers, crowd) as gateway:
        thread = threading.Thread(target=gateway.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield gateway
        finally:
            gateway.shutdown()
            thread.join()
