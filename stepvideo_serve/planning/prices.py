"""What presets of quality cost, in price files that `make prices` writes and the server reads.

The dataclasses below are the format, version 1: a key of the file is a field, its annotation says what may stand there,
and unknown keys are refused. docs/quality.md describes each key; docs/price-file.schema.json says the same to tools.
A price holds for one checkpoint, precision, preset (by its parameters, whatever its name) and setting of a request.
It holds on every layout and backend: forecasts are made of latents, on which these differ by rounding only.
"""

import json
import math
import secrets
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Final, get_args, get_origin, get_type_hints

from stepvideo_serve.errors import ConfigError
from stepvideo_serve.request.presets import Preset

FORMAT: Final = "stepvideo-serve prices"
VERSION: Final = 1
MAX_BYTES: Final = 16 << 20
EQUAL_DB: Final = 99.0
"""What stands for the infinite PSNR of equal frames."""


@dataclass(frozen=True)
class Estimate:
    """A figure over clips: its mean, the 95 % bootstrap interval of the mean, and the extremes of single clips."""

    mean: float
    low: float
    high: float
    least: float
    most: float


@dataclass(frozen=True)
class Setting:
    """What of a request a price depends on."""

    num_frames: int
    height: int
    width: int
    steps: int
    cfg_scale: float
    time_shift: float

    def agrees(self, other: "Setting") -> bool:
        """Whether both are the same up to the rounding of fp32."""
        mine, others = asdict(self), asdict(other)
        return all(math.isclose(mine[name], others[name], rel_tol=1e-6) for name in mine)


@dataclass(frozen=True)
class Measures:
    """Against the exact run of the same request, in the same process.

    clips               how many were measured
    evaluations         of the DiT, a step with guidance and one without alike
    guided_share        the part of them that computed the negative branch too, 0 to 1
    latent_error        |x - x_exact| / |x_exact| of the final latents (2-norms)
    psnr_db             of the decoded frames, 99 where they are equal; None where nothing was decoded
    seconds_over_exact  the denoising's seconds over those of exact
    motion              speed along the prompt over that of exact; None where nobody can tell it
    motion_rank         rank correlation of these speeds with exact's
    shares              other means over the clips, by name: "direction" (share as prompted), "first_frame_db"
    """

    clips: int
    evaluations: Estimate
    guided_share: float
    latent_error: Estimate
    psnr_db: Estimate | None
    seconds_over_exact: Estimate
    motion: Estimate | None
    motion_rank: float | None
    shares: dict[str, float]


@dataclass(frozen=True)
class Price:
    """Of one preset at one setting. `preset` is its name when it was measured, `parameters` are Preset.parameters()."""

    preset: str
    parameters: dict[str, Any]
    setting: Setting
    measures: Measures


@dataclass(frozen=True)
class Comparison:
    """What the same was measured of for comparison: fewer steps, another precision. `setting` is that of exact."""

    name: str
    setting: Setting
    measures: Measures


@dataclass(frozen=True)
class Served:
    """What was measured. checkpoint: Checkpoint.identity."""

    checkpoint: str
    precision: str
    backend: str
    layout: str


