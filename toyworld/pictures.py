"""Pictures of samples: contact sheets, an animation, and the plot of speed against motion score. Drawn with Pillow."""

from pathlib import Path
from typing import Final

from PIL import Image, ImageDraw
from torch import Tensor

from toyworld.samples import pixels_to_bytes
from toyworld.world import MOTION_SCORES, PX_PER_FRAME_AND_SCORE

SHOWN_FRAMES: Final = (0, 5, 11, 16, 17, 22, 28, 33)
ENLARGED: Final = 2
GAP_PX: Final = 4
LABEL_PX: Final = 14
PLOT_PX: Final = (360, 260)
MARGIN_PX: Final = 40
FRAME_MS: Final = 80
INK, GREY, BLUE = (20, 20, 20), (190, 190, 190), (50, 80, 225)


def contact_sheet(rows: list[tuple[str, Tensor]]) -> Image.Image:
    """One row per sample: its frames SHOWN_FRAMES [34, 3, H, W] in [-1, 1], enlarged, and above them its label in Latin
    letters: Pillow's built-in font has no others."""
    size = rows[0][1].shape[-1] * ENLARGED
    step_x, step_y = size + GAP_PX, size + GAP_PX + LABEL_PX
    sheet = Image.new("RGB", (step_x * len(SHOWN_FRAMES) + GAP_PX, step_y * len(rows) + GAP_PX), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (label, frames) in enumerate(rows):
        draw.text((GAP_PX, row * step_y + 1), label, fill=INK)
        for column, picture in enumerate(pixels_to_bytes(frames[list(SHOWN_FRAMES)])):
            enlarged = Image.fromarray(picture).resize((size, size), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (GAP_PX + column * step_x, row * step_y + LABEL_PX))
    return sheet


def animation(path: Path, rows: list[list[tuple[str, Tensor]]]) -> None:
    """Writes a GIF of a grid of clips that run together, with labels; every clip [34, 3, H, W] in [-1, 1]."""
    size = rows[0][0][1].shape[-1] * ENLARGED
    step_x, step_y = size + GAP_PX, size + GAP_PX + LABEL_PX
    pictures = []
    for index in range(len(rows[0][0][1])):
        page = Image.new("RGB", (step_x * max(map(len, rows)) + GAP_PX, step_y * len(rows) + GAP_PX), "white")
        draw = ImageDraw.Draw(page)
        for row, clips in enumerate(rows):
            for column, (label, frames) in enumerate(clips):
                draw.text((GAP_PX + column * step_x, row * step_y + 1), label, fill=INK)
                picture = Image.fromarray(pixels_to_bytes(frames[index : index + 1])[0])
                enlarged = picture.resize((size, size), Image.Resampling.NEAREST)
                page.paste(enlarged, (GAP_PX + column * step_x, row * step_y + LABEL_PX))
        pictures.append(page.quantize(48, dither=Image.Dither.NONE))
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=FRAME_MS, loop=0, optimize=True)


def motion_plot(points: list[tuple[float, float]]) -> Image.Image:
    """Measured speed in pixels a frame against motion score, one dot per sample; the line is the true world's."""
    width, height = PLOT_PX
    image = Image.new("RGB", PLOT_PX, "white")
    draw = ImageDraw.Draw(image)
    top = max(MOTION_SCORES) * 1.1
    fastest = max([top * PX_PER_FRAME_AND_SCORE] + [speed for _, speed in points])
    slowest = min([0.0] + [speed for _, speed in points])

    def place(score: float, speed: float) -> tuple[float, float]:
        x = MARGIN_PX + score / top * (width - 2 * MARGIN_PX)
        y = height - MARGIN_PX - (speed - slowest) / (fastest - slowest) * (height - 2 * MARGIN_PX)
        return x, y

    draw.line([place(0, slowest), place(0, fastest)], fill=INK)
    draw.line([place(0, 0), place(top, 0)], fill=INK)
    draw.line([place(0, 0), place(top, top * PX_PER_FRAME_AND_SCORE)], fill=GREY, width=2)
    for score in MOTION_SCORES:
        draw.text(place(score, slowest), f"{score:g}", fill=INK, anchor="ma")
    for speed in (0.0, round(fastest, 1)):
        draw.text((4, place(0, speed)[1] - 6), f"{speed:g}", fill=INK)
    draw.text((width // 2 - 40, height - 16), "motion score", fill=INK)
    draw.text((4, 4), "measured speed, pixels a frame", fill=INK)
    for score, speed in points:
        x, y = place(score, speed)
        draw.ellipse((x - 3, y - 3, x + 3, y + 3), outline=BLUE)
    return image
