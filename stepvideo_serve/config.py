"""serve.toml -> ServeConfig.

The dataclasses below are the format: a section of the file is a field of ServeConfig, a key is a field of the section,
its annotation says what may stand there, and a field without a default is required. [presets.NAME] is one entry of the
field `presets`. serve.toml at the top of the repository describes each key.
"""

import contextlib
import hashlib
import os
import re
import sys
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from stepvideo_serve.errors import ConfigError, InvalidRequest
from stepvideo_serve.request import CheckpointCard, RequestDefaults, RequestLimits, check_defaults
from stepvideo_serve.request.presets import Preset, shipped_presets, with_exact

ENVIRONMENT_VARIABLE = "STEPVIDEO_CONFIG"
LINKS_VARIABLE = "STEPVIDEO_LINKS"
"""Names a folder for links with names in ASCII; the launcher of a server sets the variable."""

StageDevice = Literal["", "cuda:0", "cuda:1", "cuda:2", "cuda:3", "cuda:4", "cuda:5", "cuda:6", "cuda:7"]
"""The GPU of a model that holds a stage; "": the first, or the CPU, as [model] device says."""


@dataclass(frozen=True)
class ModelConfig:
    """Which weights and graphs are served, and what runs them.

    weight_set  the folder of python -m export.quantize, for FP8 graphs that take their weights as inputs; none: others
    manifests  SHA-256 of each manifest.json that may be read, that of engines_dir and of its ranks' folders, and of the
               weights.json of a weight set; none: any. They have the hashes of all else: who can write the engines, but
               not this file, changes nothing
    """

    dir: Path
    engines_dir: Path
    backend: Literal["ort", "eager", "tensorrt", "tensorrt_rtx"] = "ort"
    precision: Literal["fp32", "bf16", "fp16", "fp8", "nvfp4"] = "fp32"
    device: Literal["cpu", "cuda"] = "cpu"
    manifests: tuple[str, ...] = ()
    weight_set: tuple[Path, ...] = ()

    def __post_init__(self) -> None:
        if len(self.weight_set) > 1:
            raise ConfigError(f"weight_set must name one folder or none, got {len(self.weight_set)}: remove others.")
        for digest in self.manifests:
            if re.fullmatch("[0-9a-f]{64}", digest) is None:
                raise ConfigError(f"manifests must be SHA-256 hashes, 64 digits of 0-9 and a-f, got {digest!r}.")


@dataclass(frozen=True)
class TextConfig:
    """The text encoders.

    cache_entries  prompts whose states are kept; 0 keeps none
    on_ranks       Step-LLM in slices on the ranks of the denoiser, instead of whole beside them; needs a layout with tp
    """

    cache_entries: int = 64
    on_ranks: bool = False
    device: StageDevice = ""

    def __post_init__(self) -> None:
        _at_least(self, 0, "cache_entries")


@dataclass(frozen=True)
class EncoderConfig:
    """The VAE encoder. `cache_entries`: images whose latents are kept; 0 keeps none."""

    cache_entries: int = 16
    device: StageDevice = ""

    def __post_init__(self) -> None:
        _at_least(self, 0, "cache_entries")


