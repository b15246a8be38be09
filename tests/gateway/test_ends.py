"""How jobs end, and what is left of them: failed, cancelled at the server, content, events, deletion."""

import base64
import io
import json
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest
from PIL import Image

from stepvideo_client import Client
from stepvideo_gateway import media
from stepvideo_gateway.fields import FIELDS
from stepvideo_gateway.openapi import PROPERTIES, VIDEO
from tests.gateway.conftest import SMALL, Running, create, health, until
from tests.serving.calls import Server

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")

ENDLESS: dict[str, Any] = {**SMALL["extra_body"], "num_inference_steps": 100_000}
PROMPT = "an unmistakable lapwing"


@pytest.fixture
def gateway(start: Callable[..., Running]) -> Running:
    running = start()
    until(lambda: health(running)["well"], "the server to be seen")
    return running


def get(url: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
    request = urllib.request.Request(url, headers={name.replace("_", "-"): value for name, value in headers.items()})
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, dict(answer.headers), answer.read()
    except urllib.error.HTTPError as error:
        return error.code, dict(error.headers), error.read()


def test_a_run_that_is_cancelled_at_the_server_is_a_failed_video(
    gateway: Running, server: Server, picture: bytes
) -> None:
    client = gateway.client()
    video = create(gateway, picture, extra_body=ENDLESS)
    until(lambda: client.videos.retrieve(video.id).status == "in_progress", "the run to begin")
    with Client(server.grpc_url) as directly:
        assert directly.cancel(video.id)
    ended = client.videos.poll(video.id, poll_interval_ms=200)
    assert ended.status == "failed"
    assert ended.error is not None
    assert ended.error.code == "cancelled"
    with pytest.raises(openai.NotFoundError) as refused:
        client.videos.download_content(video.id)
    assert (refused.value.code, refused.value.response.headers["x-should-retry"]) == ("video_not_ready", "false")
    assert [each.status for each in client.videos.list().data] == ["failed"]
    assert client.videos.delete(video.id).deleted


def test_what_the_server_refuses_later_is_a_failed_video(start: Callable[..., Running], picture: bytes) -> None:
    """While no server was ready, nobody could tell."""
    nobody = start(urls=("127.0.0.1:1",))
    video = create(nobody, picture, extra_body={**SMALL["extra_body"], "num_inference_steps": 10_000_000})
    nobody.process.terminate()
    nobody.process.wait(30)
    failed = start().client().videos.poll(video.id, poll_interval_ms=200)
    assert failed.status == "failed"
    assert failed.error is not None
    assert failed.error.code == "invalid_request"
    assert failed.error.message.startswith("STEPS must be")


def test_pictures_come_as_bytes_as_files_and_as_paths(gateway: Running, picture: bytes, tmp_path: Path) -> None:
    """Raw bytes have the name "upload" and no type of a picture."""
    path = tmp_path / "first.png"
    path.write_bytes(picture)
    client = gateway.client()
    ids = [create(gateway, picture, input_reference=each).id for each in (picture, io.BytesIO(picture), path)]
    assert {client.videos.poll(video_id, poll_interval_ms=200).status for video_id in ids} == {"completed"}
    assert len({client.videos.download_content(video_id).read() for video_id in ids}) == 1, "the same picture and seed"


def test_content_in_parts_and_only_when_it_has_changed(gateway: Running, picture: bytes) -> None:
    video = create(gateway, picture)
    assert gateway.client().videos.poll(video.id, poll_interval_ms=200).status == "completed"
    for variant, first, kind in (
        ("video", b"\0\0\0", "video/mp4"),
        ("thumbnail", b"RIFF", "image/webp"),
        ("spritesheet", b"RIFF", "image/webp"),
    ):
        url = f"{gateway.url}/v1/videos/{video.id}/content?variant={variant}"
        status, headers, whole = get(url)
        assert (status, headers["content-type"], headers["accept-ranges"]) == (200, kind, "bytes")
        assert int(headers["content-length"]) == len(whole)
        status, part_headers, part = get(url, range=f"bytes=0-{len(first) - 1}")
        assert (status, part) == (206, first)
        assert part_headers["content-range"] == f"bytes 0-{len(first) - 1}/{len(whole)}"
        assert get(url, range="bytes=-5")[2] == whole[-5:]
        assert get(url, range=f"bytes={len(whole)}-")[0] == 416
        assert get(url, range="bytes=0-3", if_range='"another"')[::2] == (200, whole)
        for known in (headers["etag"], f'"another", W/{headers["etag"]}', "*"):
            assert get(url, if_none_match=known)[::2] == (304, b"")
        assert get(url, if_none_match='"another"')[0] == 200
    assert get(f"{gateway.url}/v1/videos/{video.id}/content?variant=poster")[0] == 400


def test_events_tell_the_wait_and_show_previews(gateway: Running, picture: bytes) -> None:
    first = create(gateway, picture, extra_body={**SMALL["extra_body"], "num_inference_steps": 100})
    body = {**SMALL["extra_body"], "num_inference_steps": 40, "preview_format": "jpeg"}
    second = create(gateway, picture, extra_body=body)
    with urllib.request.urlopen(f"{gateway.url}/v1/videos/{second.id}/events") as stream:
        lines = [line.decode().rstrip("\n") for line in stream]
    names = [line[7:] for line in lines if line.startswith("event: ")]
    told = [json.loads(line[6:]) for line in lines if line.startswith("data: ")]
    assert (names[0], names[-1]) == ("video.progress", "video.completed")
    assert any(each.get("queue_position") == 1 and each["start_in_s"] >= 0 for each in told)
    previews = [each for name, each in zip(names, told, strict=True) if name == "video.preview"]
    assert previews
    for each in previews:
        assert (each["id"], each["media_type"]) == (second.id, "image/jpeg")
        assert Image.open(io.BytesIO(base64.b64decode(each["data"]))).format == "JPEG"
    assert gateway.client().videos.retrieve(first.id).status == "completed"


def test_deleting_leaves_nothing(gateway: Running, picture: bytes, tmp_path: Path) -> None:
    """Neither prompt nor files, also in what SQLite has beside its tables."""
    client = gateway.client()
    done = create(gateway, picture, prompt=PROMPT)
    assert client.videos.poll(done.id, poll_interval_ms=200).status == "completed"
    for variant in ("thumbnail", "spritesheet"):
        client.videos.download_content(done.id, variant=variant).read()
    running = create(gateway, picture, prompt=PROMPT, extra_body=ENDLESS)
    until(lambda: client.videos.retrieve(running.id).status == "in_progress", "the run to begin")
    kept = create(gateway, picture, prompt="a cat")
    databases = ("jobs.sqlite", "jobs.sqlite-wal")

    def is_left() -> bool:
        return any(
            PROMPT.encode() in (tmp_path / name).read_bytes() for name in databases if (tmp_path / name).exists()
        )

    assert is_left()
    client.videos.delete(done.id)
    client.videos.delete(running.id)
    assert client.videos.poll(kept.id, poll_interval_ms=200).status == "completed"
    until(lambda: [path.name for path in (tmp_path / "videos").iterdir()] == [kept.id], "the files to go")
    until(lambda: not is_left(), "the prompt to go")
    assert PROMPT not in (tmp_path / "gateway1.log").read_text(encoding="utf-8"), "prompts are not logged"


def test_health_names_the_folder(gateway: Running, tmp_path: Path) -> None:
    folder, aside = tmp_path / "videos", tmp_path / "aside"
    folder.rename(aside)
    folder.write_bytes(b"")
    found = health(gateway)
    assert (found["well"], found["folder"]) == (False, "The folder of videos cannot be written: Not a directory.")
    folder.unlink()
    aside.rename(folder)
    assert health(gateway)["well"]


def test_the_document_has_every_field_and_the_objects_that_are_answered(gateway: Running, picture: bytes) -> None:
    document = json.loads(get(f"{gateway.url}/openapi.json")[2])
    for path in ("/v1/videos", "/v1/quotes"):
        content = document["paths"][path]["post"]["requestBody"]["content"]
        for kind in ("application/json", "multipart/form-data"):
            assert content[kind]["schema"]["properties"].keys() == set(FIELDS)
        assert content["application/json"]["example"]["prompt"]
    assert PROPERTIES.keys() == set(FIELDS)
    shown = document["paths"]["/v1/videos"]["post"]["responses"]["200"]["content"]["application/json"]
    video = json.loads(get(f"{gateway.url}/v1/videos/{create(gateway, picture).id}")[2])
    assert set(shown["schema"]["required"]) == video.keys() == VIDEO.keys()
    assert shown["example"].keys() <= video.keys()
    remix = document["paths"]["/v1/videos/{video_id}/remix"]["post"]["requestBody"]["content"]
    assert remix["application/json"]["schema"]["properties"].keys() == {"prompt", "camera"}


def test_a_remix_takes_no_other_settings_and_is_made_once_for_a_key(gateway: Running, picture: bytes) -> None:
    client = gateway.client()
    video = create(gateway, picture)
    again = [
        client.videos.remix(video.id, prompt="a dog", extra_headers={"Idempotency-Key": "again"}).id for _ in range(2)
    ]
    assert again[0] == again[1] != video.id
    with pytest.raises(openai.BadRequestError, match="takes prompt and camera, got 'seed'") as refused:
        client.videos.remix(video.id, prompt="a dog", extra_body={"seed": 3})
    assert refused.value.param == "seed"


def test_without_the_mark_a_video_is_the_servers_and_its_pictures_are_the_same(
    start: Callable[..., Running], picture: bytes, tmp_path: Path
) -> None:
    pictures = []
    for mark in ("true", "false"):
        gateway = start(videos=f"mark = {mark}")
        video = create(gateway, picture)
        assert gateway.client().videos.poll(video.id, poll_interval_ms=200).status == "completed"
        path = tmp_path / f"{mark}.mp4"
        path.write_bytes(gateway.client().videos.download_content(video.id).read())
        pictures.append([frame.tobytes() for frame in media.frames(path)])
        assert (media.MARK.encode() in path.read_bytes()) is (mark == "true")
    assert pictures[0] == pictures[1]
    assert len(pictures[0]) == 17


def test_pages_of_other_origins_are_not_let_in(gateway: Running) -> None:
    _, headers, _ = get(f"{gateway.url}/v1/videos", origin="https://elsewhere.example")
    assert not [name for name in headers if name.lower().startswith("access-control")]
