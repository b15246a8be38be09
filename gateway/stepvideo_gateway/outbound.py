"""Connections that the gateway makes for others: only to addresses of the public internet, unless allowed."""

import asyncio
import ipaddress
import socket
from dataclasses import dataclass
from typing import Final
from urllib.parse import SplitResult, urlsplit

import httpx2

SCHEMES: Final = {"http": 80, "https": 443}
TIMEOUT_S: Final = 10.0


class NotAllowed(Exception):
    """The address must not be asked; the sentence says why."""


@dataclass(frozen=True)
class Target:
    """An address that may be asked: of the url, what stands in for its host, and the host's own name."""

    url: httpx2.URL
    host: str


async def target_of(url: str, allow_private: bool) -> Target:
    """Looks the host up, once: the connection goes to the very address that was looked at. Raises NotAllowed."""
    try:
        parts: SplitResult = urlsplit(url)
        port = parts.port or SCHEMES.get(parts.scheme, 0)
    except ValueError as error:
        raise NotAllowed(f"the address is malformed ({error})") from None
    if parts.scheme not in SCHEMES or not parts.hostname or parts.username is not None:
        raise NotAllowed("the address must be http:// or https:// with a host, without a user")
    try:
        found = await asyncio.get_running_loop().getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise NotAllowed(f"the host {parts.hostname} is not known") from None
    address = ipaddress.ip_address(found[0][4][0])
    mapped = getattr(address, "ipv4_mapped", None) or address
    if not allow_private and not mapped.is_global:
        raise NotAllowed(f"the host {parts.hostname} is {mapped}, which is not on the public internet")
    return Target(httpx2.URL(url).copy_with(host=str(address), port=port), parts.netloc)


async def ask(
    client: httpx2.AsyncClient, method: str, target: Target, headers: dict[str, str], body: bytes, most_bytes: int
) -> tuple[int, str, bytes]:
    """Status, content type and content of the answer; redirects are not followed. Raises NotAllowed for an answer that
    is larger than `most_bytes`, and httpx2.HTTPError."""
    name = target.host.rsplit("@", 1)[-1]
    host = urlsplit(f"//{name}").hostname or name
    request = client.build_request(
        method, target.url, headers={**headers, "host": name}, content=body, extensions={"sni_hostname": host}
    )
    async with asyncio.timeout(TIMEOUT_S):
        answer = await client.send(request, stream=True, follow_redirects=False)
        try:
            content = bytearray()
            async for part in answer.aiter_bytes():
                content += part
                if len(content) > most_bytes:
                    raise NotAllowed(f"the answer has more than {most_bytes} bytes")
        finally:
            await answer.aclose()
    return answer.status_code, answer.headers.get("content-type", ""), bytes(content)
