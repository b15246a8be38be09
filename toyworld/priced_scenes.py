"""The toy world's held-out scenes as requests to price, and what their frames must show."""

from stepvideo_serve.config import ServeConfig
from stepvideo_serve.pipeline.generate import Frames
from stepvideo_serve.request import GenerationRequest
from toyworld.evaluate import held_out_scene, measure, wording
from toyworld.samples import Sampling, bytes_to_pixels, make_request


def scene_request(config: ServeConfig, channels: int, index: int, sampling: Sampling) -> GenerationRequest:
    """Held-out scene `index` with its prompt; the seed is the number of the scene."""
    scene = held_out_scene(index)
    return make_request(config, channels, scene, wording(scene, index), index, sampling, "latents")


def observe(frames: Frames, index: int) -> dict[str, float]:
    """Of frames uint8 [34, 64, 64, 3] for scene `index`: speed along the prompt in pixels a frame, whether the
    direction is as prompted (0 or 1), and the PSNR of the first frame against the image."""
    measured = measure(bytes_to_pixels(frames), held_out_scene(index))
    return {
        "speed": measured.speed,
        "direction": float(measured.direction),
        "first_frame_db": measured.first_frame_db,
    }
