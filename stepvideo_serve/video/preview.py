"""A quick look at a latent video without the VAE: a linear map from latent channels to RGB.

F = latent frames, C = latent channels, h and w = height and width in latent cells (16 x 16 pixels each).
"""

from io import BytesIO
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn import functional

from stepvideo_serve.errors import StepVideoError
from stepvideo_serve.geometry import PIXELS_PER_LATENT
from stepvideo_serve.video.mp4 import to_uint8

PREVIEW_SCALE: Final = 4  # preview pixels per latent cell


class LatentPreview:
    """First, middle and last latent frame side by side, as RGB.

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
        """latents [F, C, h, w], any float dtype and device -> uint8 [h * s, 3 * w * s, 3] with s = PREVIEW_SCALE."""
        if latents.ndim != 4 or latents.shape[0] < 1 or latents.shape[1] != self._weight.shape[1]:
            raise StepVideoError(
                f"Latents must be [F, {self._weight.shape[1]}, h, w] with F of at least 1, got {list(latents.shape)}: "
                "use the preview map of this VAE."
            )
        count = latents.shape[0]
        chosen = latents[[0, count // 2, count - 1]].to("cpu", torch.float32)
        rgb = (self._weight @ chosen.flatten(2)).unflatten(2, chosen.shape[2:]) + self._bias[:, None, None]
        size = (chosen.shape[3] * PREVIEW_SCALE, chosen.shape[2] * PREVIEW_SCALE)
        pictures = [Image.fromarray(small).resize(size, Image.Resampling.BILINEAR) for small in to_uint8(rgb)]
        return np.concatenate([np.asarray(picture) for picture in pictures], axis=1)


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


def encode_jpeg(rgb: NDArray[np.uint8], quality: int = 80) -> bytes:
    """uint8 [H, W, 3] -> the bytes of a JPEG; quality 1..95."""
    target = BytesIO()
    Image.fromarray(rgb).save(target, format="JPEG", quality=quality)
    return target.getvalue()
