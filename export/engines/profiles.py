"""Which sizes an engine is built for: the ranges of its graph, narrowed to the videos that are asked for."""

import re
from collections.abc import Sequence
from dataclasses import replace

from stepvideo_serve.engine.spec import Dim, EngineSpec
from stepvideo_serve.errors import ExportError, InvalidRequest
from stepvideo_serve.geometry import VideoGeometry

LEAST_VIDEO_TOKENS = 32  # below, FP8 attention writes its scores to memory
WHOLE_TOKENS = "dit_core"  # the graphs that see all tokens where a layout divides them


def parse_shapes(text: str) -> tuple[VideoGeometry, ...]:
    """ "544x992x102,256x256x34" (height x width x frames) -> videos, the one to tune for first. Raises ExportError."""
    videos = []
    for item in text.split(","):
        match = re.fullmatch(r"(\d+)x(\d+)x(\d+)", item.strip())
        if match is None:
            raise ExportError(f"--shapes must be HEIGHTxWIDTHxFRAMES, several with commas, got {item!r}: correct it.")
        height, width, frames = map(int, match.groups())
        try:
            videos.append(VideoGeometry.checked(frames, height, width))
        except InvalidRequest as error:
            raise ExportError(f"--shapes {item}: {error}") from None
    return tuple(videos)


def profile_spec(spec: EngineSpec, videos: Sequence[VideoGeometry], fixed: bool, token_parts: int = 1) -> EngineSpec:
    """`spec` with the ranges that the engine is built for.

    videos       the largest bounds the ranges above, the first is tuned for; none: the ranges of `spec`
    fixed        the sizes of the one video only; lengths of texts stay open
    token_parts  among how many ranks the layout divides the tokens
    Raises ExportError for sizes outside the ranges of `spec`, and for `fixed` with none or several videos.
    """
    if fixed and len(videos) != 1:
        raise ExportError(f"--fixed builds for one size, got {len(videos)}: give one with --shapes.")
    parts = 1 if spec.name.startswith(WHOLE_TOKENS) else token_parts
    sizes = {
        "tokens": [-(-video.tokens // parts) for video in videos],
        "latent_height": [video.latent_height for video in videos],
        "latent_width": [video.latent_width for video in videos],
    }
    return replace(spec, dims={name: _narrow(name, dim, sizes.get(name, []), fixed) for name, dim in spec.dims.items()})


def _narrow(name: str, dim: Dim, sizes: list[int], fixed: bool) -> Dim:
    least = max(dim.min, LEAST_VIDEO_TOKENS) if name == "tokens" else dim.min
    if not sizes:
        return Dim(least, max(dim.opt, least), dim.max)
    if min(sizes) < least or max(sizes) > dim.max:
        raise ExportError(
            f"--shapes must give {name} of {least} .. {dim.max}, got {', '.join(map(str, sizes))}: "
            "choose other sizes, or a layout with fewer ranks."
        )
    return Dim(sizes[0], sizes[0], sizes[0]) if fixed else Dim(least, sizes[0], max(sizes))
