"""How to start the server, what protects its ports, and the command line's options for both.

Triton has TLS on gRPC alone. With a certificate, its HTTP port therefore listens on loopback only. The calls that
change the server (OPERATOR_CALLS) are always restricted: with a key file to those who send the key, without one to
nobody. Where gRPC asks for a certificate of its callers, HTTP, which cannot, is restricted in the same way: whoever is
on this machine gets the two answers about the server's health, and nothing else.
"""

import argparse
import re
import secrets
from dataclasses import dataclass, field
from pathlib import Path

from stepvideo_serve.errors import SetupError
from stepvideo_serve.launch.address import ip_of
from stepvideo_serve.launch.install import is_loopback

LOOPBACK = "127.0.0.1"
LOG_LEVELS = ("debug", "info", "warning", "error")
LOG_LEVEL_VARIABLE = "STEPVIDEO_LOG_LEVEL"
"""Tells the models and ranks the level that the start was given; each of LOG_LEVELS."""
READY_TIMEOUT_S = 3600.0  # 50 GB of engines from a slow disk, read, hashed and loaded; a start that fails ends sooner
OPERATOR_CALLS = ("model-repository", "shared-memory", "trace", "logging")
HTTP_CALLS = ("inference", "metadata", "model-config", "statistics")  # what others may call, but "health"
OPERATOR_HEADER = "stepvideo-operator-key"  # over HTTP
GRPC_OPERATOR_HEADER = f"triton-grpc-protocol-{OPERATOR_HEADER}"  # Triton's prefix
KEY = re.compile(r"[A-Za-z0-9_-]{32,256}")  # nothing that the server's command line could take apart


@dataclass(frozen=True)
class ServerSecurity:
    """Files that protect a server; all of them optional.

    certificate, private_key  PEM, the server's: gRPC is TLS only
    client_authority          PEM; gRPC callers must show a certificate of this authority (mutual TLS), and HTTP is for
                              operators
    operator_key              text file with the key of OPERATOR_CALLS: 32 to 256 letters, digits, _ or -

    Raises SetupError for files that do not go together, cannot be read, or are not what they should be.
    """

    certificate: Path | None = None
    private_key: Path | None = None
    client_authority: Path | None = None
    operator_key: Path | None = None
    _key: str = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if (self.certificate is None) != (self.private_key is None):
            raise SetupError("A certificate and its private key go together, got one of them: give both or neither.")
        if self.client_authority is not None and self.certificate is None:
            raise SetupError("A client authority needs the server's own certificate and key, got none: add them.")
        _check_pem("certificate", self.certificate, "CERTIFICATE")
        _check_pem("private key", self.private_key, "PRIVATE KEY")
        _check_pem("client authority", self.client_authority, "CERTIFICATE")
        key = secrets.token_urlsafe(32) if self.operator_key is None else _operator_key(self.operator_key)
        object.__setattr__(self, "_key", key)

    def http_address(self, address: str) -> str:
        """Where HTTP listens when gRPC listens on `address`: without TLS, so on loopback where gRPC has it."""
        return address if self.certificate is None or is_loopback(address) else LOOPBACK

    def warning(self, address: str) -> str | None:
        """A sentence about what is open to other machines without encryption; None if nothing is."""
        if self.certificate is not None or is_loopback(address):
            return None
        return f"gRPC and HTTP on {address} are not encrypted: add --grpc-certificate, or keep them behind a TLS proxy"

    @property
    def http_needs_key(self) -> bool:
        """Whether HTTP is for operators only, and for the probes of the server's own user (http_key.py)."""
        return self.client_authority is not None

    @property
    def operator_headers(self) -> dict[str, str]:
        """What an HTTP call of OPERATOR_CALLS must carry, and of HTTP_CALLS where HTTP needs a key."""
        return {OPERATOR_HEADER: self._key}

    def server_arguments(self) -> list[str]:
        """The arguments of tritonserver. The key is among them: whoever may list this machine's processes sees it."""
        calls = OPERATOR_CALLS + (HTTP_CALLS if self.http_needs_key else ())
        arguments = [
            f"--grpc-restricted-protocol={','.join(OPERATOR_CALLS)}:{OPERATOR_HEADER}={self._key}",
            f"--http-restricted-api={','.join(calls)}:{OPERATOR_HEADER}={self._key}",
        ]
        if self.certificate is not None and self.private_key is not None:
            arguments += [
                "--grpc-use-ssl=true",
                f"--grpc-server-cert={self.certificate.absolute()}",
                f"--grpc-server-key={self.private_key.absolute()}",
            ]
        if self.client_authority is not None:
            arguments += ["--grpc-use-ssl-mutual=true", f"--grpc-root-cert={self.client_authority.absolute()}"]
        return arguments


