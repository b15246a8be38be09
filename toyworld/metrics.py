"""What is measured on frames of the toy world; on true clips every figure is perfect (tests/toyworld).

Frames are fp32 [F, 3, H, W] in [-1, 1]. The background's colour is known; its position and all about the shape are
measured.
"""

import math
from typing import Final

import torch
from torch import Tensor

from toyworld.world import (
    BACKGROUNDS,
    COLOURS,
    DIRECTIONS,
    SHAPES,
    STRIPE_CONTRAST,
    STRIPE_PERIOD_PX,
    Scene,
    colour_pixels,
    signed_distance,
)

DIFFERENT: Final = 0.35  # distance from the nearest shade of the background above which a pixel counts as shape
LEAST_AREA_PX: Final = 12  # smaller than this it is not there
SEAM_FRAME: Final = 17  # the first frame of the second chunk
END_FRAMES: Final = 5


def psnr(frames: Tensor, reference: Tensor) -> float:
    """Peak signal-to-noise ratio in dB over all values; infinite when equal."""
    error = float((frames - reference).square().mean())
    return math.inf if error == 0 else 10 * math.log10(4 / error)


def shape_mask(frames: Tensor, background: int) -> Tensor:
    """1 where a pixel is none of the background's shades, else 0: [F, H, W]."""
    base = (colour_pixels(BACKGROUNDS[background]) + 1).flatten()
    pixels = frames.movedim(1, -1) + 1
    shade = (pixels @ base / base.square().sum()).clamp(1 - STRIPE_CONTRAST, 1 + STRIPE_CONTRAST)
    distance: Tensor = (pixels - shade[..., None] * base).norm(dim=-1)
    return (distance > DIFFERENT).float()


def centres(frames: Tensor, background: int) -> Tensor:
    """Middle of the shape in every frame, (x, y) in pixels: [F, 2], NaN where there is none."""
    mask = shape_mask(frames, background)
    axis_y, axis_x = (torch.arange(size) + 0.5 for size in mask.shape[1:])
    area = mask.sum(dim=(1, 2))
    middle = torch.stack([(mask.sum(1) * axis_x).sum(-1), (mask.sum(2) * axis_y).sum(-1)], dim=-1) / area[:, None]
    middle[area < LEAST_AREA_PX] = math.nan
    return middle


def velocity(positions: Tensor) -> tuple[float, float]:
    """Pixels a frame along x and y, by least squares over the frames with a position [F, 2]; zero without two."""
    seen = ~positions.isnan().any(dim=1)
    if int(seen.sum()) < 2:
        return 0.0, 0.0
    time = torch.arange(len(positions))[seen].float()
    time, values = time - time.mean(), positions[seen] - positions[seen].mean(dim=0)
    slope = (time[:, None] * values).sum(dim=0) / time.square().sum()
    return float(slope[0]), float(slope[1])


def background_positions(frames: Tensor, background: int) -> Tensor:
    """How far the background's pattern is shifted in every frame, (x, y) in pixels: [F, 2], without jumps of a period.

    Read from the phases of the two sines that the pattern is a product of; the shape's pixels do not count.
    """
    base = (colour_pixels(BACKGROUNDS[background]) + 1).flatten()
    shade = (frames.movedim(1, -1) + 1) @ base / base.square().sum() - 1
    shade = shade * (1 - shape_mask(frames, background))
    turn = 2 * math.pi / STRIPE_PERIOD_PX
    y, x = (turn * (torch.arange(size) + 0.5) for size in shade.shape[1:])
    both = [(a * b[:, None] * shade).sum(dim=(1, 2)) for b in (y.sin(), y.cos()) for a in (x.sin(), x.cos())]
    ss, cs, sc, cc = both  # first letter: of x; the pattern is sin(x - dx) sin(y - dy)
    total, difference = torch.atan2(-(sc + cs), ss - cc), torch.atan2(sc - cs, ss + cc)
    phases = torch.stack([(total + difference) / 2, (total - difference) / 2], dim=-1)
    return _without_jumps(phases, math.pi) / turn


def direction(speed: tuple[float, float]) -> str:
    """The direction that a velocity is closest to."""
    return max(DIRECTIONS, key=lambda name: speed[0] * DIRECTIONS[name][0] + speed[1] * DIRECTIONS[name][1])


def seen_direction(scene: Scene) -> str:
    """Where the shape goes on the screen."""
    return direction(scene.velocity)


def colour(frames: Tensor, background: int) -> str | None:
    """The colour of the shape at the end, None when there is none: the nearest to the mean of its pixels."""
    end = frames[-END_FRAMES:]
    mask = shape_mask(end, background)
    if float(mask.sum()) < LEAST_AREA_PX:
        return None
    mean = (end * mask[:, None]).sum(dim=(0, 2, 3)) / mask.sum()
    return min(COLOURS, key=lambda name: float((mean - colour_pixels(COLOURS[name]).flatten()).norm()))


def shape(frames: Tensor, background: int) -> str | None:
    """The shape in the last frame, None when there is none: that whose outline at the same middle overlaps most."""
    mask = shape_mask(frames[-1:], background)[0]
    if float(mask.sum()) < LEAST_AREA_PX:
        return None
    axis_y, axis_x = (torch.arange(size) + 0.5 for size in mask.shape)
    overlap = {
        name: max(
            _overlap(mask, (signed_distance(name, axis_x[None] - x, axis_y[:, None] - y) < 0).float())
            for x, y in _middles(mask)
        )
        for name in SHAPES
    }
    return max(overlap, key=lambda name: overlap[name])


def seam(frames: Tensor) -> float:
    """Mean change at the border between the chunks over the median of the mean changes between other frames."""
    change = (frames[1:] - frames[:-1]).abs().mean(dim=(1, 2, 3))
    others = torch.cat([change[: SEAM_FRAME - 1], change[SEAM_FRAME:]])
    return float(change[SEAM_FRAME - 1] / others.median())


def spearman(first: list[float], second: list[float]) -> float:
    """Rank correlation, equal values sharing the mean of their ranks; NaN when one of the lists is constant."""
    a, b = (_ranks(torch.tensor(values, dtype=torch.float64)) for values in (first, second))
    a, b = a - a.mean(), b - b.mean()
    return float((a * b).sum() / (a.norm() * b.norm()))


def _ranks(values: Tensor) -> Tensor:
    below = (values[None] < values[:, None]).sum(dim=1)
    equal = (values[None] == values[:, None]).sum(dim=1)
    return below.double() + (equal.double() - 1) / 2


def _without_jumps(phases: Tensor, period: float) -> Tensor:
    """Adds whole periods so that neighbouring values differ by at most half of one."""
    steps = phases[1:] - phases[:-1]
    steps = steps - period * torch.round(steps / period)
    return torch.cat([phases[:1], phases[:1] + steps.cumsum(dim=0)])


def _overlap(first: Tensor, second: Tensor) -> float:
    return float((first * second).sum() / torch.maximum(first, second).sum())


def _middles(mask: Tensor) -> list[tuple[float, float]]:
    """Places near the middle of the mask where an outline may be centred (a triangle's is not its bounding box's)."""
    axis_y, axis_x = (torch.arange(size) + 0.5 for size in mask.shape)
    x = float((mask.sum(0) * axis_x).sum() / mask.sum())
    y = float((mask.sum(1) * axis_y).sum() / mask.sum())
    offsets = (-1.0, -0.5, 0.0, 0.5, 1.0)
    return [(x + dx, y + dy) for dx in offsets for dy in offsets]
