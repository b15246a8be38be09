"""Blending at the borders of chunks, frame by frame and as a stream."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from stepvideo_serve.geometry import FRAMES_PER_CHUNK, LATENTS_PER_CHUNK
from stepvideo_serve.vae.chunking import blend_borders, decode_chunks
from tests.mini import normal

FRAME = (3, 4, 6)


def chunks_of(count: int) -> list[Tensor]:
    return [normal(FRAMES_PER_CHUNK, *FRAME, seed=seed) for seed in range(count)]


def blended_at_once(chunks: list[Tensor]) -> Tensor:
    """The rule on the whole video: all first frames from the last ones before them, then these from the new first."""
    video = torch.stack(chunks)
    last, first = video[:-1, -1].clone(), video[1:, 0].clone()
    video[1:, 0] = 0.6 * first + 0.4 * last
    video[:-1, -1] = 0.6 * last + 0.4 * video[1:, 0]
    return video.flatten(0, 1)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6])
def test_a_stream_is_blended_like_the_whole_video(count: int) -> None:
    blended = list(blend_borders(iter(chunks_of(count))))
    assert [len(chunk) for chunk in blended] == [FRAMES_PER_CHUNK] * count
    assert torch.allclose(torch.cat(blended), blended_at_once(chunks_of(count)), atol=1e-6)


def test_a_border_by_hand() -> None:
    black, white = torch.zeros(2, 1, 1, 1), torch.ones(2, 1, 1, 1)
    frames = torch.cat(list(blend_borders([black, white]))).flatten()
    assert frames.tolist() == pytest.approx([0.0, 0.4 * 0.6, 0.6, 1.0])


def test_chunks_of_one_frame_have_two_borders() -> None:
    """The middle frame is blended backwards first, and what it became forwards."""
    frames = torch.cat(list(blend_borders([torch.full((1, 1, 1, 1), value) for value in (0.0, 1.0, 1.0)])))
    second = 0.6
    third = 0.6 * 1.0 + 0.4 * second
    assert frames.flatten().tolist() == pytest.approx([0.4 * second, 0.6 * second + 0.4 * third, third])


def test_nothing_comes_of_nothing() -> None:
    assert list(blend_borders([])) == []


def test_a_chunk_is_handed_out_when_the_next_is_there() -> None:
    made: list[int] = []

    def source() -> Iterator[Tensor]:
        for index, chunk in enumerate(chunks_of(3)):
            made.append(index)
            yield chunk

    stream = blend_borders(source())
    assert made == []
    next(stream)
    assert made == [0, 1]
    next(stream)
    assert made == [0, 1, 2]


def test_each_chunk_of_latents_is_decoded_once_and_in_order() -> None:
    latents = normal(4 * LATENTS_PER_CHUNK, 2, 2, 3)
    seen: list[Tensor] = []

    def decode(chunk: Tensor) -> Tensor:
        seen.append(chunk)
        return torch.zeros(1, FRAMES_PER_CHUNK, *FRAME)

    assert sum(len(frames) for frames in decode_chunks(latents, decode)) == 4 * FRAMES_PER_CHUNK
    assert all(chunk.shape == (1, LATENTS_PER_CHUNK, 2, 2, 3) for chunk in seen)
    assert torch.equal(torch.cat(seen, dim=1)[0], latents)
