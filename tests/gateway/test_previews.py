"""Previews of a run, from the server over the gateway's events to whoever watches."""

import base64
import io
import json
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from PIL import Image

from stepvideo_gateway import media
from tests.gateway.conftest import Running, create, health, until

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")
BODY: dict[str, Any] = {"num_frames": 34, "num_inference_steps": 200, "guidance_scale": 4.0, "preview_format": "webp"}


def events(running: Running, video_id: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and data of each, until the gateway ends the stream."""
    with urllib.request.urlopen(f"{running.url}/v1/videos/{video_id}/events") as stream:
        name = ""
        for line in stream:
            if line.startswith(b"event: "):
                name = line[7:].decode().strip()
            elif line.startswith(b"data: "):
                yield name, json.loads(line[6:])


def test_whoever_watches_sees_the_run_move(start: Callable[..., Running], picture: bytes, tmp_path: Path) -> None:
    running, other = start(), start()
    until(lambda: health(running)["well"], "the server to be seen")
    plain = create(running, picture)
    names = [(name, sorted(data)) for name, data in events(running, plain.id)]
    assert {name for name, _ in names} <= {"video.progress", "video.completed"}, "nobody asked for previews"
    video = create(running, picture, size="192x192", extra_body=BODY)
    with urllib.request.urlopen(f"{running.url}/v1/videos/{video.id}") as answer:
        fields = sorted(json.load(answer))
    seen: list[dict[str, Any]] = []
    for name, data in events(other, video.id):
        if name == "video.preview":
            seen.append(data)
        else:
            assert (name, sorted(data)) == ("video.progress", fields), "the other events are as they were"
        if len(seen) == 3:
            break
    assert [sorted(data) for data in seen] == [["data", "id", "media_type", "step"]] * 3
    assert {(data["id"], data["media_type"]) for data in seen} == {(video.id, "image/webp")}
    steps = [data["step"] for data in seen]
    assert steps == sorted(set(steps))
    assert len({data["data"] for data in seen}) == 3
    with Image.open(io.BytesIO(base64.b64decode(seen[-1]["data"]))) as image:
        assert (image.format, getattr(image, "n_frames", 1)) == ("WEBP", 6)
    folder = tmp_path / "videos" / video.id
    assert (folder / "preview.json").stat().st_mode & 0o777 == 0o600
    running.client().videos.delete(video.id)
    until(lambda: not folder.exists(), "the job to be erased")


def test_nothing_is_left_of_previews_when_the_video_is_there(
    start: Callable[..., Running], picture: bytes, tmp_path: Path
) -> None:
    running = start(videos="mark = true")
    until(lambda: health(running)["well"], "the server to be seen")
    body = {"num_frames": 17, "num_inference_steps": 60, "guidance_scale": 4.0, "preview_format": "jpeg"}
    video = create(running, picture, extra_body=body)
    heard = list(events(running, video.id))
    assert heard[-1][0] == "video.completed"
    kinds = {data["media_type"] for name, data in heard if name == "video.preview"}
    assert kinds == {"image/jpeg"}
    assert sorted(path.name for path in (tmp_path / "videos" / video.id).iterdir()) == ["input", "video.mp4"]
    content = running.client().videos.download_content(video.id).read()
    (tmp_path / "video.mp4").write_bytes(content)
    assert len(list(media.frames(tmp_path / "video.mp4"))) == 17
    assert b"guidance" in content or b"cfg_scale" in content
    assert b"preview" not in content, "how a run was watched is no setting of its video"


def test_another_format_is_refused_at_once(start: Callable[..., Running], picture: bytes) -> None:
    running = start()
    with pytest.raises(openai.BadRequestError) as refused:
        create(running, picture, extra_body={**BODY, "preview_format": "gif"})
    assert refused.value.param == "preview_format"
    assert "preview_format must be one of jpeg, webp, got 'gif'" in refused.value.message
