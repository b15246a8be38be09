"""The connection options of the command line, and the clients that they ask for."""

import argparse
import sys
import warnings
from pathlib import Path

from stepvideo_client.client import Client
from stepvideo_client.errors import ClearTextWarning, InvalidInput


def add_connection_arguments(parser: argparse.ArgumentParser, *, several: bool = False) -> None:
    """--url and what goes with it; `several`: --url takes one or more, and `url` is a list."""
    group = parser.add_argument_group("connection")
    if several:
        about = "gRPC endpoints, or gateways as http(s)://HOST[:PORT] (127.0.0.1:8001)"
        group.add_argument("--url", nargs="+", default=["127.0.0.1:8001"], metavar="HOST[:PORT]", help=about)
    else:
        about = "gRPC endpoint (127.0.0.1:8001)"
        group.add_argument("--url", default="127.0.0.1:8001", metavar="HOST[:PORT]", help=about)
    group.add_argument("--header", action="append", default=[], metavar="NAME=VALUE", help="sent with every call")
    group.add_argument("--tls", action="store_true", help="encrypt; implied by the three files")
    group.add_argument("--root-certificates", type=Path, metavar="PEM")
    group.add_argument("--private-key", type=Path, metavar="PEM")
    group.add_argument("--certificate-chain", type=Path, metavar="PEM")


def headers_of(args: argparse.Namespace) -> dict[str, str]:
    """The headers given by --header, by name. Raises InvalidInput."""
    headers = {}
    for header in args.header:
        name, separator, value = header.partition("=")
        if not separator or not name:
            raise InvalidInput(f"--header must be NAME=VALUE, got {header!r}.")
        headers[name] = value
    return headers


def client_of(args: argparse.Namespace, url: str, idle_timeout_s: float | None, *, warn: bool = True) -> Client:
    """A client of the server at `url`, with the other connection options. warn: of clear text, on standard error.
    Raises InvalidInput."""
    headers = headers_of(args)
    with warnings.catch_warnings(record=True, action="always", category=ClearTextWarning) as caught:
        client = Client(
            url,
            idle_timeout_s=idle_timeout_s,
            headers=headers,
            tls=args.tls,
            root_certificates=args.root_certificates,
            private_key=args.private_key,
            certificate_chain=args.certificate_chain,
        )
    for warning in caught if warn else ():
        print(f"stepvideo: warning: {warning.message}", file=sys.stderr)
    return client
