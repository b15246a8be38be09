"""Deterministic clips of one shape on a striped background: either the shape moves, or the camera.

Pixels are [-1, 1], axes [T frames, 3 channels, H rows, W columns]; x grows to the right and y downwards. A clip is a
function of its Scene alone. Speed is proportional to the motion score, and the direction says nothing about where
the shape begins.
"""

from dataclasses import dataclass
from itertools import product
from typing import Final

import torch
from torch import Tensor

SIZE_PX: Final = 64
FRAMES: Final = 34
PX_PER_FRAME_AND_SCORE: Final = 1 / 30
MOTION_SCORES: Final = (2.0, 5.0, 10.0, 20.0)

SHAPES: Final = ("circle", "square", "triangle")
COLOURS: Final = {"red": (215, 40, 40), "green": (40, 170, 70), "blue": (50, 80, 225), "yellow": (245, 210, 40)}
DIRECTIONS: Final = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
BACKGROUNDS: Final = (
    (70, 70, 80),
    (205, 195, 180),
    (40, 85, 95),
    (110, 85, 130),
    (165, 140, 110),
    (160, 180, 195),
)
STRIPE_PERIOD_PX: Final = 32
STRIPE_CONTRAST: Final = 0.2
START_RANGE_PX: Final = 5  # the shape begins at most this far from the middle, on both axes
RADIUS_PX: Final = {"circle": 9.0, "square": 8.0, "triangle": 6.0}  # the triangle's is that of the inscribed circle

Subject = tuple[str, str, str, bool]
"""Shape, colour, direction, and whether the camera moves instead of the shape."""


@dataclass(frozen=True)
class Scene:
    """One clip. `direction` is that of the shape, or of the camera where `camera` is true (the picture then goes the
    other way). `background` 0..5; (x, y) is the shape's centre in frame 0, in pixels; `motion_score` 0..20."""

    shape: str
    colour: str
    direction: str
    camera: bool
    background: int
    motion_score: float
    x: float
    y: float

    @property
    def subject(self) -> Subject:
        return (self.shape, self.colour, self.direction, self.camera)

    @property
    def velocity(self) -> tuple[float, float]:
        """Of the shape on the screen, in pixels a frame."""
        speed = self.motion_score * PX_PER_FRAME_AND_SCORE * (-1 if self.camera else 1)
        dx, dy = DIRECTIONS[self.direction]
        return dx * speed, dy * speed


def subjects(held_out: bool) -> list[Subject]:
    """All combinations of shape, colour and motion that training sees, or the quarter that it never sees.

    Every pair of shape, colour and motion occurs in training: only the combination of all three is new.
    """
    motions = list(product(DIRECTIONS, (False, True)))
    numbered = product(enumerate(SHAPES), enumerate(COLOURS), enumerate(motions))
    return [
        (shape, colour, direction, camera)
        for (i, shape), (j, colour), (k, (direction, camera)) in numbered
        if ((i + j + k) % 4 == 0) == held_out
    ]


def draw_scene(generator: torch.Generator, held_out: bool = False) -> Scene:
    """A random scene; the same state of the generator gives the same scene."""
    choices = subjects(held_out)
    pick, background, score = (
        int(torch.randint(n, (), generator=generator)) for n in (len(choices), len(BACKGROUNDS), len(MOTION_SCORES))
    )
    offset = (2 * torch.rand(2, generator=generator) - 1) * START_RANGE_PX + SIZE_PX / 2
    x, y = (round(float(value), 2) for value in offset)
    return Scene(*choices[pick], background, MOTION_SCORES[score], x, y)


def render(scene: Scene, first: int = 0, count: int = FRAMES, size: int = SIZE_PX) -> Tensor:
    """Frames first .. first + count - 1 as fp32 [count, 3, size, size] in [-1, 1]; edges are antialiased.

    Of other sizes than 64 the middle is kept in the middle.
    """
    x, y, shift_x, shift_y = _coordinates(scene, first, count, size)
    ground = background_pixels(scene.background, x - shift_x * scene.camera, y - shift_y * scene.camera)
    return ground + cover(scene, first, count, size) * (colour_pixels(COLOURS[scene.colour]) - ground)


def cover(scene: Scene, first: int = 0, count: int = FRAMES, size: int = SIZE_PX) -> Tensor:
    """How much of each pixel the shape covers, 0..1: [count, 1, size, size]."""
    x, y, shift_x, shift_y = _coordinates(scene, first, count, size)
    distance = signed_distance(scene.shape, x - scene.x - shift_x, y - scene.y - shift_y)
    return (0.5 - distance).clamp(0, 1)[:, None]


def _coordinates(scene: Scene, first: int, count: int, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [1, 1, W] and y [1, H, 1] of the pixels' middles, and how far the picture has moved, twice [T, 1, 1]."""
    time = torch.arange(first, first + count, dtype=torch.float32)[:, None, None]
    vx, vy = scene.velocity
    axis = torch.arange(size) + 0.5 - (size - SIZE_PX) / 2
    return axis[None, None, :], axis[None, :, None], time * vx, time * vy


def background_pixels(background: int, x: Tensor, y: Tensor) -> Tensor:
    """Background number `background` at world coordinates x [T, 1, W], y [T, H, 1] -> [T, 3, H, W]: a plain colour,
    lighter and darker by a fifth in a pattern of which every shift up to half a period can be seen."""
    turn = 2 * torch.pi / STRIPE_PERIOD_PX
    pattern = 1 + STRIPE_CONTRAST * torch.sin(turn * x) * torch.sin(turn * y)
    return (colour_pixels(BACKGROUNDS[background]) + 1) * pattern[:, None] - 1


def colour_pixels(rgb: tuple[int, int, int]) -> Tensor:
    """0..255 -> [3, 1, 1] in [-1, 1]."""
    return torch.tensor(rgb, dtype=torch.float32)[:, None, None] / 127.5 - 1


def signed_distance(shape: str, x: Tensor, y: Tensor) -> Tensor:
    """Pixels from the outline of a shape with its centre at 0, negative inside. The triangle points up."""
    radius = RADIUS_PX[shape]
    if shape == "circle":
        return (x.square() + y.square()).sqrt() - radius
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) - radius
    sides = (y, 0.8660254 * x - 0.5 * y, -0.8660254 * x - 0.5 * y)
    return torch.stack(torch.broadcast_tensors(*sides)).amax(0) - radius
