"""The health check: what it makes of answers, and what a real server answers."""

import json
import signal
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from stepvideo_serve.launch.health import RANKS_MODEL, State, check, main, questions
from tests.serving.calls import Server, Values, until

PACE = {"ranks": 2, "ranks_ready": True, "silence_s": 0.25, "silence_limit_s": 5.0}
STUB = "Stub process 'ti2v_0_0' is not healthy."


class Scripted(ThreadingHTTPServer):
    """Answers the health check as `ranks`, `errors` (by model) and `status` (of the server) say."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.ranks: dict[str, Any] = dict(PACE)
        self.errors: dict[str, str] = {}
        self.status = 200
        self.silent = ""
        self.over = threading.Event()

    @property
    def url(self) -> str:
        return f"127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Scripted

    def do_GET(self) -> None:
        self.answer(self.server.status, "")

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        model = self.path.split("/")[3]
        if model == self.server.silent:
            self.server.over.wait(60)
        elif model in self.server.errors:
            self.answer(400, json.dumps({"error": self.server.errors[model]}))
        elif model == RANKS_MODEL:
            report = {"name": "REPORT", "data": [json.dumps(self.server.ranks)]}
            self.answer(200, json.dumps({"outputs": [report]}))
        else:
            self.answer(200, "{}")

    def answer(self, status: int, text: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def scripted() -> Iterator[Scripted]:
    with Scripted() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield server
        server.over.set()
        server.shutdown()
        thread.join()


def test_all_is_well(scripted: Scripted) -> None:
    for level in ("ready", "live"):
        health = check(scripted.url, level)
        assert health.well
        assert (
            health.sentence == f"{level}: {len(questions())} models answer; "
            "the last sign of life of the most silent of 2 ranks is 0.2 s old."
        )
        assert {answer.state for answer in health.models.values()} == {State.WELL}


@pytest.mark.parametrize(
    ("error", "state", "live"),
    [
        (STUB, State.DEAD, False),
        ("Request for unknown model: 'ti2v' is not found", State.ABSENT, True),
        ("Request for unknown model: 'ti2v' has no available versions", State.ABSENT, True),
        ("RESOURCE_EXHAUSTED: full", State.REFUSES, True),
    ],
)
def test_a_model_that_answers_with_an_error(scripted: Scripted, error: str, state: State, live: bool) -> None:
    scripted.errors = {"ti2v": error}
    ready = check(scripted.url)
    assert (ready.well, ready.models["ti2v"].state) == (False, state)
    assert ready.sentence.startswith(f"not ready: ti2v {state.value}")
    assert check(scripted.url, "live").well == live


def test_a_model_without_one_of_its_threads_is_neither_ready_nor_live(scripted: Scripted) -> None:
    scripted.errors = {"vae_decoder": "INTERNAL: vae_decoder has lost a thread, runs (OverflowError): load it anew."}
    for level in ("ready", "live"):
        health = check(scripted.url, level)
        assert health.models["vae_decoder"].state is State.BROKEN
        assert health.sentence == f"not {level}: vae_decoder has lost a thread."


def test_a_model_that_says_nothing(scripted: Scripted) -> None:
    scripted.silent = "vae_decoder"
    for level in ("ready", "live"):
        health = check(scripted.url, level, timeout_s=0.5)
        assert health.sentence == f"not {level}: vae_decoder does not answer."


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        ({"ranks_ready": False}, "the 2 ranks of dit_denoiser are being started"),
        ({"silence_s": None}, "the 2 ranks of dit_denoiser are being started"),
        ({"silence_s": 6.0}, "the last sign of life of the most silent of 2 ranks is 6.0 s old"),
    ],
)
def test_ranks_decide_whether_it_is_ready_not_whether_it_lives(
    scripted: Scripted, ranks: dict[str, Any], words: str
) -> None:
    scripted.ranks |= ranks
    assert check(scripted.url).sentence == f"not ready: {words}."
    assert check(scripted.url, "live").well


def test_a_server_that_is_not_ready_itself(scripted: Scripted) -> None:
    scripted.status = 400
    assert check(scripted.url).sentence == "not ready: the server says that it is not ready."
    assert check(scripted.url, "live").sentence.startswith("not live: the server at ")


def test_exit_codes_and_streams(scripted: Scripted, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--url", scripted.url]) == 0
    assert capsys.readouterr().out.startswith("ready: ")
    assert main(["--url", "127.0.0.1:1", "--level", "live"]) == 1
    assert capsys.readouterr().err.startswith("not live: the server at 127.0.0.1:1 does not answer (")
    with pytest.raises(SystemExit) as usage:
        main(["--level", "happy"])
    assert usage.value.code == 2


def test_every_model_of_the_repository_is_asked(root: Any) -> None:
    assert {path.name for path in (root / "model_repository").iterdir()} == set(questions())


def test_a_real_server_is_well_while_it_works(server: Server, long: Values) -> None:
    assert check(server.http_url, "ready", 60.0).well
    with server.open(long) as running:
        running.wait_for_step(1)
        health = check(server.http_url, "ready", 60.0)
        assert health.well, health.sentence
        assert health.models["ti2v"].state is State.WELL


def test_readiness_follows_the_ranks(server: Server, small: Values) -> None:
    before = server.stream_result(small)["LATENTS"]
    generation = check(server.http_url, "ready", 60.0).models[RANKS_MODEL].report["generation"]
    server.rank().send_signal(signal.SIGSTOP)
    until(lambda: not check(server.http_url, "ready", 60.0).well, "the ranks to be missed")
    assert check(server.http_url, "live", 60.0).well, "the group heals itself"
    until(lambda: check(server.http_url, "ready", 60.0).well, "the new ranks")
    assert check(server.http_url, "ready", 60.0).models[RANKS_MODEL].report["generation"] > generation
    assert (server.stream_result(small)["LATENTS"] == before).all()