@dataclass(frozen=True)
class DenoiserConfig:
    """The group of ranks that runs the DiT.

    threads               CPU threads per rank; 0 = the cores that the process may use, divided by the ranks
    max_queued            runs that may wait behind the one under way before QueueFull
    start_timeout_s       from the start of the ranks until all are ready
    heartbeat_s           how often each rank gives a sign of life; one that is stopped is lost after two
    first_step_timeout_s  how long a run's first step may take
    step_slack_s          how much longer than the longest step so far a later one may take; then its rank is lost
    max_parks             how often a run gives way at a step to one of higher priority
    aging_s               seconds of waiting that raise a run by one priority, so that none waits for ever
    max_resumes           how often a run goes on after the ranks failed, before it fails
    arena_mib             shared memory in each direction for a message's tensors; only what is used costs memory
    layout                how the ranks divide the work
    peak_tflops           what one rank's GPU could do at most at the served precision, for the metrics; 0 = not known
    """

    threads: int = 0
    max_queued: int = 8
    start_timeout_s: float = 600.0
    heartbeat_s: float = 0.5
    first_step_timeout_s: float = 600.0
    step_slack_s: float = 2.0
    max_parks: int = 2
    aging_s: float = 600.0
    max_resumes: int = 2
    arena_mib: int = 256
    layout: str = "single"
    peak_tflops: float = 0.0

    def __post_init__(self) -> None:
        _at_least(self, 0, "threads", "max_queued", "max_parks", "max_resumes", "peak_tflops")
        _at_least(self, 1, "aging_s", "start_timeout_s", "first_step_timeout_s", "arena_mib")
        _at_least(self, 0.05, "heartbeat_s", "step_slack_s")


@dataclass(frozen=True)
class DecoderConfig:
    """The VAE decoder. `threads`: CPU threads; 0 = the cores that the process may use; ranks that decode share them."""

    threads: int = 0
    device: StageDevice = ""

    def __post_init__(self) -> None:
        _at_least(self, 0, "threads")


@dataclass(frozen=True)
class VideoConfig:
    """The mp4.

    fps             frames per second
    crop            crop 544x992 to 540x960 and 992x544 to 960x540
    ffmpeg_threads  threads of the encoder and of the filters each; 0 = all cores. The bytes depend on it
    """

    fps: int = 25
    crop: bool = True
    ffmpeg_threads: int = 4

    def __post_init__(self) -> None:
        _at_least(self, 1, "fps")
        _at_least(self, 0, "ffmpeg_threads")


GateMode = Literal["error", "warn", "off"]


@dataclass(frozen=True)
class GatesConfig:
    """What a video must pass before it is handed out: "error" fails the request, "warn" adds to REPORT's warnings and
    to the log, "off" does not look. Latents that are not finite always fail it.

    frame_count          as many frames as were asked for
    mp4                  the file decodes to the frames, size and speed that it was made of
    first_frame          the first frame is like the image, by first_frame_psnr_db
    first_frame_psnr_db  the least PSNR of the first frame against the fitted image; 0 lets everything pass
    black                some frame is brighter on average than black_level
    black_level          grey levels, of 255
    frozen               some frame differs on average by more than frozen_difference from the first one
    frozen_difference    grey levels, of 255
    """

    frame_count: GateMode = "error"
    mp4: GateMode = "error"
    first_frame: GateMode = "warn"
    first_frame_psnr_db: float = 0.0
    black: GateMode = "warn"
    black_level: float = 2.0
    frozen: GateMode = "warn"
    frozen_difference: float = 0.1

    def __post_init__(self) -> None:
        _at_least(self, 0, "first_frame_psnr_db", "black_level", "frozen_difference")


@dataclass(frozen=True)
class IdempotencyConfig:
    """Results that are kept for repeats of their REQUEST_ID, in each public model for itself.

    ttl_s         seconds that a result is kept; 0 keeps none, but where KEEP_S asks for it
    max_mib       all results in memory together, the oldest go first; 0 keeps none there
    max_file_mib  results that KEEP_S asks for go to files, beyond `max_mib`; all of those together
    """

    ttl_s: float = 600.0
    max_mib: int = 256
    max_file_mib: int = 1024

    def __post_init__(self) -> None:
        _at_least(self, 0, "ttl_s", "max_mib", "max_file_mib")


@dataclass(frozen=True)
class LoggingConfig:
    """What the models and ranks log.

    format  "text" as the server's own lines, or "json", one object a line
    level   the least severe lines that are logged; `--log-level` of a start beats the key
    """

    format: Literal["text", "json"] = "text"
    level: Literal["debug", "info", "warning", "error"] = "info"


