"""Which endpoint a --url is, and what the command line says of the way there."""

import argparse
import os
import re
import ssl
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from stepvideo_client.address import is_loopback
from stepvideo_client.connection_options import client_of, headers_of
from stepvideo_client.errors import InvalidInput
from stepvideo_client.evaluation.endpoint import Endpoint, GrpcEndpoint
from stepvideo_client.evaluation.gateway_endpoint import GatewayEndpoint
from stepvideo_client.evaluation.gateway_http import KEY_VARIABLE, SCHEMES, GatewayHttp, gateway_address

_AUTHORIZATION: Final = "Authorization"
_NAME: Final = re.compile(r"[\w!#$%&'*+.^`|~-]+", re.ASCII)


@dataclass
class Endpoints:
    """Opens connections with the options of a command line. A way that is not encrypted is warned of once."""

    args: argparse.Namespace
    _warned: set[str] = field(default_factory=set)

    def open(self, url: str) -> Endpoint:
        """A connection of its own to a server (HOST[:PORT]) or a gateway (http(s)://...). Raises InvalidInput."""
        warn = url not in self._warned
        self._warned.add(url)
        idle_timeout_s: float = self.args.idle_timeout
        if not is_gateway(url):
            return GrpcEndpoint(url, client_of(self.args, url, idle_timeout_s, warn=warn))
        if not idle_timeout_s > 0:
            raise InvalidInput(f"The idle timeout must be more than 0 seconds, got {idle_timeout_s}.")
        address = gateway_address(url)
        headers = _headers(self.args)
        if warn and address.scheme == "http" and not is_loopback(address.hostname or ""):
            sent = ", ".join(["prompts", "images", "videos", *(f"the header {name}" for name in headers)])
            print(
                f"stepvideo: warning: Calls to {url} are not encrypted, others can read {sent} on the way: use https, "
                "or a tunnel to 127.0.0.1.",
                file=sys.stderr,
            )
        calls = GatewayHttp(url, headers, _tls(self.args, address.scheme), idle_timeout_s)
        return GatewayEndpoint(url, calls, idle_timeout_s)


def is_gateway(url: str) -> bool:
    """Whether it is the address of a gateway."""
    return url.lower().startswith(SCHEMES)


def refuse_undeliverable(
    urls: Sequence[str], latents: bool, negative_prompt: str | None, positive_suffix: str | None
) -> None:
    """Raises InvalidInput for what the Videos API has no words for, where one of the urls is a gateway's."""
    through = next((url for url in urls if is_gateway(url)), None)
    wanted = (
        ("LATENTS (--latents, and compare's --price-file and --max-latent-error)", latents),
        ("an empty negative prompt", negative_prompt == ""),
        ("--positive-suffix", positive_suffix is not None),
    )
    for what, is_wanted in wanted:
        if through is not None and is_wanted:
            raise InvalidInput(
                f"The gateway {through} does not deliver {what}: leave that out, or name the servers as HOST:PORT."
            )


def _headers(args: argparse.Namespace) -> dict[str, str]:
    """Those of --header, and the API key of the environment. Raises InvalidInput."""
    headers: dict[str, str] = headers_of(args)
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if key and _AUTHORIZATION.lower() not in {name.lower() for name in headers}:
        headers[_AUTHORIZATION] = f"Bearer {key}"
    for name, value in headers.items():
        if not (_NAME.fullmatch(name) and value.isascii() and value.isprintable()):
            where = f"{KEY_VARIABLE}" if name == _AUTHORIZATION else f"--header {name!r}"
            raise InvalidInput(f"{where} must be a header of HTTP, of printable ASCII characters, it has others.")
    return headers


def _tls(args: argparse.Namespace, scheme: str) -> ssl.SSLContext | None:
    """None for http. Raises InvalidInput for files that cannot be used."""
    given = (args.root_certificates, args.private_key, args.certificate_chain)
    if scheme == "http":
        if args.tls or any(given):
            raise InvalidInput("--tls and its files are for encrypted ways, got a gateway at http://: write https://.")
        return None
    try:
        context = ssl.create_default_context(cafile=args.root_certificates)
        if args.certificate_chain is not None or args.private_key is not None:
            context.load_cert_chain(args.certificate_chain or args.private_key, args.private_key)
    except OSError as error:  # ssl.SSLError is one
        shown = ", ".join(str(path) for path in given if path is not None)
        raise InvalidInput(f"The PEM files {shown} cannot be used: {error.strerror or error}.") from error
    return context
