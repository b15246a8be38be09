"""Real input: the prompt and image pairs of the public evaluation set, through the client and the real server."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stepvideo_client import Client, Result
from stepvideo_serve.launch.server import TritonServer
from tests.video.decode import decode_mp4

NAMES = (
    "ani_H_033",
    "ani_S_032",
    "ani_S_047",
    "ani_V_036",
    "real_H_011",
    "real_H_086",
    "real_H_161",
    "real_V_137",
)
FRAMES, HEIGHT, WIDTH = 34, 64, 112


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_pair_becomes_a_playable_video(triton: TritonServer, shared: Path, name: str) -> None:
    image = shared / "eval" / f"{name}.png"
    prompt = image.with_suffix(".txt").read_text(encoding="utf-8").strip()
    with Image.open(image) as picture:
        assert picture.width > WIDTH
    with Client(triton.grpc_url) as client:
        *steps, result = client.generate(image, prompt, num_frames=FRAMES, height=HEIGHT, width=WIDTH, steps=2, seed=1)
    assert [step.step for step in steps if not isinstance(step, Result)][-1] == 2
    assert isinstance(result, Result)
    assert result.video is not None
    frames, stream = decode_mp4(result.video)
    assert "25 fps" in stream
    assert frames.shape == (FRAMES, HEIGHT, WIDTH, 3)
    assert np.ptp(frames) > 20


def test_all_pairs_are_tried(shared: Path) -> None:
    assert sorted(path.stem for path in (shared / "eval").glob("*.png")) == sorted(NAMES)
