"""`stepvideo batch` and `compare` over the gateway, in front of the real server."""

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest

from stepvideo_client.evaluation.gateway_http import KEY_VARIABLE
from stepvideo_client.evaluation.results import Clip, read_clips
from tests import signals
from tests.evaluation.conftest import Popen, run_client, started_client, write_pair
from tests.gateway.conftest import Running, health, until
from tests.gateway.test_service import keys
from tests.serving.calls import Server
from tests.video.decode import decode_mp4

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")

SIZE = ("--landscape", "64x96", "--num-frames", "17")
SMALL = (*SIZE, "--infer-steps", "4", "--cfg-scale", "4", "--time-shift", "7", "--motion-score", "5")
ENDLESS = ("--landscape", "192x192", "--infer-steps", "100000", "--num-frames", "34")


@pytest.fixture
def two_pairs(tmp_path: Path) -> Path:
    folder = tmp_path / "set"
    write_pair(folder, "a_wide", "一只猫伸懒腰。", height=40, width=60, seed=1)
    write_pair(folder, "b_high", "A dog barks.", height=60, width=40, seed=2)
    return folder


@pytest.fixture
def gateway(start: Callable[..., Running], monkeypatch: pytest.MonkeyPatch) -> Running:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    return well(start())


@pytest.fixture
def begin() -> Iterator[Callable[..., Popen]]:
    """Starts `stepvideo`; what is left at the end is killed."""
    started: list[Popen] = []

    def run(*arguments: object) -> Popen:
        started.append(started_client(*arguments))
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.communicate()


def well(running: Running) -> Running:
    until(lambda: health(running)["well"], "the server to be seen")
    return running


def frames(out: Path, clip: Clip) -> Any:
    return decode_mp4((out / clip.video).read_bytes())[0]


def videos(client: openai.OpenAI) -> list[Any]:
    return list(client.videos.list().data)


def run_to_its_end(*arguments: object) -> "subprocess.CompletedProcess[str]":
    done = run_client(*arguments)
    assert done.returncode == 0, done.stderr
    return done


def test_the_same_clips_as_from_the_server_and_as_from_themselves(
    gateway: Running, server: Server, two_pairs: Path, tmp_path: Path
) -> None:
    """Pixel by pixel, with every setting and preset; the gateway keeps none of them, and tells what the rest takes."""
    direct, out = tmp_path / "direct", tmp_path / "out"
    command = ("batch", two_pairs, *SMALL, "--quality", "exact", "rough", "--negative-prompt", "dark")
    run_to_its_end(*command, "--url", server.grpc_url, "--out", direct)
    run_to_its_end(*command, "--url", gateway.url, "--out", out)
    expected, found = read_clips(direct), read_clips(out)
    assert found.keys() == expected.keys()
    assert len(found) == 4
    for key, clip in found.items():
        assert clip.request == expected[key].request
        np.testing.assert_array_equal(frames(out, clip), frames(direct, expected[key]))
    assert (out / "batch.json").read_bytes() == (direct / "batch.json").read_bytes()
    assert videos(gateway.client()) == []
    quoted = run_to_its_end("batch", two_pairs, "--url", gateway.url, "--out", tmp_path / "more", "--dry-run")
    assert quoted.stdout.startswith(f"{gateway.url}: ")
    assert "GPU-hours" in quoted.stdout
    sides = ("--a", f"{gateway.url},quality=exact", "--b", f"{server.grpc_url},quality=exact")
    compared = run_client("compare", "--set", two_pairs, *sides, "--out", tmp_path / "same", "--min-psnr", 99, "--each")
    assert compared.returncode == 0, compared.stderr
    assert "2 pairs, 2 equal in every pixel" in compared.stdout
    run_to_its_end("metrics", out, "--out", tmp_path / "metrics")
    measured = json.loads((tmp_path / "metrics" / "metrics.json").read_text(encoding="utf-8"))
    assert measured["notes"] == []
    assert measured["counts"]["incomplete"] == 0
    assert all(one["measures"]["first_frame_psnr_db"] for one in measured["clips"])


def test_a_killed_batch_finds_its_jobs_again(
    gateway: Running, begin: Callable[..., Popen], two_pairs: Path, tmp_path: Path
) -> None:
    out, client = tmp_path / "out", gateway.client()
    command = ("batch", two_pairs, *SMALL, "--infer-steps", 60, "--url", gateway.url, "--out", out)
    process = begin(*command)
    until(lambda: any(video.status == "in_progress" for video in videos(client)), "a run")
    process.kill()
    process.communicate()
    before = {video.id for video in videos(client)}
    assert before
    until(lambda: all(video.status == "completed" for video in videos(client)), "the jobs to end without a batch")
    run_to_its_end(*command)
    assert before <= {clip.report["gateway"]["id"] for clip in read_clips(out).values()}
    assert len(read_clips(out)) == 2
    assert videos(client) == []


def test_a_second_ctrl_c_ends_the_jobs(
    gateway: Running, begin: Callable[..., Popen], two_pairs: Path, tmp_path: Path
) -> None:
    client = gateway.client()
    process = begin("batch", two_pairs, *SMALL, *ENDLESS, "--url", gateway.url, "--out", tmp_path / "out")
    until(lambda: any(video.status == "in_progress" for video in videos(client)), "a run")
    until(lambda: len(videos(client)) == 2, "another that waits")
    signals.interrupt(process)
    until(lambda: len(videos(client)) == 1, "the one that waits to be removed")
    signals.interrupt(process)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    until(lambda: videos(client) == [], "the run to be removed")


def test_the_key_of_the_environment_is_needed(
    start: Callable[..., Running], root: Path, two_pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    gateway = well(start(api="require_key = true"))
    key = keys(root, tmp_path / "gateway1.toml", "add", "ann").stdout.strip()
    command = ("batch", two_pairs, *SMALL, "--url", gateway.url, "--out", tmp_path / "out")
    refused = run_client(*command)
    assert refused.returncode == 2
    assert "An API key is needed" in refused.stderr
    assert KEY_VARIABLE in refused.stderr
    assert not (tmp_path / "out").exists()
    monkeypatch.setenv(KEY_VARIABLE, key)
    run_to_its_end(*command)
    assert len(read_clips(tmp_path / "out")) == 2
