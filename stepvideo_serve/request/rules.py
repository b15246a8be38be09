"""What may stand in a field. Each rule checks a value and says in words what it accepts.

A refusal is an InvalidRequest of one sentence. Its numbers are those of the condition: both come from one variable.
"""

import math
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from stepvideo_serve.errors import InvalidRequest
from stepvideo_serve.geometry import check_multiple
from stepvideo_serve.request.limits import RequestLimits
from stepvideo_serve.request.presets import EVALUATED, FORECAST, MASK, NAME

Bound = Callable[[RequestLimits], int]
Bounds = Callable[[RequestLimits], tuple[float, float]]

ALLOWED_CONTROLS: Final = "\t\n\r"
BYTE_ORDER_MARK: Final = "\ufeff"  # editors put one before a text that they save as UTF-8


class Rule(Protocol):
    """What a field accepts."""

    def check(self, name: str, value: Any, limits: RequestLimits) -> Any:
        """The value as the request keeps it. Raises InvalidRequest, whose sentence begins with `name`."""
        ...

    def words(self, limits: RequestLimits) -> str:
        """What is accepted, in a few words."""
        ...


@dataclass(frozen=True)
class Range:
    """A number between two bounds, both allowed but the lower one if `above_low`. Floats are compared as fp32, so that
    0.1 on the wire equals a bound of 0.1."""

    bounds: Bounds
    above_low: bool = False
    unit: str = ""
    remedy: str = "choose a value in that range"

    def check(self, name: str, value: Any, limits: RequestLimits) -> Any:
        if isinstance(value, float):
            if not math.isfinite(value):
                raise InvalidRequest(f"{name} must be a finite number, got {value}: send a finite number.")
            low, high = (as_fp32(bound) for bound in self.bounds(limits))
        else:
            low, high = self.bounds(limits)
        if not (low < value if self.above_low else low <= value) or value > high:
            raise InvalidRequest(f"{name} must be {self._range(low, high)}, got {shown(value)}: {self.remedy}.")
        return value

    def words(self, limits: RequestLimits) -> str:
        return self._range(*self.bounds(limits))

    def _range(self, low: float, high: float) -> str:
        unit = f" {self.unit}" if self.unit else ""
        if self.above_low:
            return f"above {exact(low)} and at most {exact(high)}{unit}"
        return f"from {exact(low)} to {exact(high)}{unit}"


@dataclass(frozen=True)
class Multiple:
    """A positive multiple of `step`, up to a bound."""

    step: int
    most: Bound

    def check(self, name: str, value: Any, limits: RequestLimits) -> Any:
        check_multiple(name, value, self.step)
        most = self.most(limits)
        if value > most:
            raise InvalidRequest(f"{name} must be at most {most} on this server, got {value}: lower it.")
        return value

    def words(self, limits: RequestLimits) -> str:
        return f"a multiple of {self.step}, at most {self.most(limits)}"


@dataclass(frozen=True)
class Choice:
    """One of some ASCII words; the value may be their bytes."""

    options: tuple[str, ...]

    def check(self, name: str, value: Any, limits: RequestLimits) -> Any:  # noqa: ARG002  # of the protocol
        for option in self.options:
            if value in (option, option.encode()):
                return option
        raise InvalidRequest(f"{name} must be {self._options()}, got {shortened(value)}: use one of these words.")

    def words(self, limits: RequestLimits) -> str:  # noqa: ARG002  # of the protocol
        return self._options()

    def _options(self) -> str:
        return f"one of {', '.join(self.options)}"


@dataclass(frozen=True)
class Text:
    """UTF-8 text; empty is allowed, control characters other than tab, line feed and carriage return are not. A byte
    order mark at the beginning is no part of the text: as tokens, the mark would make another video."""

    most: Bound

    def check(self, name: str, value: Any, limits: RequestLimits) -> Any:
        most = self.most(limits)
        if len(value) > most:
            raise InvalidRequest(f"{name} must be at most {most} bytes, got {len(value)}: shorten it.")
        try:
            text: str = value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise InvalidRequest(
                f"{name} must be UTF-8, got byte 0x{value[error.start]:02x} at offset {error.start}: encode it so."
            ) from error
        for offset, character in enumerate(text):
            if unicodedata.category(character) == "Cc" and character not in ALLOWED_CONTROLS:
                raise InvalidRequest(
                    f"{name} must be text without control characters (tab and line breaks are fine), "
                    f"got U+{ord(character):04X} at character {offset}: remove it."
                )
        return text.removeprefix(BYTE_ORDER_MARK)

    def words(self, limits: RequestLimits) -> str:
        return f"UTF-8, at most {self.most(limits)} bytes; may be empty"


@dataclass(frozen=True)
class ImageFile:
    """The bytes of an image file; `video.image` looks into them."""

    most: Bound

    def check(self, name: str, value: Any, limits: RequestLimits) -> Any:
        most = self.most(limits)
        if not value:
            raise InvalidRequest(f"{name} must be a PNG, JPEG or WebP file, got 0 bytes: send the bytes of the file.")
        if len(value) > most:
            raise InvalidRequest(
                f"{name} must be at most {most} bytes, got {len(value)}: send it smaller or more compressed."
            )
        return value

    def words(self, limits: RequestLimits) -> str:
        return f"PNG, JPEG or WebP, at most {self.most(limits)} bytes"