@dataclass(frozen=True)
class TelemetryConfig:
    """OpenTelemetry traces.

    otlp_endpoint   base URL of a collector that takes OTLP over HTTP, as http://collector:4318; "" = no traces
    sample_ratio    the share of requests without a traceparent of their own that are traced
    steps_per_span  how many denoising steps one span covers
    """

    otlp_endpoint: str = ""
    sample_ratio: float = 1.0
    steps_per_span: int = 10

    def __post_init__(self) -> None:
        _at_least(self, 0, "sample_ratio")
        _at_least(self, 1, "steps_per_span")
        if self.otlp_endpoint and not self.otlp_endpoint.startswith(("http://", "https://")):
            raise ConfigError(f"otlp_endpoint must be an http or https URL, got {self.otlp_endpoint!r}: correct it.")
        if self.sample_ratio > 1:
            raise ConfigError(f"sample_ratio must be at most 1, got {self.sample_ratio}.")


@dataclass(frozen=True)
class PricingConfig:
    """What presets cost, as measured by `make prices`.

    files    price files, format v1 (docs/quality.md)
    require  refuse a preset that has no price for what is served, instead of a warning in REPORT
    """

    files: tuple[Path, ...] = ()
    require: bool = False


@dataclass(frozen=True)
class ServeConfig:
    """The configuration of a server. ConfigError for defaults that the limits do not allow."""

    model: ModelConfig
    limits: RequestLimits = field(default_factory=RequestLimits)
    defaults: RequestDefaults = field(default_factory=RequestDefaults)
    card: CheckpointCard = field(default_factory=CheckpointCard)
    text: TextConfig = field(default_factory=TextConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    denoiser: DenoiserConfig = field(default_factory=DenoiserConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    video: VideoConfig = field(default_factory=VideoConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)
    gates: GatesConfig = field(default_factory=GatesConfig)
    idempotency: IdempotencyConfig = field(default_factory=IdempotencyConfig)
    presets: dict[str, Preset] = field(default_factory=shipped_presets)
    pricing: PricingConfig = field(default_factory=PricingConfig)

    def __post_init__(self) -> None:
        try:
            check_defaults(self.defaults, self.limits)
        except InvalidRequest as error:
            raise ConfigError(f"[defaults] must be what [limits] allow: {error}") from None

    @classmethod
    def load(cls, path: Path) -> "ServeConfig":
        """The configuration in a TOML file; relative paths in it are relative to its folder.

        ConfigError, naming the key and the file, for a missing or unreadable file, an unknown or missing key, a wrong
        type or a value out of range.
        """
        try:
            with path.open("rb") as file:
                table = tomllib.load(file)
        except OSError as error:
            raise ConfigError(f"The configuration must be a TOML file, {path}: {error.strerror}.") from error
        except ValueError as error:
            raise ConfigError(f"{path} must be TOML in UTF-8, found: {error}.") from error
        path = Path(_name_of(path))
        hints = get_type_hints(cls)
        _check_keys("the file", table, set(hints), set(), path)
        presets = _presets(table.pop("presets"), path) if "presets" in table else shipped_presets()
        sections = {name: kind for name, kind in hints.items() if name != "presets"}
        found = {name: _section(name, kind, table.get(name, {}), path) for name, kind in sections.items()}
        try:
            return cls(presets=presets, **found)
        except ConfigError as error:
            raise ConfigError(f"In {path} {error}") from error

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> "ServeConfig":
        """The configuration in the file that STEPVIDEO_CONFIG names; ConfigError if it is not set."""
        value = environ.get(ENVIRONMENT_VARIABLE)
        if not value:
            raise ConfigError(f"{ENVIRONMENT_VARIABLE} must name the configuration file, it is not set: set it.")
        return cls.load(Path(value))


def _section(name: str, kind: Any, table: object, path: Path) -> Any:
    """The dataclass `kind` from one table of the file."""
    if not isinstance(table, dict):
        raise ConfigError(f"{name} in {path} must be a table, got {table!r}: write [{name}] above its keys.")
    hints = get_type_hints(kind)
    required = {f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING}
    _check_keys(f"[{name}]", table, set(hints), required, path)
    values = {key: _value(f"[{name}] {key}", hints[key], value, path) for key, value in table.items()}
    try:
        return kind(**values)
    except ConfigError as error:
        raise ConfigError(f"[{name}] in {path}: {error}") from error


def _presets(tables: object, path: Path) -> dict[str, Preset]:
    """[presets.NAME] by name, and `exact`."""
    if not isinstance(tables, dict):
        raise ConfigError(f"presets in {path} must hold tables, got {tables!r}: write [presets.NAME] above a preset.")
    try:
        return with_exact({name: _section(f"presets.{name}", Preset, table, path) for name, table in tables.items()})
    except ConfigError as error:
        raise error if str(path) in str(error) else ConfigError(f"[presets] in {path}: {error}") from error


def _check_keys(where: str, table: Mapping[str, object], allowed: set[str], required: set[str], path: Path) -> None:
    for key in table:
        if key not in allowed:
            raise ConfigError(f"{where} of {path} may have {', '.join(sorted(allowed))}, got {key!r}: correct it.")
    if missing := required - table.keys():
        raise ConfigError(f"{where} of {path} needs {', '.join(sorted(missing))}, got {sorted(table)}: add it.")


def _value(where: str, kind: Any, value: Any, path: Path) -> Any:
    """`value` as the annotation `kind`: bool, int, float, str, Path, Literal of texts, a tuple of these, or one of
    these with None for the key that is left out."""
    if get_origin(kind) is UnionType:
        [kind] = (item for item in get_args(kind) if item is not NoneType)
    if get_origin(kind) is tuple and isinstance(value, list):
        items = get_args(kind)
        kinds = items[:1] * len(value) if items[1:] == (...,) else items
        if len(kinds) == len(value):
            return tuple(_value(f"{where}[{i}]", *pair, path) for i, pair in enumerate(zip(kinds, value, strict=True)))
    elif get_origin(kind) is Literal and value in get_args(kind):
        return value
    elif kind is float and type(value) in (int, float) and abs(value) <= sys.float_info.max:
        return float(value)
    elif kind is Path and isinstance(value, str) and value:
        return _reachable(path.absolute().parent / value, where)
    elif kind in (bool, int, str) and type(value) is kind:
        return value
    raise ConfigError(f"{where} in {path} must be {_expected(kind)}, got {value!r}: correct it.")


def _name_of(path: Path) -> str:
    """The path's text, without the stand-ins that an ASCII file system encoding puts for other bytes."""
    return str(path).encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape")


def _reachable(path: Path, where: str) -> Path:
    """The path, or a link to it with a name in ASCII where this Python cannot name the path itself.

    The Python of Triton's stubs is such a one: its file system encoding is ASCII, whatever the locale says.
    """
    name = _name_of(path)
    if name.isascii() or sys.getfilesystemencoding() == "utf-8":
        return Path(name)
    folder = os.environ.get(LINKS_VARIABLE)
    if not folder:
        raise ConfigError(
            f"{where} must be a path in ASCII, because this Python's file system encoding is "
            f"{sys.getfilesystemencoding()}, got {name}: start the server with python -m stepvideo_serve."
        )
    target = name.encode("utf-8", "surrogateescape")
    link = Path(folder) / hashlib.sha256(target).hexdigest()[:16]
    with contextlib.suppress(FileExistsError):  # another model's process was faster
        os.symlink(target, os.fsencode(link))
    return link


def _expected(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(repr, get_args(kind)))
    if get_origin(kind) is tuple:
        return "a list [" + ", ".join("..." if item is ... else _expected(item) for item in get_args(kind)) + "]"
    names = {bool: "true or false", int: "an integer", float: "a finite number", str: "a string", Path: "a path"}
    return names[kind]


def _at_least(section: object, least: float, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        if value < least:
            raise ConfigError(f"{name} must be at least {least}, got {value}.")
