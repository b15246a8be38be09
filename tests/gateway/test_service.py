"""Keys, webhooks, quotes, marks, metrics and refusals of a real gateway in front of the real server."""

import base64
import json
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import openai
import pytest
from standardwebhooks import Webhook

from tests.gateway.conftest import SMALL, Running, create, environment, health, until

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"


class Listener(ThreadingHTTPServer):
    """Takes webhooks, and hands a picture out; the first `refusals` calls are answered with 500."""

    def __init__(self, picture: bytes, refusals: int = 0) -> None:
        self.heard: list[tuple[dict[str, str], bytes]] = []
        self.refusals, self.picture = refusals, picture
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/hook"


class Handler(BaseHTTPRequestHandler):
    server: Listener

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.heard.append(({name.lower(): value for name, value in self.headers.items()}, body))
        self.send_response(500 if len(self.server.heard) <= self.server.refusals else 204)
        self.end_headers()

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("content-type", "image/png")
        self.end_headers()
        self.wfile.write(self.server.picture)

    def log_message(self, *_: object) -> None:
        """Says nothing."""


@contextmanager
def listening(picture: bytes, refusals: int = 0) -> Iterator[Listener]:
    with Listener(picture, refusals) as listener:
        thread = threading.Thread(target=listener.serve_forever)
        thread.start()
        try:
            yield listener
        finally:
            listener.shutdown()
            thread.join()


def ready(start: Callable[..., Running], **more: Any) -> Running:
    running = start(**more)
    until(lambda: health(running)["well"], "the server to be seen")
    return running


def keys(root: Path, config: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "stepvideo_gateway", "--config", str(config), "keys", *arguments]
    return subprocess.run(line, cwd=root, env=environment(root), capture_output=True, text=True, check=False)


def with_key(running: Running, key: str) -> openai.OpenAI:
    running.clients.append(openai.OpenAI(base_url=f"{running.url}/v1", api_key=key, max_retries=0))
    return running.clients[-1]


def test_keys_see_their_own_videos_within_their_limits(
    start: Callable[..., Running], root: Path, tmp_path: Path, picture: bytes
) -> None:
    gateway = ready(start, api="require_key = true")
    config = tmp_path / "gateway1.toml"
    reference = ("first.png", picture, "image/png")
    added = keys(root, config, "add", "ann", "--max-active", "2", "--max-per-day", "3", "--presets", "exact")
    assert added.returncode == 0, added.stderr
    ann, bob = added.stdout.strip(), keys(root, config, "add", "bob", "--max-pixels", "100000").stdout.strip()
    assert ann != bob
    assert ann not in (tmp_path / "jobs.sqlite").read_bytes().decode("latin-1"), "only its digest is kept"
    taken = keys(root, config, "add", "ann")
    assert (taken.returncode, taken.stderr.count("\n")) == (2, 1)
    for wrong in ("none", f"{ann}x"):
        with pytest.raises(openai.AuthenticationError):
            with_key(gateway, wrong).videos.list()
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{gateway.url}/v1/videos")
    of_ann, of_bob = with_key(gateway, ann), with_key(gateway, bob)
    video = of_ann.videos.create(prompt="a cat", input_reference=reference, **SMALL)
    for ask in (of_bob.videos.retrieve, of_bob.videos.delete, of_bob.videos.download_content):
        with pytest.raises(openai.NotFoundError):
            ask(video.id)
    assert of_bob.videos.list().data == []
    with pytest.raises(openai.BadRequestError, match="frames x height x width must be at most 100000 with this key"):
        of_bob.videos.create(prompt="a cat", input_reference=reference, **SMALL)
    rough = {**SMALL, "extra_body": {**SMALL["extra_body"], "quality": "rough"}}
    with pytest.raises(openai.PermissionDeniedError, match="quality must be one of exact with this key"):
        of_ann.videos.create(prompt="a cat", input_reference=reference, **rough)
    endless = {**SMALL, "extra_body": {**SMALL["extra_body"], "num_inference_steps": 100_000}}
    second = of_ann.videos.create(prompt="a cat", input_reference=reference, **endless)
    third = (
        of_ann.videos.create(prompt="a cat", input_reference=reference, **SMALL)
        if of_ann.videos.poll(video.id)
        else None
    )
    assert third is not None
    with pytest.raises(openai.RateLimitError, match="At most"):
        of_ann.videos.create(prompt="a cat", input_reference=reference, **SMALL)
    of_ann.videos.delete(second.id)
    assert keys(root, config, "list").stdout.splitlines()[0].startswith("ann\tactive 2\trunning 0\tday 3")
    assert keys(root, config, "remove", "ann").returncode == 0
    with pytest.raises(openai.AuthenticationError):
        of_ann.videos.list()


