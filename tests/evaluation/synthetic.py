"""Clips whose figures can be told by hand, and folders of them as `stepvideo batch` writes."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from stepvideo_client.evaluation.results import Clip, append
from stepvideo_serve.video.mp4 import Mp4Encoder

Frame = NDArray[np.uint8]

EXACT: dict[str, Any] = {"preset": "exact", "rule": "exact", "guidance_from": 0.0, "guidance_to": 1.0}
BALANCED: dict[str, Any] = {
    "preset": "balanced",
    "rule": "adaptive",
    "tolerance": 0.1,
    "dense_start": 0.01,
    "dense_end": 0.6,
    "longest_streak": 8,
    "guidance_from": 0.0,
    "guidance_to": 1.0,
}


def plain(level: float, height: int = 64, width: int = 96) -> Frame:
    """A grey picture."""
    return np.full((height, width, 3), level, np.uint8)


def checkerboard(low: int, high: int, height: int = 64, width: int = 96) -> Frame:
    """Fields of one pixel."""
    y, x = np.mgrid[0:height, 0:width]
    return np.where((x + y) % 2 == 0, low, high).astype(np.uint8)[..., None].repeat(3, axis=2)


def texture(height: int, width: int, seed: int = 0) -> Frame:
    """Smooth noise, in which any motion can be seen."""
    noise = np.random.default_rng(seed).normal(size=(height, width, 3)).astype(np.float32)
    smooth = cv2.GaussianBlur(noise, (0, 0), 3)
    return np.asarray((128 + 40 * smooth / smooth.std()).clip(0, 255), np.uint8)


def moving(steps: Iterable[tuple[int, int]], height: int = 128, width: int = 160) -> list[Frame]:
    """A window that goes over a texture by these steps (x, y), in whole pixels; one frame more than steps."""
    places = np.cumsum([(0, 0), *steps], axis=0)
    places -= places.min(axis=0)
    right, down = places.max(axis=0)
    ground = texture(height + down, width + right)
    return [ground[y : y + height, x : x + width] for x, y in places]


def write_mp4(path: Path, frames: Sequence[Frame], crf: int = 10) -> None:
    """As the server encodes, but finer."""
    height, width = frames[0].shape[:2]
    with Mp4Encoder(height, width, crf=crf) as encoder:
        encoder.write(np.stack(frames))
        path.write_bytes(encoder.finish())


def write_clip(
    folder: Path,
    name: str,
    frames: Sequence[Frame],
    latents: NDArray[np.float32] | None = None,
    quality: dict[str, Any] = EXACT,
    motion: float = 5.0,
    change: Callable[[dict[str, Any]], object] = dict.copy,
) -> None:
    """Adds a clip to the folder. quality: the preset, of whose 10 steps exact evaluates all and others 4. motion: its
    MOTION_SCORE. change: is given the Clip's values to edit."""
    for part in ("videos", "latents", "pictures"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    video, image = folder / "videos" / f"{name}-0.mp4", folder / "pictures" / f"{name}.png"
    write_mp4(video, frames)
    Image.fromarray(frames[0]).save(image)
    if latents is not None:
        np.save(folder / "latents" / f"{name}-0.npy", latents)
    mask = "1" * 10 if quality["rule"] == "exact" else "1100100001"
    report = {
        "frames": len(frames),
        "height": frames[0].shape[0],
        "width": frames[0].shape[1],
        "steps": 10,
        "step_seconds": [0.5 if digit == "1" else 0.0 for digit in mask],
        "quality": {**quality, "mask": mask, "evaluations": mask.count("1"), "guided_share": 1.0},
        "image": {"colours": "sRGB"},
        "precision": "fp32",
        "backend": "ort",
        "layout": "single",
        "checkpoint": "abc",
    }
    values: dict[str, Any] = {
        "id": name,
        "index": 0,
        "video": f"videos/{name}-0.mp4",
        "image": str(image),
        "prompt": f"a prompt <of> {name}",
        "motion": motion,
        "seed": 7,
        "preset": quality["preset"],
        "request": {"steps": 10, "cfg_scale": 4.0, "time_shift": 7.0, "quality": quality["preset"]},
        "report": report,
        "evaluations_mask": [int(digit) for digit in mask],
        "latents": None if latents is None else f"latents/{name}-0.npy",
        "server": "127.0.0.1:8001",
        "seconds": 6.0,
    }
    change(values)
    append(folder, Clip(**values))