@dataclass(frozen=True)
class PriceFile:
    """One run of `make prices`. date: ISO 8601 in UTC."""

    format: str
    version: int
    date: str
    served: Served
    prices: tuple[Price, ...]
    comparisons: tuple[Comparison, ...]

    @classmethod
    def of(cls, served: Served, prices: Iterable[Price], comparisons: Iterable[Comparison]) -> "PriceFile":
        """Of now."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        return cls(FORMAT, VERSION, now, served, tuple(prices), tuple(comparisons))

    @classmethod
    def load(cls, path: Path) -> "PriceFile":
        """Raises ConfigError, in one sentence that names the file, when it cannot be read or is damaged."""
        try:
            if path.stat().st_size > MAX_BYTES:
                raise ConfigError(f"{path} must be a price file of at most {MAX_BYTES} bytes, it is larger: remove it.")
            value = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_constant)
        except OSError as error:
            raise ConfigError(f"[pricing] files must name price files, {path}: {error.strerror}.") from None
        except (ValueError, RecursionError) as error:
            raise _damaged(path, f"it is no JSON ({error})") from None
        found = (value.get("format"), value.get("version")) if isinstance(value, dict) else None
        if found != (FORMAT, VERSION):
            raise _damaged(path, f"format and version must be {FORMAT!r} and {VERSION}, got {_shown(found)}")
        try:
            file: PriceFile = _read(cls, value, "the file")
            datetime.fromisoformat(file.date)
            for price in file.prices:
                Preset(**price.parameters)
        except (TypeError, ValueError, ConfigError) as error:
            raise _damaged(path, str(error).rstrip(".")) from None
        return file

    def save(self, path: Path) -> None:
        """Writes the file whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = path.with_name(f"{path.name}.{secrets.token_hex(8)}.part")
        with whole.open("x", encoding="utf-8") as file:
            file.write(json.dumps(asdict(self), indent=1, allow_nan=False) + "\n")
        whole.replace(path)


class PriceBook:
    """The prices of several files."""

    def __init__(self, files: Iterable[PriceFile]) -> None:
        self._files = sorted(files, key=lambda file: datetime.fromisoformat(file.date).timestamp(), reverse=True)

    @classmethod
    def load(cls, paths: Iterable[Path]) -> "PriceBook":
        """Raises ConfigError for the first file that cannot be read."""
        return cls([PriceFile.load(path) for path in paths])

    def find(self, checkpoint: str, precision: str, preset: Preset, setting: Setting) -> Price | None:
        """The newest price of exactly this, or None: a price for other parameters is no price."""
        parameters = preset.parameters()
        for file in self._files:
            if (file.served.checkpoint, file.served.precision) == (checkpoint, precision):
                for price in file.prices:
                    if price.parameters == parameters and price.setting.agrees(setting):
                        return price
        return None

    def measured(self, preset: Preset, num_frames: int, height: int, width: int, steps: int) -> Price | None:
        """The newest price of the preset at this size and number of steps, whatever else it was measured with: for
        estimates of seconds."""
        parameters, size = preset.parameters(), (num_frames, height, width, steps)
        for price in (price for file in self._files for price in file.prices):
            setting = price.setting
            if price.parameters == parameters and size == (
                setting.num_frames,
                setting.height,
                setting.width,
                setting.steps,
            ):
                return price
        return None


def _read(kind: Any, value: Any, where: str) -> Any:
    """`value` as the annotation `kind`. Raises ValueError that says where."""
    if get_origin(kind) is UnionType:
        if value is None:
            return None
        [kind] = (item for item in get_args(kind) if item is not NoneType)
    if isinstance(kind, type) and is_dataclass(kind) and isinstance(value, dict):
        hints = get_type_hints(kind)
        if strange := value.keys() ^ hints.keys():
            raise ValueError(f"{where} must have the keys {', '.join(hints)}, {_shown(min(strange))} is amiss")
        order = [field.name for field in fields(kind)]
        return kind(**{name: _read(hints[name], value[name], f"{where} > {name}") for name in order})
    if get_origin(kind) is tuple and isinstance(value, list):
        return tuple(_read(get_args(kind)[0], item, f"{where} > {i}") for i, item in enumerate(value))
    if get_origin(kind) is dict and isinstance(value, dict):
        return {name: _read(get_args(kind)[1], item, f"{where} > {name[:40]}") for name, item in value.items()}
    if kind is Any:
        return value
    if kind is float and type(value) in (int, float) and abs(value) <= sys.float_info.max:
        return float(value)
    if kind in (int, str) and type(value) is kind:
        return value
    raise ValueError(f"{where} must be {_expected(kind)}, got {_shown(value)}")


def _expected(kind: Any) -> str:
    names: Mapping[Any, str] = {int: "an integer", float: "a finite number", str: "a string"}
    return names.get(kind, "a list" if get_origin(kind) is tuple else "an object")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is no number of JSON")


def _damaged(path: Path, why: str) -> ConfigError:
    return ConfigError(f"{path} must be a price file of version {VERSION}, {why}: measure again with make prices.")
