"""A real gateway in front of the real server, asked by the official client."""

import json
import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
import pytest

from tests import signals
from tests.serving.calls import Server
from tests.serving.conftest import config_text, engines, picture, server, triton  # noqa: F401

CONFIG = """
[listen]
port = {port}
[servers]
urls = {urls}
keep_s = 300.0
[jobs]
lease_s = 3.0
database = "{database}"
folder = "{folder}"
"""
SMALL: dict[str, Any] = {
    "size": "96x64",
    "extra_body": {"num_frames": 17, "num_inference_steps": 4, "seed": 7, "guidance_scale": 4.0},
}
READY = re.compile(r"gateway: (http://\S+)")


@dataclass
class Running:
    """A gateway process."""

    process: subprocess.Popen[str]
    url: str
    clients: list[openai.OpenAI] = field(default_factory=list)

    def client(self) -> openai.OpenAI:
        """The official client, which does not try again by itself."""
        self.clients.append(openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0))
        return self.clients[-1]


@contextmanager
def gateway_process(root: Path, config: Path, log: Path) -> Iterator[Running]:
    line = [sys.executable, "-m", "stepvideo_gateway", "--config", str(config)]
    with (
        log.open("a", encoding="utf-8") as said,
        signals.start(line, cwd=root, stdout=subprocess.PIPE, stderr=said, env=environment(root)) as process,
    ):
        try:
            assert process.stdout is not None
            ready = READY.match(process.stdout.readline())
            assert ready is not None, log.read_text(encoding="utf-8")[-3000:]
            running = Running(process, ready[1])
            yield running
            for client in running.clients:
                client.close()
        finally:
            process.kill()


def environment(root: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": f"{root / 'gateway'}:{root / 'client'}"}


def until(condition: Callable[[], Any], what: str, patience_s: float = 120.0) -> None:
    deadline_s = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < deadline_s, f"waited {patience_s:g} s for {what}"
        time.sleep(0.05)


def health(running: Running) -> dict[str, Any]:
    try:
        with urllib.request.urlopen(f"{running.url}/health") as answer:
            return dict(json.load(answer))
    except urllib.error.HTTPError as error:
        return dict(json.load(error))


def create(running: Running, content: bytes, **more: Any) -> Any:
    request = {**SMALL, "prompt": "a cat", "input_reference": ("first.png", content, "image/png"), **more}
    return running.client().videos.create(**request)


@pytest.fixture
def start(root: Path, server: Server, tmp_path: Path) -> Iterator[Callable[..., Running]]:  # noqa: F811
    """Starts gateways on one database and one folder of videos; they are killed at the end."""
    with ExitStack() as stack:
        count = 0

        def begin(
            urls: tuple[str, ...] = (), database: str = "sqlite+aiosqlite:///jobs.sqlite", **more: Any
        ) -> Running:
            nonlocal count
            count += 1
            config = tmp_path / f"gateway{count}.toml"
            addresses = list(urls or (server.grpc_url,))
            text = CONFIG.format(port=0, urls=str(addresses).replace("'", '"'), database=database, folder="videos")
            for section, lines in more.items():
                text = (
                    text.replace(f"[{section}]", f"[{section}]\n{lines}")
                    if f"[{section}]" in text
                    else f"{text}\n[{section}]\n{lines}"
                )
            config.write_text(text, encoding="utf-8")
            return stack.enter_context(gateway_process(root, config, tmp_path / f"gateway{count}.log"))

        yield begin
