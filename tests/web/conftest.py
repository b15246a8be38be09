"""The web page in a real Chromium, in front of a real gateway, Triton and the toy world's checkpoint.

Debian's Chromium is driven by Playwright, which downloads nothing. Every test fails if the page writes an error into
the console, or asks any host but its gateway. Screenshots go to out/web.
"""

import io
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
import pytest
from playwright.sync_api import Browser, BrowserContext, Page, Request, expect, sync_playwright

from stepvideo_serve.launch.server import TritonServer
from tests import signals
from tests.gateway.conftest import READY, environment, until
from tests.server_deaths import WatchServer
from tests.serving.launch import serving
from toyworld.first_image import centred_scene
from toyworld.samples import first_image, png

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
PROMPT = "红色圆形向右移动。"
PATIENCE_MS = 120_000  # the machine may be busy
CONFIG = """
[listen]
port = {port}
[servers]
urls = ["{server}"]
[jobs]
lease_s = 3.0
database = "sqlite+aiosqlite:///jobs.sqlite"
folder = "videos"
[api]
require_key = {require_key}
"""
# A video of a second or two, for what a test needs besides what it is about.
QUICK: dict[str, Any] = {"num_frames": 17, "size": "64x64", "num_inference_steps": 2}


@dataclass
class Site:
    """A gateway whose page is looked at; `kill` and `start` are a power cut and its end."""

    root: Path
    folder: Path
    server: str
    picture: bytes
    port: int
    require_key: bool = False
    process: "subprocess.Popen[str] | None" = None
    key: str = "none"
    clients: list[openai.OpenAI] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def line(self, *more: str) -> list[str]:
        return [sys.executable, "-m", "stepvideo_gateway", "--config", str(self.folder / "gateway.toml"), *more]

    def start(self, ready: bool = True) -> None:
        picture = self.folder / "example.png"
        picture.write_bytes(self.picture)
        text = CONFIG.format(port=self.port, server=self.server, require_key=str(self.require_key).lower())
        (self.folder / "gateway.toml").write_text(text, encoding="utf-8")
        with (self.folder / "gateway.log").open("a", encoding="utf-8") as said:
            line = self.line("--example", str(picture), PROMPT)
            where = {"cwd": self.root, "stdout": subprocess.PIPE, "stderr": said, "env": environment(self.root)}
            self.process = signals.start(line, **where)
        assert self.process.stdout is not None
        assert READY.match(self.process.stdout.readline()), (self.folder / "gateway.log").read_text()[-2000:]
        if ready:
            until(lambda: self.health()["well"], "the server to be seen")

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            assert self.process.stdout is not None
            self.process.stdout.close()
            self.process = None

    def health(self) -> dict[str, Any]:
        try:
            with urllib.request.urlopen(f"{self.url}/health") as answer:
                return dict(json.load(answer))
        except urllib.error.HTTPError as error:
            return dict(json.load(error))

    def client(self) -> openai.OpenAI:
        self.clients.append(openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.key, max_retries=0))
        return self.clients[-1]

    def make(self, prompt: str = PROMPT, wait: bool = True, picture: bytes | None = None, **more: Any) -> Any:
        """A video by the API, not by the page."""
        options = {**QUICK, **more}
        size = options.pop("size")
        reference = ("first.png", picture or self.picture, "image/png")
        client = self.client()
        video = client.videos.create(prompt=prompt, input_reference=reference, size=size, extra_body=options)
        return client.videos.poll(video.id, poll_interval_ms=300) if wait else video

    def empty(self) -> None:
        """Without videos, as at first."""
        client = self.client()
        for video in client.videos.list(limit=100).data:
            client.videos.delete(video.id)

    def close(self) -> None:
        for client in self.clients:
            client.close()
        self.kill()


@pytest.fixture(scope="session")
def triton(root: Path, tmp_path_factory: pytest.TempPathFactory, watch: WatchServer) -> Iterator[TritonServer]:
    """The server of `make web`, with the checkpoint as it is in place of graphs made from it."""
    text = (root / "serve.toml").read_text(encoding="utf-8")
    for before, after in (
        ('dir = "toyworld/checkpoint"', f'dir = "{root}/toyworld/checkpoint"'),
        ('engines_dir = "build/toyworld"', 'engines_dir = "none"'),
        ('backend = "ort"', 'backend = "eager"'),
    ):
        assert before in text
        text = text.replace(before, after)
    with serving(root, tmp_path_factory.mktemp("web_server"), text, watch) as running:
        yield running


