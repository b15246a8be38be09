"""/v1/videos with the official client against gateway, Triton and ranks."""

import io
import json
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest
from PIL import Image

from stepvideo_gateway import media
from tests.gateway.conftest import SMALL, Running, create, health, until

# OpenAI has ended its own service; the format lives on.
pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")

LONG: dict[str, Any] = {
    "size": "192x192",
    "extra_body": {"num_frames": 34, "num_inference_steps": 200, "guidance_scale": 4.0},
}


@pytest.fixture
def gateway(start: Callable[..., Running]) -> Running:
    running = start()
    until(lambda: health(running)["well"], "the server to be seen")
    return running


def test_create_and_poll_and_download(gateway: Running, picture: bytes, tmp_path: Path) -> None:
    client = gateway.client()
    reference = ("first.png", picture, "image/png")
    video = client.videos.create_and_poll(prompt="a cat", input_reference=reference, **SMALL)
    assert video.status == "completed", video.error
    assert (video.progress, video.size, video.seconds, video.model) == (100, "96x64", "0.68", "step-video-ti2v")
    assert video.completed_at is not None
    assert video.completed_at >= video.created_at
    content = client.videos.download_content(video.id).read()
    path = tmp_path / "video.mp4"
    path.write_bytes(content)
    frames = list(media.frames(path))
    assert len(frames) == 17
    thumbnail = Image.open(io.BytesIO(client.videos.download_content(video.id, variant="thumbnail").read()))
    assert thumbnail.format == "WEBP"
    assert thumbnail.size == frames[0].size
    sheet = Image.open(io.BytesIO(client.videos.download_content(video.id, variant="spritesheet").read()))
    assert sheet.size == tuple(5 * side for side in frames[0].size)
    request = urllib.request.Request(f"{gateway.url}/v1/videos/{video.id}/content", headers={"Range": "bytes=4-7"})
    with urllib.request.urlopen(request) as part:
        assert (part.status, part.read()) == (206, b"ftyp")
        assert part.headers["etag"]


def test_json_and_a_data_url_mean_the_same(gateway: Running, picture: bytes) -> None:
    import base64

    url = f"data:image/png;base64,{base64.b64encode(picture).decode()}"
    body = {
        "prompt": "a cat",
        "size": "96x64",
        "num_frames": 17,
        "num_inference_steps": 2,
        "input_reference": {"image_url": url},
    }
    request = urllib.request.Request(
        f"{gateway.url}/v1/videos", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request) as answer:
        video = json.load(answer)
        assert int(answer.headers["openai-poll-after-ms"]) >= 500
    assert video["status"] == "queued"
    assert gateway.client().videos.poll(video["id"]).status == "completed"


def test_progress_is_live_and_deleting_ends_the_run(gateway: Running, picture: bytes) -> None:
    client = gateway.client()
    video = create(gateway, picture, **LONG)
    until(lambda: client.videos.retrieve(video.id).status == "in_progress", "the run to begin")
    until(lambda: client.videos.retrieve(video.id).progress >= 1, "progress")
    deleted = client.videos.delete(video.id)
    assert (deleted.id, deleted.deleted, deleted.object) == (video.id, True, "video.deleted")
    with pytest.raises(openai.NotFoundError):
        client.videos.retrieve(video.id)
    after = client.videos.create_and_poll(
        prompt="a dog", input_reference=("first.png", picture, "image/png"), poll_interval_ms=200, **SMALL
    )
    assert after.status == "completed", "the ranks are free"


def test_list_pages_in_both_orders(gateway: Running, picture: bytes) -> None:
    ids = [create(gateway, picture).id for _ in range(5)]
    client = gateway.client()
    first = client.videos.list(limit=2)
    assert [video.id for video in first.data] == ids[:2:-1]
    assert first.has_more
    assert [video.id for video in client.videos.list(limit=2)] == ids[::-1], "the client follows the pages"
    assert [video.id for video in client.videos.list(order="asc", limit=3).data] == ids[:3]
    for video_id in ids:
        client.videos.delete(video_id)
    assert client.videos.list().data == []


def test_remix_and_extension(gateway: Running, picture: bytes) -> None:
    client = gateway.client()
    reference = ("first.png", picture, "image/png")
    first = client.videos.create_and_poll(prompt="a cat", input_reference=reference, **SMALL)
    remixed = client.videos.remix(first.id, prompt="a dog")
    assert (remixed.remixed_from_video_id, remixed.size, remixed.seconds) == (first.id, first.size, first.seconds)
    assert client.videos.poll(remixed.id).status == "completed"
    body = json.dumps({"prompt": "the cat leaves", "num_inference_steps": 2}).encode()
    request = urllib.request.Request(
        f"{gateway.url}/v1/videos/{first.id}/extension", body, {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request) as answer:
        extension = json.load(answer)
    assert client.videos.poll(extension["id"]).status == "completed"


def test_the_same_key_is_the_same_job(gateway: Running, picture: bytes) -> None:
    first, again = (create(gateway, picture, extra_headers={"Idempotency-Key": "k"}) for _ in range(2))
    assert first.id == again.id
    with pytest.raises(openai.UnprocessableEntityError) as refused:
        create(gateway, picture, prompt="a dog", extra_headers={"Idempotency-Key": "k"})
    assert refused.value.code == "idempotency_mismatch"


@pytest.mark.parametrize(
    ("more", "param", "sentence"),
    [
        ({"size": "100x64"}, "size", "96x64 is the nearest"),
        ({"size": "large"}, "size", "size must be WIDTHxHEIGHT"),
        ({"extra_body": {"num_frames": 20}}, "num_frames", "17 is the nearest"),
        ({"extra_body": {"num_frames": 34_000}}, "num_frames", "NUM_FRAMES"),
        ({"extra_body": {"fps": 24}}, "fps", "fps must be 25"),
        ({"extra_body": {"seed": -1}}, "seed", "seed must be a whole number from 0"),
        ({"extra_body": {"num_inference_steps": "many"}}, "num_inference_steps", "a whole number"),
        ({"extra_body": {"num_inference_steps": 10_000_000}}, "num_inference_steps", "STEPS must be"),
        ({"extra_body": {"quality": "none such"}}, "quality", "QUALITY"),
        ({"extra_body": {"sped": 3}}, "sped", "There is no field 'sped'"),
        ({"model": "sora-2"}, "model", "model must be 'step-video-ti2v'"),
        ({"prompt": " "}, "prompt", "prompt is required"),
        ({"input_reference": ("x.png", b"no picture", "image/png")}, "input_reference", "PNG, JPEG or WebP"),
        ({"input_reference": openai.omit}, "input_reference", "input_reference is required"),
        ({"extra_body": {"camera": "sideways"}}, "camera", "camera must be one of"),
        ({"extra_body": {"priority": "now"}}, "priority", "priority must be one of"),
    ],
)
def test_bad_input_is_refused_at_once(
    gateway: Running, picture: bytes, more: dict[str, Any], param: str, sentence: str
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        create(gateway, picture, **more)
    assert (refused.value.param, refused.value.type) == (param, "invalid_request_error")
    assert sentence in refused.value.message
    assert gateway.client().videos.list().data == []
