"""The one reading of network addresses: of what listens, what asks, and what is told where a server is."""

import contextlib
import ipaddress
import socket

from stepvideo_serve.errors import SetupError

HIGHEST_PORT = 65535


def host_port(text: str, default_port: int) -> tuple[str, int]:
    """HOST:PORT, HOST, [IPV6]:PORT, [IPV6] or IPV6, as host (without brackets) and port. Raises SetupError."""
    wrong = SetupError(f"An address must be HOST:PORT, or [HOST]:PORT for IPv6, got {text!r}: correct it.")
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
    if not 1 <= int(port) <= HIGHEST_PORT:
        raise SetupError(f"A port must be 1 to {HIGHEST_PORT}, got {port} in {text!r}: correct it.")
    return host, int(port)


def joined(host: str, port: int) -> str:
    """HOST:PORT, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def ip_of(name: str) -> str:
    """The IP address to listen on for an address or a name, IPv4 where a name has both. Raises SetupError.

    Triton's HTTP server takes a name for 255.255.255.255, so names are resolved before it gets them.
    """
    bare = name[1:-1] if name.startswith("[") and name.endswith("]") else name
    try:
        return str(ipaddress.ip_address(bare))
    except ValueError:
        pass
    try:
        found = {entry[0]: str(entry[4][0]) for entry in socket.getaddrinfo(bare, None, type=socket.SOCK_STREAM)}
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not a name"
        raise SetupError(
            f"--address must be an IP address of this machine or a name with one, got {name!r} ({reason}): correct it."
        ) from None
    return found.get(socket.AF_INET) or found[socket.AF_INET6]


def _family_of(ip: str) -> socket.AddressFamily:
    """Of an IP address."""
    return socket.AF_INET6 if _is_ipv6(ip) else socket.AF_INET


def from_here(ip: str) -> str:
    """Where a caller on this machine reaches what listens on `ip`."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(ip, ip)


def for_grpc(ip: str) -> str:
    """As Triton's option for gRPC takes the address."""
    return f"[{ip}]" if _is_ipv6(ip) else ip


def for_http(ip: str) -> str:
    """As Triton's options for HTTP and metrics take the address: without the prefix it listens on 255.255.255.255."""
    return f"ipv6:{ip}" if _is_ipv6(ip) else ip


def choose_ports(places: dict[str, tuple[str, int]]) -> list[int]:
    """The port for each name's address and port; 0 becomes a free port. SetupError for a port that is in use."""
    chosen = []
    with contextlib.ExitStack() as held:  # all at once, so that the free ones differ
        for name, (address, port) in places.items():
            probe = held.enter_context(socket.socket(_family_of(address), socket.SOCK_STREAM))
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # the waiting sockets of a past server are fine
            try:
                probe.bind((address, port))
                probe.listen(1)  # two probes may bind to one port, but not listen
            except OSError as error:
                raise SetupError(
                    f"The {name} port must be free, but {joined(address, port)} cannot be used ({error.strerror}): "
                    f"choose another with --{name.lower()}-port, or 0 for any."
                ) from None
            chosen.append(probe.getsockname()[1])
    return chosen


def _is_ipv6(text: str) -> bool:
    try:
        return ipaddress.ip_address(text).version == 6
    except ValueError:
        return False