def test_webhooks_are_signed_and_tried_again(start: Callable[..., Running], picture: bytes) -> None:
    with listening(picture, refusals=1) as listener:
        lines = f'urls = ["{listener.url}"]\nsecret = "{SECRET}"\nallow_private = true'
        gateway = ready(start, webhooks=lines)
        video = create(gateway, picture)
        until(lambda: len(listener.heard) >= 2, "the second attempt")
    for headers, body in listener.heard:
        event = Webhook(SECRET).verify(body, headers)
        assert (event["type"], event["data"]) == ("video.completed", {"id": video.id})
        assert headers["webhook-id"] == event["id"]
    assert listener.heard[0][1] == listener.heard[1][1]
    unwrapped: Any = openai.OpenAI(api_key="none", webhook_secret=SECRET)
    headers, body = listener.heard[1]
    assert unwrapped.webhooks.unwrap(body.decode(), headers).type == "video.completed"
    unwrapped.close()


def test_private_addresses_are_not_asked(start: Callable[..., Running], picture: bytes, tmp_path: Path) -> None:
    with listening(picture) as listener:
        lines = f'urls = ["{listener.url}"]\nsecret = "{SECRET}"'
        gateway = ready(start, webhooks=lines, api="fetch_references = true")
        with pytest.raises(openai.BadRequestError, match="which is not on the public internet"):
            create(gateway, picture, input_reference=openai.omit, extra_body={"input_reference": listener.url})
        video = create(gateway, picture)
        assert gateway.client().videos.poll(video.id, poll_interval_ms=200).status == "completed"
        log = tmp_path / "gateway1.log"
        until(lambda: "which is not on the public internet" in log.read_text(encoding="utf-8"), "the refusal")
        assert listener.heard == []


