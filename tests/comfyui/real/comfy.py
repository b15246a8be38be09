"""A real ComfyUI: started without a screen, asked over POST /prompt, heard over its websocket."""

import asyncio
import json
import os
import re
import struct
import subprocess
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from tests import signals

STARTED = re.compile(r"To see the GUI go to: (http://\S+)")
START_S = 600.0
PATIENCE_S = 600.0
TEXT, PREVIEW = 3, 4  # binary messages
ENDS = ("execution_success", "execution_error", "execution_interrupted")

Prompt = Mapping[str, Mapping[str, Any]]


@dataclass
class Run:
    """What ComfyUI said while it ran a workflow."""

    prompt_id: str = ""
    messages: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    texts: list[tuple[str, str]] = field(default_factory=list)
    previews: list[tuple[str, bytes]] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def end(self) -> str:
        return self.messages[-1][0]

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [data for name, data in self.messages if name == kind]

    def steps(self, node: str) -> list[tuple[float, float]]:
        """How far a node was, and of how much, without repetitions."""
        found: list[tuple[float, float]] = []
        for data in self.of("progress_state"):
            at = data["nodes"].get(node)
            if at is not None and (at["value"], at["max"]) not in found:
                found.append((at["value"], at["max"]))
        return found

    def output(self, node: str) -> dict[str, Any]:
        return dict(next(data["output"] for data in self.of("executed") if data["node"] == node))

    @property
    def error(self) -> str:
        return str(self.of("execution_error")[0]["exception_message"]).strip()


@dataclass
class Comfy:
    """A running ComfyUI. `base`: its folder of inputs, outputs and custom nodes."""

    url: str
    base: Path
    process: "subprocess.Popen[str]"

    def run(self, prompt: Prompt, meanwhile: Callable[[Run], bool] | None = None) -> Run:
        """Runs a workflow to its end; `meanwhile` is called after each message until it says True."""
        return asyncio.run(asyncio.wait_for(self._run(prompt, meanwhile), PATIENCE_S))

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(f"{self.url}{path}", timeout=30) as answer:
            return json.load(answer)

    def post(self, path: str, body: Mapping[str, Any]) -> None:
        request = urllib.request.Request(
            f"{self.url}{path}", json.dumps(body).encode(), {"content-type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=30):
            pass

    async def _run(self, prompt: Prompt, meanwhile: Callable[[Run], bool] | None) -> Run:
        client_id, run, began_s = uuid.uuid4().hex, Run(), time.monotonic()
        async with (
            aiohttp.ClientSession(self.url) as session,
            session.ws_connect(f"/ws?clientId={client_id}", max_msg_size=0) as socket,
        ):
            await socket.send_json({"type": "feature_flags", "data": {"supports_preview_metadata": True}})
            async with session.post("/prompt", json={"prompt": prompt, "client_id": client_id}) as answer:
                body = await answer.json()
                assert answer.status == 200, body
                run.prompt_id = body["prompt_id"]
            async for message in socket:
                hear(run, message)
                if meanwhile is not None and await asyncio.to_thread(meanwhile, run):
                    meanwhile = None
                if run.messages and run.end in ENDS:
                    break
        run.seconds = time.monotonic() - began_s
        return run


def hear(run: Run, message: aiohttp.WSMessage) -> None:
    """Adds a message of the websocket to what was heard."""
    if message.type == aiohttp.WSMsgType.TEXT:
        said = json.loads(message.data)
        run.messages.append((said["type"], said["data"]))
    elif message.type == aiohttp.WSMsgType.BINARY:
        kind, length = struct.unpack(">II", message.data[:8])
        head, rest = message.data[8 : 8 + length], message.data[8 + length :]
        if kind == TEXT:
            run.texts.append((head.decode(), rest.decode()))
        elif kind == PREVIEW:
            run.previews.append((json.loads(head)["display_node_id"], rest))


@contextmanager
def comfy_process(checkout: Path, python: str, base: Path, environment: Mapping[str, str]) -> Iterator[Comfy]:
    """ComfyUI on a free port, with the custom nodes of `base`."""
    log = base / "comfyui.log"
    line = [python, "-u", "main.py", "--cpu", "--base-directory", str(base), "--port", str(free_port())]
    line += ["--disable-auto-launch", "--disable-api-nodes", "--log-stdout"]
    with (
        log.open("w", encoding="utf-8") as said,
        signals.start(
            line, cwd=checkout, stdout=said, stderr=subprocess.STDOUT, env={**os.environ, **environment}
        ) as process,
    ):
        try:
            deadline_s = time.monotonic() + START_S
            while (ready := STARTED.search(log.read_text(encoding="utf-8"))) is None:
                assert process.poll() is None, log.read_text(encoding="utf-8")[-3000:]
                assert time.monotonic() < deadline_s, f"ComfyUI did not start within {START_S:g} s"
                time.sleep(0.2)
            yield Comfy(ready[1], base, process)
        finally:
            process.kill()


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
