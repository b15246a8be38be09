"""From latents to a stream of uint8 frames, a chunk at a time.

Chunks of 3 latents decode independently to 17 frames; at each border the two frames that meet are then blended, so
the last frame of a chunk can be handed out only when the next chunk is there.
Source: Step-Video-T2V report (arXiv 2502.10248), section 4.1 (the decoder's chunking).
"""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from stepvideo_serve.geometry import LATENTS_PER_CHUNK

KEEP = 0.6

ChunkDecoder = Callable[[Tensor], Tensor]
"""latents [1, 3, C, h, w] -> frames [1, 17, 3, 16h, 16w]."""


def decode_chunks(latents: Tensor, decode: ChunkDecoder) -> Iterator[Tensor]:
    """Decodes latents [F, C, h, w] in order; yields float frames [n, 3, H, W], blended, at most 17 at a time."""
    chunks = latents.split(LATENTS_PER_CHUNK)
    return blend_borders(decode(chunk[None])[0] for chunk in chunks)


def blend_borders(chunks: Iterable[Tensor]) -> Iterator[Tensor]:
    """Blends the frames on both sides of each border: first = 0.6 first + 0.4 last, then last = 0.6 last + 0.4 first.

    Takes chunks [n, 3, H, W] (owned by this function from then on), yields as many frames as come in.
    """
    held: Tensor | None = None
    for chunk in chunks:
        if held is None:
            held = chunk
            continue
        last, first = held[-1], chunk[0]
        chunk[0] = KEEP * first + (1 - KEEP) * last
        held[-1] = KEEP * last + (1 - KEEP) * chunk[0]
        yield held
        held = chunk
    if held is not None:
        yield held


def sample_posterior(mean: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
    """mean + exp(logvar / 2) * noise."""
    return mean + torch.exp(0.5 * logvar) * noise
