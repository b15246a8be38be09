"""Samples of the checkpoint through the served pipeline, in this process."""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from stepvideo_serve.assembly.stages import LocalStages
from stepvideo_serve.config import DecoderConfig, DenoiserConfig, ModelConfig, ServeConfig
from stepvideo_serve.engine.cores import usable_cores
from stepvideo_serve.pipeline.generate import Result, Stages, generate
from stepvideo_serve.request import GenerationRequest, parse_request
from toyworld.world import FRAMES, SIZE_PX, Scene, render

STEPS: Final = 20
TIME_SHIFT: Final = 7.0
CFG_SCALE: Final = 4.0


@dataclass(frozen=True)
class Sampling:
    """How a sample is drawn."""

    steps: int = STEPS
    time_shift: float = TIME_SHIFT
    cfg_scale: float = CFG_SCALE


def serve_config(
    checkpoint: Path, precision: str = "fp32", threads: int = 1, engines: Path | None = None
) -> ServeConfig:
    """Eager torch on the checkpoint itself, or ONNX Runtime on exported graphs where `engines` is their folder."""
    backend: Any = "eager" if engines is None else "ort"
    kind: Any = precision
    return ServeConfig(
        model=ModelConfig(checkpoint, engines or checkpoint, backend, kind),
        denoiser=DenoiserConfig(threads=threads),
        decoder=DecoderConfig(threads=threads),
    )


def sample(
    stages: Stages,
    config: ServeConfig,
    scene: Scene,
    prompt: str,
    seed: int,
    sampling: Sampling,
    output: str = "frames",
) -> NDArray[Any]:
    """One generation from the scene's first image, with its motion score: frames uint8 [34, 64, 64, 3], or latents
    fp32 [6, C, 4, 4]."""
    request = make_request(config, stages.latent_channels, scene, prompt, seed, sampling, output)
    *_, result = generate(request, stages, config.video, cancelled=lambda: False)
    assert isinstance(result, Result)
    values = result.frames if output == "frames" else result.latents
    assert values is not None
    return values


def make_request(
    config: ServeConfig, channels: int, scene: Scene, prompt: str, seed: int, sampling: Sampling, output: str
) -> GenerationRequest:
    """The request that a client would send; suffix and negative prompt are the defaults."""
    numbers = {"NUM_FRAMES": FRAMES, "HEIGHT": SIZE_PX, "WIDTH": SIZE_PX, "STEPS": sampling.steps}
    reals = {
        "CFG_SCALE": sampling.cfg_scale,
        "TIME_SHIFT": sampling.time_shift,
        "MOTION_SCORE": scene.motion_score,
    }
    inputs: dict[str, NDArray[Any]] = {
        **{name: np.array([value], np.int32) for name, value in numbers.items()},
        **{name: np.array([value], np.float32) for name, value in reals.items()},
        "SEED": np.array([seed], np.int64),
        "PROMPT": np.array([prompt.encode()], np.object_),
        "IMAGE": np.array([png(first_image(scene))], np.object_),
        "OUTPUT": np.array([output.encode()], np.object_),
    }
    return parse_request(inputs, config.limits, channels)


def local_stages(config: ServeConfig) -> LocalStages:
    """The pipeline's stages in this process."""
    torch.set_num_threads(config.decoder.threads or usable_cores())
    return LocalStages(config)


def first_image(scene: Scene) -> NDArray[np.uint8]:
    """Frame 0 as uint8 [64, 64, 3]."""
    image: NDArray[np.uint8] = pixels_to_bytes(render(scene, 0, 1))[0]
    return image


def pixels_to_bytes(frames: Tensor) -> NDArray[np.uint8]:
    """fp32 [F, 3, H, W] in [-1, 1] -> uint8 [F, H, W, 3], rounded."""
    scaled = ((frames.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return scaled.movedim(1, -1).contiguous().numpy()


def bytes_to_pixels(frames: NDArray[np.uint8]) -> Tensor:
    """The inverse of `pixels_to_bytes`."""
    return torch.from_numpy(frames).movedim(-1, 1).float() / 127.5 - 1


def png(image: NDArray[np.uint8]) -> bytes:
    """uint8 [H, W, 3] as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()