@pytest.fixture(scope="session")
def picture() -> bytes:
    """What the toy world knows how to move."""
    return png(first_image(centred_scene("circle", "red", 0)))


@pytest.fixture(scope="session")
def sites(
    root: Path, triton: TritonServer, picture: bytes, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., Site]]:
    """Makes gateways, which are not started yet."""
    with ExitStack() as stack:

        def make(require_key: bool = False) -> Site:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            site = Site(root, tmp_path_factory.mktemp("site"), triton.grpc_url, picture, port, require_key)
            stack.callback(site.close)
            return site

        yield make


@pytest.fixture(scope="session")
def common_site(sites: Callable[..., Site]) -> Site:
    site = sites()
    site.start()
    return site


@pytest.fixture
def site(common_site: Site) -> Site:
    """A gateway without videos."""
    common_site.empty()
    return common_site


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Chromium; tests are skipped without one, and fail in CI."""
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        reason = "needs a browser: apt-get install chromium"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    fake = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=found, args=[*fake, *sandbox])
        yield launched
        launched.close()


@dataclass
class Visit:
    """What a page did that it should not have done."""

    home: str
    errors: list[str] = field(default_factory=list)
    strangers: list[str] = field(default_factory=list)
    expected: tuple[str, ...] = ()

    def watch(self, context: BrowserContext) -> None:
        context.on("request", self._asked)
        context.on("weberror", lambda error: self.errors.append(str(error.error)))
        context.on("console", lambda message: self._said(message.type, message.text))

    def _asked(self, request: Request) -> None:
        if not request.url.startswith((self.home, "data:", "blob:")):
            self.strangers.append(request.url)

    def _said(self, kind: str, text: str) -> None:
        if kind in ("error", "warning") and not any(part in text for part in self.expected):
            self.errors.append(text)

    def check(self) -> None:
        assert not self.errors
        assert not self.strangers


Open = Callable[..., Page]


@pytest.fixture
def visits() -> Iterator[list[Visit]]:
    found: list[Visit] = []
    yield found
    for visit in found:
        visit.check()


@pytest.fixture
def opened(browser: Browser, visits: list[Visit]) -> Iterator[Open]:
    """Opens a site's page in a browser of its own. `expected`: parts of errors that this test causes."""
    with ExitStack() as stack:

        def open_page(
            site: Site,
            *,
            language: str = "en-GB",
            width: int = 1360,
            height: int = 900,
            expected: tuple[str, ...] = (),
            **more: Any,
        ) -> Page:
            more = {"reduced_motion": "no-preference", "accept_downloads": True, **more}
            context = browser.new_context(locale=language, viewport={"width": width, "height": height}, **more)
            stack.callback(context.close)
            context.set_default_timeout(PATIENCE_MS)
            visit = Visit(site.url, expected=expected)
            visit.watch(context)
            visits.append(visit)
            page = context.new_page()
            page.goto(site.url)
            return page

        expect.set_options(timeout=PATIENCE_MS)
        yield open_page


@pytest.fixture(scope="session")
def album(root: Path) -> Path:
    folder = root / "out" / "web"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def film(size: tuple[int, int], colours: int = 1) -> bytes:
    """A PNG that is not the example: grey with a bright middle."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", size, (90, 110, 130))
    width, height = size
    for index in range(colours):
        side = min(size) // (3 + index)
        box = ((width - side) // 2, (height - side) // 2, (width + side) // 2, (height + side) // 2)
        ImageDraw.Draw(image).ellipse(box, fill=(220, 180 - 30 * index, 60))
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def patiently(condition: Callable[[], Any], what: str, page: Page, patience_s: float = 120.0) -> None:
    """Waits as `until` does, while the page goes on."""
    deadline_s = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < deadline_s, f"waited {patience_s:g} s for {what}"
        page.wait_for_timeout(100)


def holds(page: Page, expression: str) -> None:
    """Waits until the expression is true on the page. (Playwright's own way evaluates text, which the page forbids.)"""
    patiently(lambda: page.evaluate(expression), expression, page)