def test_a_picture_is_fetched_where_that_is_configured(start: Callable[..., Running], picture: bytes) -> None:
    with listening(picture) as listener:
        gateway = ready(start, api="fetch_references = true", webhooks="allow_private = true")
        body = {
            "prompt": "a cat",
            "size": "96x64",
            "num_frames": 17,
            "num_inference_steps": 2,
            "input_reference": listener.url,
        }
        request = urllib.request.Request(
            f"{gateway.url}/v1/videos", json.dumps(body).encode(), {"content-type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            video = json.load(answer)
    assert gateway.client().videos.poll(video["id"], poll_interval_ms=200).status == "completed"


def test_videos_say_what_they_are(start: Callable[..., Running], picture: bytes, tmp_path: Path) -> None:
    gateway = ready(start)
    video = create(gateway, picture)
    assert gateway.client().videos.poll(video.id, poll_interval_ms=200).status == "completed"
    path = tmp_path / "video.mp4"
    path.write_bytes(gateway.client().videos.download_content(video.id).read())
    line = [imageio_ffmpeg.get_ffmpeg_exe(), "-i", str(path), "-f", "ffmetadata", "-"]
    said = subprocess.run(line, capture_output=True, text=True, check=True).stdout
    assert "description=AI-generated" in said
    settings = json.loads(said.split("comment=")[1].split("\n")[0].replace("\\", ""))
    assert (settings["seed"], settings["prompt"], settings["steps"]) == (7, "a cat", 4)


def test_quotes_metrics_and_progress_events(start: Callable[..., Running], picture: bytes) -> None:
    gateway = ready(start)
    video = create(gateway, picture)
    with urllib.request.urlopen(f"{gateway.url}/v1/videos/{video.id}/events") as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        told = [json.loads(line[6:]) for line in stream if line.startswith(b"data: ")]
    assert [told[0]["id"], told[-1]["status"]] == [video.id, "completed"]
    assert [each["progress"] for each in told] == sorted(each["progress"] for each in told)
    body = json.dumps({"prompt": "a cat", "size": "96x64", "num_frames": 17, "num_inference_steps": 4}).encode()
    body = json.dumps(
        {**json.loads(body), "input_reference": f"data:image/png;base64,{base64.b64encode(picture).decode()}"}
    ).encode()
    request = urllib.request.Request(f"{gateway.url}/v1/quotes", body, {"content-type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        quote = json.load(answer)
    assert 0 < quote["seconds"] < 100
    assert quote["wait_s"] >= 0
    with urllib.request.urlopen(f"{gateway.url}/metrics") as answer:
        text = answer.read().decode()
    assert 'stepvideo_gateway_jobs{status="completed"}' in text
    assert 'stepvideo_gateway_answers_total{method="POST",route="/v1/videos",status="200"} 1.0' in text
    assert "stepvideo_gateway_database_up 1.0" in text
    with urllib.request.urlopen(f"{gateway.url}/openapi.json") as answer:
        document = json.load(answer)
    assert "/v1/videos/{video_id}/remix" in document["paths"]
    models = gateway.client().models.list()
    assert [model.id for model in models] == ["step-video-ti2v"]


def test_large_and_slow_bodies_are_refused(start: Callable[..., Running]) -> None:
    gateway = ready(start, api="max_upload_mib = 1\nbody_timeout_s = 1.0")
    with pytest.raises(openai.APIStatusError) as refused:
        create(gateway, b"\x89PNG" + bytes(2 << 20))
    assert refused.value.status_code == 413
    host, port = gateway.url.removeprefix("http://").split(":")
    for head in (b"transfer-encoding: chunked", b"content-length: 900"):
        with socket.create_connection((host, int(port))) as slow:
            slow.sendall(
                b"POST /v1/videos HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n" + head + b"\r\n\r\n"
            )
            slow.settimeout(20.0)
            assert slow.recv(200).startswith(b"HTTP/1.1 408")
    assert health(gateway)["well"]


def test_what_would_be_open_to_others_is_not_started(root: Path, tmp_path: Path) -> None:
    for text, sentence in (
        ('[listen]\naddress = "0.0.0.0"\n', "[api] require_key must be true where others can reach the gateway"),
        ('[webhooks]\nurls = ["https://a.example"]\n', "STEPVIDEO_GATEWAY_WEBHOOK_SECRET must be whsec_"),
        ("[api]\nmodle = 3\n", "found 'modle'"),
        ("[servers]\nurls = []\n", "must name at least one server"),
        ("[jobs]\nlease_s = true\n", "must be a number"),
    ):
        config = tmp_path / "gateway.toml"
        config.write_text(text, encoding="utf-8")
        done = subprocess.run(
            [sys.executable, "-m", "stepvideo_gateway", "--config", str(config)],
            cwd=root, env=environment(root), capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
        assert done.returncode == 2
        assert sentence in done.stderr
        assert done.stderr.count("\n") == 1, done.stderr


def test_a_full_disk_refuses_and_loses_nothing(start: Callable[..., Running], picture: bytes, tmp_path: Path) -> None:
    """The folder of videos becomes a file, and a folder again."""
    gateway = ready(start)
    folder, aside = tmp_path / "videos", tmp_path / "aside"
    video = create(gateway, picture, extra_body={**SMALL["extra_body"], "num_inference_steps": 60})
    until(lambda: gateway.client().videos.retrieve(video.id).progress >= 5, "progress")
    folder.rename(aside)
    folder.write_bytes(b"")
    with pytest.raises(openai.InternalServerError) as refused:
        create(gateway, picture)
    assert refused.value.status_code == 503
    assert "The folder of videos cannot be written" in refused.value.message
    time.sleep(6.0)  # the run has ended by now, and its video could not be written
    assert gateway.client().videos.retrieve(video.id).status == "in_progress"
    folder.unlink()
    aside.rename(folder)
    assert gateway.client().videos.poll(video.id, poll_interval_ms=200).status == "completed"
