"""gateway.toml: where the gateway listens, which servers it feeds, where jobs and videos are."""

import base64
import binascii
import ipaddress
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Final

from stepvideo_gateway.errors import ConfigError

SECRET_PREFIX: Final = "whsec_"
DATABASE_VARIABLE: Final = "STEPVIDEO_GATEWAY_DATABASE"
SECRET_VARIABLE: Final = "STEPVIDEO_GATEWAY_WEBHOOK_SECRET"
IN_FILE: Final = "[webhooks] secret"
PEM_FILES: Final = ("root_certificates", "private_key", "certificate_chain")
DATABASES: Final = ("sqlite+aiosqlite:///", "postgresql+psycopg://")


@dataclass(frozen=True)
class Listen:
    """address: loopback unless configured otherwise; port 0: any free one."""

    address: str = "127.0.0.1"
    port: int = 8010


@dataclass(frozen=True)
class Servers:
    """The Triton servers.

    urls               gRPC endpoints, HOST:PORT
    waiting            jobs that one server is given beyond the one that runs there
    keep_s             how long a run goes on while no gateway follows it (KEEP_S; the server bounds it)
    attempts           how often a job is begun before it fails
    idle_timeout_s     silence of a server after which its run is given up
    tls                calls to all servers are encrypted; implied by the next three, which are PEM files
    root_certificates  of the authorities that signed the servers' certificates; "": the system's
    private_key, certificate_chain  the gateway's own, for servers that ask for them (mutual TLS); "": none
    """

    urls: tuple[str, ...] = ("127.0.0.1:8001",)
    waiting: int = 1
    keep_s: float = 600.0
    attempts: int = 3
    idle_timeout_s: float = 60.0
    tls: bool = False
    root_certificates: str = ""
    private_key: str = ""
    certificate_chain: str = ""

    @property
    def security(self) -> dict[str, Any]:
        """The arguments of a client that are about TLS."""
        return {"tls": self.tls, **{name: getattr(self, name) or None for name in PEM_FILES}}

    def check_files(self) -> None:
        """Raises ConfigError for a PEM file that cannot be read, or that holds something else."""
        for name in PEM_FILES:
            if not (path := getattr(self, name)):
                continue
            kind = "PRIVATE KEY" if name == "private_key" else "CERTIFICATE"
            try:
                text = Path(path).read_text(encoding="ascii")
            except (OSError, ValueError) as error:
                reason = getattr(error, "strerror", None) or "it is not ASCII"
                raise ConfigError(f"[servers] {name} must be a PEM file, {path}: {reason}.") from None
            if not re.search(f"-----BEGIN ([A-Z]+ )?{kind}-----", text):
                raise ConfigError(f"[servers] {name} must be a PEM file with a {kind}, {path} has none: correct it.")


@dataclass(frozen=True)
class Jobs:
    """Jobs and their videos.

    database      SQLAlchemy's URL: SQLite in a file, or postgresql+psycopg://... for several gateways
    folder        where pictures and videos lie
    lease_s       how long a gateway may give no sign of life before another gateway takes its jobs over
    keep_days     how long a job that has ended is kept; 0: for ever
    max_gib       of all videos together; the oldest go first; 0: any number
    max_queued    jobs that may wait; more are refused
    """

    database: str = "sqlite+aiosqlite:///gateway/jobs.sqlite"
    folder: Path = Path("gateway/videos")
    lease_s: float = 30.0
    keep_days: float = 30.0
    max_gib: float = 0.0
    max_queued: int = 10_000


@dataclass(frozen=True)
class Api:
    """What callers may send.

    model             the name that this model has
    max_upload_mib    of a request's body
    body_timeout_s    how long the body may take to arrive
    require_key       callers need an API key (`python -m stepvideo_gateway keys add NAME`), and see their own jobs only
    fetch_references  a picture may be named by an http(s) address, which the gateway then fetches
    log_prompts       prompts may stand in the log
    """

    model: str = "step-video-ti2v"
    max_upload_mib: int = 40
    body_timeout_s: float = 60.0
    require_key: bool = False
    fetch_references: bool = False
    log_prompts: bool = False


