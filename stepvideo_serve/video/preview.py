"""A quick look at a latent video without the VAE: a linear map from latent channels to RGB, and two kinds of file.

Who denoises makes the small pictures; who answers the request makes the file of them that its caller has asked for.
F = latent frames, C = latent channels, h and w = height and width in latent cells (16 x 16 pixels each).
"""

from collections.abc import Mapping
from io import BytesIO
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn import functional

from stepvideo_serve.errors import StepVideoError
from stepvideo_serve.geometry import FRAMES_PER_CHUNK, LATENTS_PER_CHUNK, PIXELS_PER_LATENT
from stepvideo_serve.request import PREVIEW_JPEG, PREVIEW_WEBP
from stepvideo_serve.video.mp4 import to_uint8

PREVIEW_SCALE: Final = 4  # pixels of a JPEG per latent cell
ANIMATION_SCALE: Final = 2  # pixels of an animation per latent cell: the viewer's own enlargement shows as much
ANIMATION_QUALITY: Final = 60
SUFFIXES: Final[Mapping[str, str]] = {PREVIEW_JPEG: ".jpg", PREVIEW_WEBP: ".webp"}
"""Format of a preview -> what its file's name ends in."""


class LatentPreview:
    """Latent frames as RGB, a pixel per cell.

    weight fp32 [3, C] and bias fp32 [3] map a latent cell to its mean colour in [-1, 1]; see `fit_latent_rgb`.
    Raises StepVideoError when the shapes do not fit.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        if weight.ndim != 2 or weight.shape[0] != 3 or bias.shape != (3,):
            raise StepVideoError(
                "A preview map must be a weight [3, C] and a bias [3], "
                f"got {list(weight.shape)} and {list(bias.shape)}: fit it again."
            )
        self._weight = weight.to(torch.float32)
        self._bias = bias.to(torch.float32)

    @torch.no_grad()
    def render(self, latents: torch.Tensor) -> NDArray[np.uint8]:
        """latents [F, C, h, w], any float dtype and device -> uint8 [F, h, w, 3]. Raises StepVideoError for others."""
        if latents.ndim != 4 or latents.shape[0] < 1 or latents.shape[1] != self._weight.shape[1]:
            raise StepVideoError(
                f"Latents must be [F, {self._weight.shape[1]}, h, w] with F of at least 1, got {list(latents.shape)}: "
                "use the preview map of this VAE."
            )
        values = latents.to("cpu", torch.float32)
        rgb = (self._weight @ values.flatten(2)).unflatten(2, values.shape[2:]) + self._bias[:, None, None]
        return to_uint8(rgb)


def fit_latent_rgb(
    latents: torch.Tensor, images: torch.Tensor, ridge: float = 1e-3
) -> tuple[torch.Tensor, torch.Tensor]:
    """The least-squares map from latent cells to their mean colours: weight fp32 [3, C], bias fp32 [3].

    latents [N, C, h, w] of images [N, 3, 16h, 16w] in [-1, 1]. `ridge` (relative to the mean channel variance) keeps
    unused channels at weight 0; the bias is not penalised. Raises StepVideoError when the shapes do not fit.
    """
    count, channels, height, width = latents.shape
    expected = (count, 3, height * PIXELS_PER_LATENT, width * PIXELS_PER_LATENT)
    if images.shape != expected:
        raise StepVideoError(
            f"Images must be {list(expected)} for latents {list(latents.shape)}, got {list(images.shape)}: "
            "encode these images."
        )
    cells = latents.to(torch.float64).movedim(1, -1).reshape(-1, channels)
    colours = functional.avg_pool2d(images.to(torch.float64), PIXELS_PER_LATENT).movedim(1, -1).reshape(-1, 3)
    cell_mean, colour_mean = cells.mean(0), colours.mean(0)
    centred = cells - cell_mean
    gram = centred.T @ centred
    penalty = ridge * gram.diagonal().mean().clamp_min(1e-9)
    weight = torch.linalg.solve(gram + penalty * torch.eye(channels), centred.T @ (colours - colour_mean)).T
    bias = colour_mean - weight @ cell_mean
    return weight.to(torch.float32), bias.to(torch.float32)


def encode_preview(frames: NDArray[np.uint8], preview_format: str) -> bytes:
    """frames uint8 [F, h, w, 3] -> the file: `jpeg` or `webp`."""
    return {PREVIEW_JPEG: encode_jpeg, PREVIEW_WEBP: encode_webp}[preview_format](frames)


def encode_jpeg(frames: NDArray[np.uint8], quality: int = 80) -> bytes:
    """The first, the middle and the last of frames uint8 [F, h, w, 3] side by side, [h * s, 3 * w * s] with s =
    PREVIEW_SCALE; quality 1..95."""
    chosen = [frames[index] for index in (0, len(frames) // 2, len(frames) - 1)]
    row = np.concatenate([np.asarray(_enlarged(frame, PREVIEW_SCALE)) for frame in chosen], axis=1)
    target = BytesIO()
    Image.fromarray(row).save(target, format="JPEG", quality=quality)
    return target.getvalue()


def encode_webp(frames: NDArray[np.uint8], fps: float = 25.0) -> bytes:
    """frames uint8 [F, h, w, 3] as an animation without end, [h * s, w * s] with s = ANIMATION_SCALE, at the speed of a
    video of `fps`. Frames that are equal to the one before become one picture that is shown longer."""
    first, *others = (_enlarged(frame, ANIMATION_SCALE) for frame in frames)
    shown_ms = round(1000 * FRAMES_PER_CHUNK / LATENTS_PER_CHUNK / fps)
    target = BytesIO()
    options = {"duration": shown_ms, "loop": 0, "quality": ANIMATION_QUALITY, "method": 0}
    first.save(target, format="WEBP", save_all=True, append_images=others, **options)
    return target.getvalue()


def _enlarged(frame: NDArray[np.uint8], scale: int) -> Image.Image:
    height, width, _ = frame.shape
    return Image.fromarray(frame).resize((width * scale, height * scale), Image.Resampling.BILINEAR)