@dataclass(frozen=True)
class Identifier:
    """Printable ASCII without spaces."""

    most: int

    def check(self, name: str, value: Any, limits: RequestLimits) -> Any:
        if not 1 <= len(value) <= self.most or not all(0x21 <= byte <= 0x7E for byte in value):
            raise InvalidRequest(f"{name} must be {self.words(limits)}, got {shortened(value)}: send a UUID, say.")
        return value.decode("ascii")

    def words(self, limits: RequestLimits) -> str:  # noqa: ARG002  # of the protocol
        return f"1 to {self.most} printable ASCII characters without spaces"


@dataclass(frozen=True)
class Quality:
    """The form of a preset's name, or of a mask; whether there is such a preset, and whether the mask fits the steps,
    `presets.preset_of` says. The value may be their bytes."""

    most: Bound

    def check(self, name: str, value: Any, limits: RequestLimits) -> Any:
        text = value.decode("latin-1")
        digits = text.removeprefix(MASK)
        if text.startswith(MASK):
            fits = 1 <= len(digits) <= self.most(limits) and set(digits) <= {EVALUATED, FORECAST}
        else:
            fits = NAME.fullmatch(text) is not None
        if not fits:
            raise InvalidRequest(f"{name} must be {self.words(limits)}, got {shortened(value)}: correct it.")
        return text

    def words(self, limits: RequestLimits) -> str:
        return f"a preset's name (a-z, 0-9, - and _), or {MASK} and 1 to {self.most(limits)} digits of 0 and 1"


@dataclass(frozen=True)
class Noise:
    """fp32 noise in the shape of the video's latents [F, C, h, w], or with `first_only` of one latent frame
    [1, C, h, w]; values within +-largest."""

    first_only: bool
    largest: float = 1000.0  # far beyond any noise, and far from overflowing in the model

    def shape(self, latent_shape: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
        """What is expected for a video whose latents have this shape."""
        return (1, *latent_shape[1:]) if self.first_only else latent_shape

    def check(self, name: str, value: Any, limits: RequestLimits) -> NDArray[np.float32]:  # noqa: ARG002
        """A private copy of the values; `checked_shape` comes before."""
        if not np.isfinite(value).all():
            count = int(value.size - np.count_nonzero(np.isfinite(value)))
            raise InvalidRequest(
                f"{name} must hold finite numbers, got {count} NaN or infinite ones: send finite numbers."
            )
        if (largest := float(np.abs(value).max(initial=0.0))) > self.largest:
            raise InvalidRequest(
                f"{name} must lie within +-{exact(self.largest)}, got {exact(largest)}: send standard normal noise."
            )
        return np.array(value, dtype=np.float32, order="C", copy=True)

    def checked_shape(self, name: str, value: NDArray[Any], latent_shape: tuple[int, int, int, int]) -> None:
        """Raises InvalidRequest unless `value` is fp32 of the shape for this video."""
        shape = self.shape(latent_shape)
        if value.dtype != np.dtype(np.float32) or value.shape != shape:
            raise InvalidRequest(
                f"{name} must be FP32 of shape {list(shape)} for this video size, got {value.dtype} of shape "
                f"{list(value.shape)}: send that shape or leave {name} out to draw it from SEED."
            )

    def words(self, limits: RequestLimits) -> str:  # noqa: ARG002  # of the protocol
        shape = "[1, C, h, w]" if self.first_only else "[latent frames, C, h, w]"
        return f"{shape}, h = HEIGHT / 16, w = WIDTH / 16, within +-{exact(self.largest)}"


def as_fp32(value: float) -> float:
    """The value that it has on the wire; beyond the range of fp32 it is infinite."""
    with np.errstate(over="ignore"):
        try:
            return float(np.float32(value))
        except OverflowError:  # a larger integer than the largest float
            return math.inf if value > 0 else -math.inf


def exact(value: float) -> str:
    """The shortest text that means this number and no other of its kind: 1000, 0.1, 0.099999994."""
    if isinstance(value, int):
        return str(value)
    text = str(np.float32(value)) if as_fp32(value) == value else repr(value)
    return text.removesuffix(".0")


def shown(value: float) -> str:
    """A number that was refused: exact, but for integers too long for a sentence."""
    long = isinstance(value, int) and value.bit_length() > 64
    return "an integer of more than 64 bits" if long else exact(value)


def shortened(value: object, limit: int = 60) -> str:
    """The value as text, cut so that a hostile one cannot flood the message or the log; of a container, the type."""
    if isinstance(value, int) and not isinstance(value, bool):
        return shown(value)
    text = repr(value) if isinstance(value, bytes | str | float | bool | None) else type(value).__name__
    return text if len(text) <= limit else f"{text[:limit]}..."