@dataclass(frozen=True)
class Videos:
    """mark: the mp4 says that it is AI-generated, and with what settings, in its metadata."""

    mark: bool = True


@dataclass(frozen=True)
class Webhooks:
    """Who hears that a video is completed or failed.

    urls           each of them is told of all jobs
    secret         whsec_..., the key of the signatures; "": the environment has it (STEPVIDEO_GATEWAY_WEBHOOK_SECRET)
    allow_private  addresses inside the own network may be asked (also by fetch_references)
    """

    urls: tuple[str, ...] = ()
    secret: str = ""
    allow_private: bool = False


@dataclass(frozen=True)
class Logging:
    """format: "text", or "json", one object a line."""

    format: str = "text"


@dataclass(frozen=True)
class Traces:
    """sample_ratio: the share of requests without a traceparent of their own whose spans the servers are to send."""

    sample_ratio: float = 1.0


@dataclass(frozen=True)
class GatewayConfig:
    """The whole file. Raises ConfigError."""

    listen: Listen = field(default_factory=Listen)
    servers: Servers = field(default_factory=Servers)
    jobs: Jobs = field(default_factory=Jobs)
    api: Api = field(default_factory=Api)
    videos: Videos = field(default_factory=Videos)
    webhooks: Webhooks = field(default_factory=Webhooks)
    logging: Logging = field(default_factory=Logging)
    traces: Traces = field(default_factory=Traces)

    def __post_init__(self) -> None:
        if self.logging.format not in ("text", "json"):
            raise ConfigError(f'[logging] format must be "text" or "json", got {self.logging.format!r}: correct it.')
        if not 0.0 <= self.traces.sample_ratio <= 1.0:
            raise ConfigError(f"[traces] sample_ratio must be from 0 to 1, got {self.traces.sample_ratio}: correct it.")
        if not (self.api.require_key or is_loopback(self.listen.address)):
            raise ConfigError(
                f"[api] require_key must be true where others can reach the gateway, which is to listen on "
                f"{self.listen.address}: set it, and make keys with `python -m stepvideo_gateway keys add NAME`."
            )
        if self.webhooks.secret:
            key_of(self.webhooks.secret)
        if not self.servers.urls:
            raise ConfigError("[servers] urls must name at least one server, got none: add HOST:PORT.")
        if bool(self.servers.private_key) != bool(self.servers.certificate_chain):
            raise ConfigError(
                "[servers] private_key and certificate_chain go together, got one of them: add the other."
            )
        for section, key, least in (
            ("servers", "waiting", 0),
            ("servers", "keep_s", 0),
            ("servers", "attempts", 1),
            ("jobs", "lease_s", 1),
            ("jobs", "keep_days", 0),
            ("jobs", "max_gib", 0),
            ("jobs", "max_queued", 1),
            ("api", "max_upload_mib", 1),
            ("api", "body_timeout_s", 1),
        ):
            value = getattr(getattr(self, section), key)
            if not value >= least:
                raise ConfigError(f"[{section}] {key} must be at least {least}, got {value}: correct it.")

    @classmethod
    def load(cls, path: Path) -> "GatewayConfig":
        """The configuration in a TOML file; relative paths in it are relative to its folder. Raises ConfigError for an
        unreadable file, an unknown key, a wrong type or a value out of range."""
        try:
            table = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"The configuration must be a TOML file, {path}: {error.strerror}.") from error
        except ValueError as error:
            raise ConfigError(f"{path} must be TOML in UTF-8, found: {error}.") from error
        sections: dict[str, Any] = {each.name: each.default_factory for each in fields(cls)}
        unknown = set(table) - set(sections)
        if unknown:
            raise ConfigError(f"{path} must have the sections {', '.join(sections)}, found {sorted(unknown)[0]!r}.")
        made = {name: _section(kind, table.get(name, {}), name, path) for name, kind in sections.items()}
        jobs, servers = made["jobs"], made["servers"]
        pem = {name: str(path.parent / getattr(servers, name)) for name in PEM_FILES if getattr(servers, name)}
        made["servers"] = replace(servers, **pem)
        made["jobs"] = Jobs(**{**vars(jobs), "folder": path.parent / jobs.folder, "database": _beside(jobs, path)})
        return cls(**made)

    def in_environment(self, environment: Mapping[str, str]) -> "GatewayConfig":
        """The configuration as a gateway uses it, with the database in STEPVIDEO_GATEWAY_DATABASE and the secret in
        STEPVIDEO_GATEWAY_WEBHOOK_SECRET, where these are set, so that no file need hold a password. A relative
        SQLite file is relative to the current folder. Raises ConfigError, without the values."""
        config = self
        if (url := environment.get(DATABASE_VARIABLE)) is not None:
            if not url.startswith(DATABASES):
                found = "another text" if url else "nothing"
                raise ConfigError(
                    f"{DATABASE_VARIABLE} must begin with {' or '.join(DATABASES)}, found {found}: correct it."
                )
            config = replace(config, jobs=replace(config.jobs, database=url))
        if (secret := environment.get(SECRET_VARIABLE)) is not None:
            key_of(secret, SECRET_VARIABLE)
            config = replace(config, webhooks=replace(config.webhooks, secret=secret))
        if config.webhooks.urls:
            key_of(config.webhooks.secret, f"{IN_FILE} or {SECRET_VARIABLE}")
        return config


