"""Fits the map from latent to colour that previews use (stepvideo_serve/video/preview.py) to a checkpoint's VAE."""

import torch
from torch import Tensor
from torch.nn import functional as F

from stepvideo_serve.assembly.checkpoint import Checkpoint
from stepvideo_serve.video.preview import fit_latent_rgb

IMAGES = 24
SIDE_PX = 64
COARSE = 4


def fit_preview(checkpoint: Checkpoint) -> dict[str, list[list[float]] | list[float]]:
    """Least squares on the latents of smooth random images; weight [3][C] and bias [3], as JSON."""
    encoder = checkpoint.vae_encoder()
    images = smooth_images()
    with torch.inference_mode():
        latents = torch.cat([encoder(image[None, None])[0][:, 0] for image in images])
    weight, bias = fit_latent_rgb(latents, images)
    return {"weight": weight.tolist(), "bias": bias.tolist()}


def smooth_images(seed: int = 0) -> Tensor:
    """[24, 3, 64, 64] in [-1, 1]: random colours on a coarse grid, blended between."""
    coarse = torch.rand(IMAGES, 3, COARSE, COARSE, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return F.interpolate(coarse, size=(SIDE_PX, SIDE_PX), mode="bilinear", align_corners=True)
