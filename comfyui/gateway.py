"""The gateway's HTTP interface, as far as the nodes need it."""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import quote

import aiohttp

from .address import Address
from .errors import Away, Refused, Unready

CONNECT_S = 10.0
ANSWER_S = 60.0  # between two parts of an answer
MAX_EVENT_BYTES = 32 * 2**20
UNAVAILABLE = (500, 502, 503, 504)


class Gateway:
    """One gateway. Every method raises Away where nobody answers, or no server is there, and else Refused."""

    def __init__(self, address: Address, session: aiohttp.ClientSession) -> None:
        self.address, self._session = address, session

    async def create(self, fields: Mapping[str, str], picture: bytes, key: str) -> dict[str, Any]:
        """The video object of a new job, or of the one that came before with the same key."""
        return await self._json("POST", "/v1/videos", data=_form(fields, picture), headers={"Idempotency-Key": key})

    async def quote(self, fields: Mapping[str, str], picture: bytes) -> dict[str, Any]:
        """What such a video would take, and how long it would wait."""
        return await self._json("POST", "/v1/quotes", data=_form(fields, picture))

    async def delete(self, video_id: str) -> None:
        """Ends the run within a step and removes everything of it; a video that is gone already is none the worse."""
        try:
            await self._json("DELETE", f"/v1/videos/{quote(video_id)}")
        except Refused as error:
            if error.status != 404:
                raise

    async def content(self, video_id: str) -> bytes:
        """The mp4."""
        return await self._bytes("GET", f"/v1/videos/{quote(video_id)}/content")

    async def is_well(self) -> bool:
        """Whether the gateway has a server that is ready; True where a proxy does not let anybody ask. Raises Away
        where nobody answers."""
        try:
            return bool((await self._json("GET", "/health")).get("well"))
        except Unready:
            return False
        except Refused:
            return True

    async def events(self, video_id: str, quiet_s: float) -> AsyncIterator[tuple[str, dict[str, Any]]]:
        """Name and data of a video's events. Ends with the stream, and after `quiet_s` without any."""
        path = f"/v1/videos/{quote(video_id)}/events"
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=quiet_s)
        async with self._answer("GET", path, timeout=timeout) as response:
            name, rest = "", b""
            try:
                async for part in response.content.iter_any():
                    *lines, rest = (rest + part).split(b"\n")
                    for line in lines:
                        if line.startswith(b"event:"):
                            name = line[6:].strip().decode()
                        elif line.startswith(b"data:"):
                            yield name, _object(line[5:])
                    if len(rest) > MAX_EVENT_BYTES:
                        raise Away(f"The gateway at {self.address.url} sent an event without an end.")
            except TimeoutError:
                return

    async def _json(self, method: str, path: str, **more: Any) -> dict[str, Any]:
        return _object(await self._bytes(method, path, **more))

    async def _bytes(self, method: str, path: str, **more: Any) -> bytes:
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=ANSWER_S)
        async with self._answer(method, path, timeout=timeout, **more) as response:
            return await response.read()

    @asynccontextmanager
    async def _answer(self, method: str, path: str, **more: Any) -> AsyncIterator[aiohttp.ClientResponse]:
        """An answer that is no error. Redirects are not followed: a key goes to the address that was given."""
        url = f"{self.address.url}{path}"
        try:
            async with self._session.request(method, url, allow_redirects=False, **more) as response:
                if response.status >= 300:
                    raise _error(response.status, await response.read(), self.address.url)
                yield response
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            reason = str(error) or type(error).__name__
            raise Away(f"The gateway at {self.address.url} does not answer: {reason}.") from error


@asynccontextmanager
async def connected(address: Address) -> AsyncIterator[Gateway]:
    """A gateway; its connections are closed at the end."""
    headers = {"Authorization": f"Bearer {address.key}"} if address.key else {}
    async with aiohttp.ClientSession(headers=headers) as session:
        yield Gateway(address, session)
        await asyncio.sleep(0)  # lets the connections close


def _form(fields: Mapping[str, str], picture: bytes) -> aiohttp.FormData:
    form = aiohttp.FormData()
    for name, value in fields.items():
        form.add_field(name, value)
    form.add_field("input_reference", picture, filename="first.png", content_type="image/png")
    return form


def _object(text: bytes) -> dict[str, Any]:
    try:
        read = json.loads(text)
    except ValueError:
        read = None
    if not isinstance(read, dict):
        raise Away(
            f"The gateway must answer with a JSON object, got {text[:60]!r}: see that the address is a gateway's."
        )
    return read


def _error(status: int, body: bytes, url: str) -> Refused | Away:
    """What the gateway says is wrong, in its own sentence."""
    try:
        said = json.loads(body)["error"]
        sentence, code = str(said["message"]), str(said.get("code") or "")
    except (ValueError, KeyError, TypeError, AttributeError):
        sentence, code = f"The gateway at {url} answered with HTTP {status}: see that the address is a gateway's.", ""
    return Unready(sentence) if status in UNAVAILABLE else Refused(sentence, status, code)