def is_loopback(address: str) -> bool:
    """Whether only this machine can reach the address."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"


def key_of(secret: str, where: str = IN_FILE) -> bytes:
    """The bytes behind "whsec_..."; `where` it stands. Raises ConfigError, without the secret."""
    try:
        key = base64.b64decode(secret.removeprefix(SECRET_PREFIX), validate=True)
    except (binascii.Error, ValueError):  # ValueError: characters beyond ASCII
        key = b""
    if not secret.startswith(SECRET_PREFIX) or not 24 <= len(key) <= 64:
        found = "another text" if secret else "nothing"
        raise ConfigError(f"{where} must be {SECRET_PREFIX} and 24 to 64 bytes in base64, found {found}: correct it.")
    return key


def _section(kind: type[Any], table: Any, name: str, path: Path) -> Any:
    if not isinstance(table, dict):
        raise ConfigError(f"[{name}] in {path} must be a section, found {table!r}.")
    known = {each.name: each for each in fields(kind)}
    values: dict[str, Any] = {}
    for key, value in table.items():
        if key not in known:
            raise ConfigError(f"[{name}] in {path} has the keys {', '.join(known)}, found {key!r}: correct it.")
        values[key] = _typed(known[key].default, value, f"[{name}] {key} in {path}")
    return kind(**values)


def _typed(default: Any, value: Any, what: str) -> Any:
    """The value in the type of the default."""
    if isinstance(default, tuple):
        if isinstance(value, list) and all(isinstance(each, str) for each in value):
            return tuple(value)
        raise ConfigError(f"{what} must be a list of strings, found {value!r}.")
    if isinstance(default, Path | str):
        if isinstance(value, str):
            return type(default)(value) if isinstance(default, str) else Path(value)
        raise ConfigError(f"{what} must be a string, found {value!r}.")
    if isinstance(default, bool):
        if isinstance(value, bool):
            return value
        raise ConfigError(f"{what} must be true or false, found {value!r}.")
    if isinstance(value, bool) or not isinstance(value, int if isinstance(default, int) else int | float):
        raise ConfigError(
            f"{what} must be a number{' without a fraction' * isinstance(default, int)}, found {value!r}."
        )
    return type(default)(value)


def _beside(jobs: Jobs, path: Path) -> str:
    """The database's URL, with a relative SQLite file made relative to the configuration's folder."""
    prefix = "sqlite+aiosqlite:///"
    file = jobs.database.removeprefix(prefix)
    if jobs.database.startswith(prefix) and file and not file.startswith("/"):
        return f"{prefix}{(path.parent / file).absolute()}"
    return jobs.database
