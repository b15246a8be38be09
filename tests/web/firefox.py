"""Firefox without a screen, driven by WebDriver BiDi (https://w3c.github.io/webdriver-bidi/) over its own port.

Playwright asks Firefox for commands that Debian's, an extended support release, does not know yet.
"""

import asyncio
import base64
import json
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp

LISTENS = re.compile(r"WebDriver BiDi listening on (ws://\S+)")
START_S = 60.0
PATIENCE_S = 120.0
PREFERENCES = {"intl.accept_languages": "en-GB", "datareporting.policy.dataSubmissionEnabled": False}


class Firefox:
    """One page. What it writes into its console and whom it asks are in `said` and `asked`."""

    def __init__(self, loop: asyncio.AbstractEventLoop, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._loop, self._socket = loop, socket
        self._sent = 0
        self.said: list[str] = []
        self.asked: list[str] = []
        self.call("session.new", capabilities={})
        self._page = str(self.call("browsingContext.create", type="tab")["context"])
        self.call("session.subscribe", events=["log.entryAdded", "network.beforeRequestSent"])
        self.call("browsingContext.setViewport", context=self._page, viewport={"width": 1360, "height": 900})

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """The command's result. Events that come meanwhile are kept."""
        return self._loop.run_until_complete(asyncio.wait_for(self._call(method, params), PATIENCE_S))

    async def _call(self, method: str, params: dict[str, Any]) -> dict[str, Any]:
        self._sent += 1
        await self._socket.send_json({"id": self._sent, "method": method, "params": params})
        while True:
            message = await self._socket.receive_json()
            if message.get("id") == self._sent:
                assert message["type"] == "success", f"{method}: {message.get('error')}: {message.get('message')}"
                return dict(message["result"])
            self._heard(message)

    def _heard(self, event: dict[str, Any]) -> None:
        params = event.get("params", {})
        if event.get("method") == "log.entryAdded" and params["level"] in ("error", "warn"):
            self.said.append(str(params["text"]))
        elif event.get("method") == "network.beforeRequestSent":
            self.asked.append(str(params["request"]["url"]))

    def go(self, url: str) -> None:
        self.call("browsingContext.navigate", context=self._page, url=url, wait="complete")

    def evaluate(self, expression: str) -> Any:
        """Of what JSON can say."""
        answer = self.call(
            "script.evaluate",
            expression=f"(async () => JSON.stringify(await ({expression})))()",
            target={"context": self._page},
            awaitPromise=True,
        )
        assert answer["type"] == "success", answer["exceptionDetails"]["text"]
        return json.loads(answer["result"].get("value", "null"))

    def until(self, expression: str) -> Any:
        """Waits until the expression is true on the page; its value."""
        deadline_s = time.monotonic() + PATIENCE_S
        while not (value := self.evaluate(expression)):
            assert time.monotonic() < deadline_s, f"waited {PATIENCE_S:g} s for {expression}"
            time.sleep(0.1)
        return value

    def click(self, element: str) -> None:
        """In the middle of what the expression names."""
        self.until(f"Boolean({element})")
        x, y = self.evaluate(
            f"(() => {{ const e = {element}; e.scrollIntoView({{ block: 'center' }}); "
            "const r = e.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        moves = [
            {"type": "pointerMove", "x": round(x), "y": round(y)},
            {"type": "pointerDown", "button": 0},
            {"type": "pointerUp", "button": 0},
        ]
        source = {"type": "pointer", "id": "mouse", "actions": moves}
        self.call("input.performActions", context=self._page, actions=[source])

    def type(self, text: str) -> None:
        """Where the focus is."""
        keys = [{"type": kind, "value": letter} for letter in text for kind in ("keyDown", "keyUp")]
        self.call("input.performActions", context=self._page, actions=[{"type": "key", "id": "keys", "actions": keys}])

    def choose_file(self, selector: str, path: Path) -> None:
        [node] = self.call(
            "browsingContext.locateNodes", context=self._page, locator={"type": "css", "value": selector}
        )["nodes"]
        element = {"sharedId": node["sharedId"]}
        self.call("input.setFiles", context=self._page, element=element, files=[str(path)])

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("browsingContext.captureScreenshot", context=self._page)["data"]))


@contextmanager
def firefox(program: str, profile: Path) -> Iterator[Firefox]:
    """With a new profile in a folder that is there."""
    lines = [f"user_pref({json.dumps(name)}, {json.dumps(value)});\n" for name, value in PREFERENCES.items()]
    (profile / "user.js").write_text("".join(lines), encoding="utf-8")
    log = profile / "firefox.log"
    line = [program, "--headless", "--remote-debugging-port=0", "--profile", str(profile)]
    with log.open("w", encoding="utf-8") as said, subprocess.Popen(line, stdout=said, stderr=said) as process:
        loop = asyncio.new_event_loop()
        try:
            address = _address(process, log)
            session = loop.run_until_complete(_session())
            try:
                socket = loop.run_until_complete(session.ws_connect(f"{address}/session", max_msg_size=0))
                yield Firefox(loop, socket)
            finally:
                loop.run_until_complete(session.close())
        finally:
            loop.close()
            process.kill()


async def _session() -> aiohttp.ClientSession:
    return aiohttp.ClientSession()


def _address(process: "subprocess.Popen[bytes]", log: Path) -> str:
    deadline_s = time.monotonic() + START_S
    while (found := LISTENS.search(log.read_text(encoding="utf-8", errors="replace"))) is None:
        assert process.poll() is None, log.read_text(encoding="utf-8", errors="replace")[-2000:]
        assert time.monotonic() < deadline_s, f"Firefox did not listen within {START_S:g} s"
        time.sleep(0.1)
    return found[1]