def add_security_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that from_arguments reads."""
    group = parser.add_argument_group("security")
    add = group.add_argument
    add("--grpc-certificate", type=Path, metavar="PEM", help="the server's: gRPC is TLS only, HTTP on loopback only")
    add("--grpc-private-key", type=Path, metavar="PEM", help="of the certificate")
    authority_help = "callers must show a certificate of this authority; HTTP is then for the operator key only"
    add("--grpc-client-authority", type=Path, metavar="PEM", help=authority_help)
    calls = ", ".join(OPERATOR_CALLS)
    add("--operator-key", type=Path, metavar="FILE", help=f"who sends its text may use: {calls}; default: nobody may")


def from_arguments(arguments: argparse.Namespace) -> ServerSecurity:
    """What the options say. Raises SetupError as ServerSecurity does."""
    return ServerSecurity(
        arguments.grpc_certificate,
        arguments.grpc_private_key,
        arguments.grpc_client_authority,
        arguments.operator_key,
    )


def _check_pem(what: str, path: Path | None, kind: str) -> None:
    if path is not None and not re.search(rf"^-----BEGIN ([A-Z0-9]+ )*{kind}-----", _read(what, path), re.MULTILINE):
        raise SetupError(f"The {what} must be a PEM file with a {kind}, but {path} has none: correct the path.")


def _operator_key(path: Path) -> str:
    key = _read("operator key", path).strip()
    if KEY.fullmatch(key) is None:
        raise SetupError(
            f"The operator key must be 32 to 256 letters, digits, _ or -, but {path} has something else "
            f"({len(key)} characters): write one with `openssl rand -hex 32`."
        )
    return key


def _read(what: str, path: Path) -> str:
    try:
        return path.read_text(encoding="ascii")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not ASCII text"
        raise SetupError(f"The {what} must be readable, but {path} is not: {reason}.") from None


@dataclass(frozen=True)
class ServerOptions:
    """How to start the server. A port of 0 means any free port; `log` None leaves the log on standard error.

    log_level, one of LOG_LEVELS, beats [logging] level.
    exit_timeout_s is how long requests under way and waiting may take when the server is told to stop.
    address: an IP address or a name; a name becomes its IP address. Raises SetupError.
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
    log_level: str | None = None
    exit_timeout_s: int = 10
    allow_outdated: bool = False
    security: ServerSecurity = field(default_factory=ServerSecurity)
    model_control: bool = False
    server_arguments: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "address", ip_of(self.address))

    @property
    def environment(self) -> dict[str, str]:
        """What the models and ranks are told by environment variables."""
        return {} if self.log_level is None else {LOG_LEVEL_VARIABLE: self.log_level}


def default_repository() -> Path:
    """The models of this version: inside the package where a wheel has put them, beside it in a checkout."""
    package = Path(__file__).absolute().parents[1]
    inside = package / "model_repository"
    return inside if inside.is_dir() else package.parent / "model_repository"


def add_server_arguments(parser: argparse.ArgumentParser, ports: tuple[int, int, int]) -> None:
    """The options that server_options reads; `ports`: the defaults for gRPC, HTTP and metrics."""
    add = parser.add_argument
    add("--config", type=Path, help="serve.toml, for the models")
    add("--model-repository", type=Path, default=default_repository(), help="default: %(default)s")
    add("--address", default="127.0.0.1", help="to listen on; default: %(default)s, loopback")
    for port_name, port in zip(("grpc", "http", "metrics"), ports, strict=True):
        add(f"--{port_name}-port", type=int, default=port, help="0: any free; default: %(default)s")
    add("--allow-outdated-server", action="store_true", help="let an old release listen beyond loopback")
    add_security_arguments(parser)
    add("--log", type=Path, help="a file to append the server's log to; default: standard error")
    add("--log-level", choices=LOG_LEVELS, help="of the models and ranks; default: [logging] level")
    add("--exit-timeout", type=int, default=10, metavar="S", help="for requests when told to stop; %(default)s")
    add("--ready-timeout", type=float, default=READY_TIMEOUT_S, metavar="S", help="default: %(default)g s")
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
        log_level=arguments.log_level,
        exit_timeout_s=arguments.exit_timeout,
        allow_outdated=arguments.allow_outdated_server,
        security=from_arguments(arguments),
        server_arguments=tuple(arguments.server_argument),
    )
