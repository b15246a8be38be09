"""How to start the server, and the command line's options for it."""

import argparse
from dataclasses import dataclass, field
from pathlib import Path

from stepvideo_serve.server_security import ServerSecurity, add_security_arguments, from_arguments


@dataclass(frozen=True)
class ServerOptions:
    """How to start the server. A port of 0 means any free port; `log` None leaves the log on standard error.

    exit_timeout_s is how long the server lets requests in flight finish when it is stopped.
    allow_outdated lets a release with known vulnerabilities listen on other addresses than loopback.
    `security`: TLS, and who may use the calls of operators; with TLS, HTTP stays on loopback whatever `address` says.
    model_control lets whoever has the operator key load and unload models; otherwise nobody may.
    `server_arguments` go to tritonserver as they are, after ours.
    """

    model_repository: Path
    config: Path | None = None
    address: str = "127.0.0.1"
    grpc_port: int = 0
    http_port: int = 0
    metrics_port: int = 0
    log: Path | None = None
    exit_timeout_s: int = 10
    allow_outdated: bool = False
    security: ServerSecurity = field(default_factory=ServerSecurity)
    model_control: bool = False
    server_arguments: tuple[str, ...] = ()


def add_server_arguments(parser: argparse.ArgumentParser, ports: tuple[int, int, int]) -> None:
    """The options that server_options reads; `ports`: the defaults for gRPC, HTTP and metrics."""
    add = parser.add_argument
    add("--config", type=Path, help="serve.toml, for the models")
    repository = Path(__file__).absolute().parents[1] / "model_repository"
    add("--model-repository", type=Path, default=repository, help="default: %(default)s")
    add("--address", default="127.0.0.1", help="to listen on; default: %(default)s, loopback")
    for port_name, port in zip(("grpc", "http", "metrics"), ports, strict=True):
        add(f"--{port_name}-port", type=int, default=port, help="0: any free; default: %(default)s")
    add("--allow-outdated-server", action="store_true", help="let an old release listen beyond loopback")
    add_security_arguments(parser)
    add("--log", type=Path, help="a file for the server's log; default: standard error")
    add("--exit-timeout", type=int, default=10, metavar="S", help="for requests in flight; %(default)s s")
    add("--ready-timeout", type=float, default=300.0, metavar="S", help="default: %(default)g s")
    add("--server-argument", action="append", default=[], metavar="--NAME=VALUE", help="passed on; may be repeated")


def server_options(arguments: argparse.Namespace) -> ServerOptions:
    """What the arguments of add_server_arguments say. Raises SetupError."""
    return ServerOptions(
        model_repository=arguments.model_repository,
        config=arguments.config,
        address=arguments.address,
        grpc_port=arguments.grpc_port,
        http_port=arguments.http_port,
        metrics_port=arguments.metrics_port,
        log=arguments.log,
        exit_timeout_s=arguments.exit_timeout,
        allow_outdated=arguments.allow_outdated_server,
        security=from_arguments(arguments),
        server_arguments=tuple(arguments.server_argument),
    )
