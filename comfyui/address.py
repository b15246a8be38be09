"""Where the gateway is, and with which key.

A workflow, and every video that ComfyUI saves, carries the values of its nodes. So a key can come from the environment
of ComfyUI instead. It is then sent to the address in the environment only: a workflow of somebody else, with an address
of his, does not get it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from .errors import BadInput

URL_VARIABLE = "STEPVIDEO_URL"
KEY_VARIABLE = "STEPVIDEO_API_KEY"
DEFAULT_URL = "http://127.0.0.1:8010"


@dataclass(frozen=True)
class Address:
    """`url`: of the gateway, without a slash at its end; `key`: of its API, or empty; `idle_timeout_s`: how long it may
    give no sign of life."""

    url: str
    key: str = field(repr=False)
    idle_timeout_s: float


def address_of(url: str, key: str, idle_timeout_s: float, environment: Mapping[str, str]) -> Address:
    """The address that a node's inputs and the environment mean. Raises BadInput."""
    own = _cleaned(environment.get(URL_VARIABLE, "") or DEFAULT_URL)
    chosen = _cleaned(url) if url.strip() else own
    if not key.strip() and chosen == own:
        key = environment.get(KEY_VARIABLE, "")
    key = key.strip()
    if not key.isascii() or not key.isprintable():
        raise BadInput("api_key must be printable ASCII characters, got others: copy the key again.")
    return Address(chosen, key, idle_timeout_s)


def _cleaned(url: str) -> str:
    text = url.strip().rstrip("/").removesuffix("/v1")
    try:
        parts = urlsplit(text)
        well_formed = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        well_formed = False
    if not well_formed:
        raise BadInput(f"url must be the gateway's address such as {DEFAULT_URL}, got {url.strip()[:80]!r}.")
    return text
