"""Presets of quality: which steps of a run are evaluated by the DiT, and where guidance applies.

A step that is not evaluated takes a velocity that is forecast from evaluated ones (sampling/evaluation.py). Schedule,
step count and graphs stay as they are. `dense_start`, `dense_end`, `guidance_from` and `guidance_to` are times of the
flow, 0 (noise) to 1 (video): a count of steps would mean another time at another TIME_SHIFT.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Final, Literal

import numpy as np

from stepvideo_serve.errors import ConfigError, InvalidRequest

EVALUATED: Final = "1"
FORECAST: Final = "0"
LEAST_STEPS: Final = 10
"""With fewer STEPS than these every step is evaluated, whatever the preset."""
MAX_MASK: Final = 10_000

MASK: Final = "mask:"
"""What a QUALITY that is a mask begins with."""

NAME: Final = re.compile(r"[a-z0-9][a-z0-9_-]{0,31}")

Rule = Literal["exact", "adaptive", "fixed"]
OF_RULE: Final[Mapping[str, tuple[str, ...]]] = {
    "exact": (),
    "adaptive": ("tolerance", "dense_start", "dense_end", "longest_streak"),
    "fixed": ("mask", "cfg_scale", "time_shift"),
}


@dataclass(frozen=True)
class Preset:
    """One preset. A rule needs its own keys (OF_RULE) and takes no other rule's.

    rule            "exact": every step is evaluated; "adaptive": as the trajectory asks for it; "fixed": by the mask
    tolerance       adaptive: the estimated relative change of the velocity since the last evaluation, above 0, from
                    which a step is evaluated
    dense_start     adaptive: every step that begins before this time is evaluated
    dense_end       adaptive: so is every step that begins at this time or later; the last step is in any case
    longest_streak  adaptive: at most so many forecast steps follow each other
    mask            fixed: "1" for each step that is evaluated, "0" for each that is forecast
    cfg_scale       fixed: the only CFG_SCALE that the mask holds for
    time_shift      fixed: the only TIME_SHIFT that the mask holds for
    guidance_from   guidance applies to steps that begin at this time or later ...
    guidance_to     ... and before this one (1: to the end); elsewhere the DiT follows the prompt alone, at half cost

    Raises ConfigError for what is missing, out of range or contradictory.
    """

    rule: Rule
    tolerance: float | None = None
    dense_start: float | None = None
    dense_end: float | None = None
    longest_streak: int | None = None
    mask: str | None = None
    cfg_scale: float | None = None
    time_shift: float | None = None
    guidance_from: float = 0.0
    guidance_to: float = 1.0

    def __post_init__(self) -> None:
        if self.rule not in OF_RULE:
            raise ConfigError(f"rule must be one of {', '.join(OF_RULE)}, got {self.rule!r}: correct it.")
        for name in (name for names in OF_RULE.values() for name in names):
            given = getattr(self, name) is not None
            if given and name not in OF_RULE[self.rule]:
                raise ConfigError(f'{name} contradicts rule = "{self.rule}", which does not use it: leave it out.')
            if not given and name in OF_RULE[self.rule]:
                raise ConfigError(f'rule = "{self.rule}" needs {name}, got none: add it.')
        self._check_adaptive()
        self._check_fixed()
        if not 0 <= self.guidance_from < self.guidance_to <= 1:
            raise ConfigError(
                "guidance_from must be below guidance_to, both times from 0 to 1, got "
                f"{self.guidance_from} and {self.guidance_to}: correct them."
            )

    @property
    def guides_always(self) -> bool:
        """Whether guidance applies to every step."""
        return (self.guidance_from, self.guidance_to) == (0.0, 1.0)

    def parameters(self) -> dict[str, Any]:
        """The keys that are set, as JSON values: what identifies the preset whatever its name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def _check_adaptive(self) -> None:
        if self.tolerance is not None and not 0 < self.tolerance < math.inf:
            raise ConfigError(f"tolerance must be a finite number above 0, got {self.tolerance}: correct it.")
        for name in ("dense_start", "dense_end"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ConfigError(f"{name} must be a time from 0 to 1, got {value}: correct it.")
        if self.dense_start is not None and self.dense_end is not None and self.dense_start >= self.dense_end:
            raise ConfigError(
                f"dense_start must be below dense_end, or no step may be forecast, got {self.dense_start} and "
                f'{self.dense_end}: correct them, or take rule = "exact".'
            )
        if self.longest_streak is not None and self.longest_streak < 1:
            raise ConfigError(f"longest_streak must be at least 1, got {self.longest_streak}: correct it.")

    def _check_fixed(self) -> None:
        if self.mask is not None and (fault := mask_fault(self.mask, len(self.mask))) is not None:
            raise ConfigError(fault)
        for name in ("cfg_scale", "time_shift"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"{name} must be a finite number above 0, got {value}: correct it.")


EXACT: Final = "exact"
EXACT_PRESET: Final = Preset("exact")


def mask_fault(mask: str, steps: int) -> str | None:
    """What is wrong with a mask for `steps` steps, in one sentence; None if nothing is."""
    if len(mask) != steps or not 1 <= steps <= MAX_MASK:
        return f"The mask must have one digit for each of the {steps} steps, got {len(mask)}: record it at these STEPS."
    if strange := set(mask) - {EVALUATED, FORECAST}:
        return f"The mask must consist of 0 and 1 only, got {min(strange)!r} in it: correct it."
    if not (mask.startswith(EVALUATED) and mask.endswith(EVALUATED)):
        return f"The mask must begin and end with 1, got {mask[0]} and {mask[-1]}: evaluate these steps."
    if steps < LEAST_STEPS and FORECAST in mask:
        return f"A mask with 0 in it needs at least {LEAST_STEPS} STEPS, got {steps}: every step is evaluated below."
    return None


def preset_of(quality: str, presets: Mapping[str, Preset], steps: int, cfg_scale: float, time_shift: float) -> Preset:
    """The preset that a request means by its QUALITY: one of `presets` by its name, or "mask:" and a digit per step.

    Raises InvalidRequest for an unknown name, and for a mask that does not fit STEPS, CFG_SCALE or TIME_SHIFT.
    """
    if quality.startswith(MASK):
        mask = quality.removeprefix(MASK)
        if (fault := mask_fault(mask, steps)) is not None:
            raise InvalidRequest(fault)
        return Preset("fixed", mask=mask, cfg_scale=cfg_scale, time_shift=time_shift)
    if quality not in presets:
        raise InvalidRequest(
            f"QUALITY must be one of {', '.join(presets)}, or {MASK} and a digit per step, got {quality!r}: correct it."
        )
    preset = presets[quality]
    if (fault := fixed_fault(preset, steps, cfg_scale, time_shift)) is not None:
        raise InvalidRequest(fault)
    return preset


def preset_name(quality: str) -> str:
    """What a QUALITY is called in reports and metrics: a preset's name, or "mask:"."""
    return MASK if quality.startswith(MASK) else quality


def fixed_fault(preset: Preset, steps: int, cfg_scale: float, time_shift: float) -> str | None:
    """Why a preset with a mask does not hold for a request, in one sentence; None where it does, or has no mask."""
    if preset.mask is None:
        return None
    if (fault := mask_fault(preset.mask, steps)) is not None:
        return fault
    assert preset.cfg_scale is not None
    assert preset.time_shift is not None
    asked, held = (cfg_scale, time_shift), (preset.cfg_scale, preset.time_shift)
    if any(np.float32(one) != np.float32(other) for one, other in zip(asked, held, strict=True)):  # as on the wire
        return (
            f"This fixed preset holds for CFG_SCALE = {preset.cfg_scale:g} and TIME_SHIFT = {preset.time_shift:g} "
            f"only, got {cfg_scale:g} and {time_shift:g}: ask for these, or for another QUALITY."
        )
    return None


def shipped_presets() -> dict[str, Preset]:
    """The presets of a configuration without [presets]. Their parameters were measured: docs/quality.md."""
    return {
        EXACT: EXACT_PRESET,
        "balanced": Preset("adaptive", tolerance=0.1, dense_start=0.01, dense_end=0.6, longest_streak=8),
        "fast": Preset("adaptive", tolerance=0.15, dense_start=0.01, dense_end=0.6, longest_streak=12),
    }


def with_exact(presets: Mapping[str, Preset]) -> dict[str, Preset]:
    """`presets` by name with `exact` before them. Raises ConfigError for a bad name, or another `exact`."""
    for name, preset in presets.items():
        if not NAME.fullmatch(name):
            raise ConfigError(
                f"A preset's name must be at most 32 of a-z, 0-9, - and _, and begin with a letter or digit, got "
                f"{name[:64]!r}: rename it."
            )
        if name == EXACT and preset != EXACT_PRESET:
            raise ConfigError('[presets.exact] must be rule = "exact" and nothing else: give yours another name.')
    return {EXACT: EXACT_PRESET, **presets}
