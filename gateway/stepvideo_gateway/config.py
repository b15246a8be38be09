"""gateway.toml: where the gateway listens, which servers it feeds, where jobs and videos are."""

import tomllib
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from stepvideo_gateway.errors import ConfigError


@dataclass(frozen=True)
class Listen:
    """address: loopback unless configured otherwise; port 0: any free one."""

    address: str = "127.0.0.1"
    port: int = 8010


@dataclass(frozen=True)
class Servers:
    """The Triton servers.

    urls            gRPC endpoints, HOST:PORT
    waiting         jobs that one server is given beyond the one that runs there
    keep_s          how long a run goes on while no gateway follows it (KEEP_S; the server bounds it)
    attempts        how often a job is begun before it fails
    idle_timeout_s  silence of a server after which its run is given up
    """

    urls: tuple[str, ...] = ("127.0.0.1:8001",)
    waiting: int = 1
    keep_s: float = 600.0
    attempts: int = 3
    idle_timeout_s: float = 60.0


@dataclass(frozen=True)
class Jobs:
    """Jobs and their videos.

    database      SQLAlchemy's URL: SQLite in a file, or postgresql+psycopg://... for several gateways
    folder        where pictures and videos lie
    lease_s       after so long without a sign of life of its gateway, another one takes a job over
    keep_days     so long a job that has ended is kept; 0: for ever
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

    model           the name that this model has
    max_upload_mib  of a request's body
    body_timeout_s  in which the body must arrive
    """

    model: str = "step-video-ti2v"
    max_upload_mib: int = 40
    body_timeout_s: float = 60.0


@dataclass(frozen=True)
class GatewayConfig:
    """The whole file. Raises ConfigError."""

    listen: Listen = field(default_factory=Listen)
    servers: Servers = field(default_factory=Servers)
    jobs: Jobs = field(default_factory=Jobs)
    api: Api = field(default_factory=Api)

    def __post_init__(self) -> None:
        if not self.servers.urls:
            raise ConfigError("[servers] urls must name at least one server, got none: add HOST:PORT.")
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
        sections = {"listen": Listen, "servers": Servers, "jobs": Jobs, "api": Api}
        unknown = set(table) - set(sections)
        if unknown:
            raise ConfigError(f"{path} must have the sections {', '.join(sections)}, found {sorted(unknown)[0]!r}.")
        made = {name: _section(kind, table.get(name, {}), name, path) for name, kind in sections.items()}
        jobs = made["jobs"]
        made["jobs"] = Jobs(**{**vars(jobs), "folder": path.parent / jobs.folder, "database": _beside(jobs, path)})
        return cls(**made)


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
