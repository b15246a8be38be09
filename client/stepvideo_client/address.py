"""Where a server is: HOST:PORT as callers write it, and what stands between here and there."""

import ipaddress
import os
from collections.abc import Collection, Mapping

from stepvideo_client.errors import InvalidInput

DEFAULT_PORT = 8001
_HIGHEST_PORT = 65535
_PROXIES = ("grpc_proxy", "https_proxy", "http_proxy")  # in the order in which gRPC looks
_EXCEPTIONS = ("no_grpc_proxy", "no_proxy")


def host_port(text: str, default_port: int = DEFAULT_PORT) -> tuple[str, int]:
    """HOST:PORT, HOST, [IPV6]:PORT, [IPV6] or IPV6, as host (without brackets) and port. Raises InvalidInput."""
    if "://" in text:
        raise InvalidInput(f"The url must be host:port without a scheme, got {text!r}.")
    wrong = InvalidInput(f"The url must be host:port, or [host]:port for IPv6, got {text!r}.")
    if _is_ipv6(text):
        return text, default_port
    if text.startswith("["):
        host, bracket, rest = text[1:].partition("]")
        if not bracket or not _is_ipv6(host) or (rest and not rest.startswith(":")):
            raise wrong
        port = rest[1:] if rest else str(default_port)
    else:
        host, colon, port = text.partition(":")
        port = port if colon else str(default_port)
    if not host or any(mark in host for mark in "/@ ") or not (port.isascii() and port.isdigit()):
        raise wrong
    if not 1 <= int(port) <= _HIGHEST_PORT:
        raise InvalidInput(f"The url's port must be 1 to {_HIGHEST_PORT}, got {port} in {text!r}.")
    return host, int(port)


def joined(host: str, port: int) -> str:
    """HOST:PORT, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_loopback(host: str) -> bool:
    """Whether the host is this machine, which no proxy leads to."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def clear_text_warning(url: str, encrypted: bool, headers: Collection[str]) -> str | None:
    """A sentence about what other machines can read of calls to `url` (HOST:PORT); None for encrypted calls, and for
    those that stay on this machine. `headers`: the names of those that are sent."""
    if encrypted or is_loopback(host_port(url)[0]):
        return None
    sent = ", ".join(["prompts", "images", "videos", *(f"the header {name}" for name in headers)])
    return (
        f"Calls to {url} are not encrypted, others can read {sent} on the way: use TLS (--tls, --root-certificates; "
        "tls=True in Python) with a server that has a certificate, or a tunnel to 127.0.0.1."
    )


def proxy_for(host: str, environ: Mapping[str, str] = os.environ) -> str | None:
    """NAME=VALUE of the variable that sends calls to `host` through a proxy; None where they go straight."""
    if is_loopback(host):
        return None
    excepted = next((environ[name] for name in _EXCEPTIONS if environ.get(name)), "")
    if any(entry.strip() and host.endswith(entry.strip()) for entry in excepted.split(",")):
        return None
    return next((f"{name}={environ[name]}" for name in _PROXIES if environ.get(name)), None)


def _is_ipv6(text: str) -> bool:
    try:
        return ipaddress.ip_address(text).version == 6
    except ValueError:
        return False
