"""`stepvideo batch` on the real server, killed and shared: a VBench list that is hard to name, and real pairs."""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stepvideo_client.evaluation.results import read_clips
from stepvideo_serve.launch.server import TritonServer
from tests.evaluation.conftest import MINI_CONFIG, Completed, Popen, run_client, write_pair
from tests.evaluation.folders import PATIENCE_S, contents, run_with_kills
from tests.evaluation.vbench_list import PROMPTS, UNFIT, write_vbench
from tests.server_deaths import WatchServer
from tests.serving.launch import serving
from tests.video.decode import decode_mp4

Run = Callable[..., Completed]
Start = Callable[..., Popen]
SCENES = 4  # of the toy world's held-out ones
FRAMES = 34


@pytest.fixture(scope="module")
def vbench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_vbench(tmp_path_factory.mktemp("vbench"))


@pytest.fixture(scope="module")
def whole(mini_server: TritonServer, vbench: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The list, made in one go."""
    out = tmp_path_factory.mktemp("whole") / "out"
    done = run_client("batch", vbench, "--out", out, "--url", mini_server.grpc_url, "--seed", 7)
    assert done.returncode == 0, done.stderr
    return out


def test_every_entry_becomes_a_video_that_vbench_finds(whole: Path, vbench: Path) -> None:
    clips = read_clips(whole)
    assert len(clips) == len(PROMPTS) == 30
    named = {entry: json.loads((whole / "names.json").read_text()).get(entry) for entry, _ in clips}
    for number, prompt in enumerate(PROMPTS):
        clip = clips[f"{number:04}", 0]
        assert clip.prompt == prompt
        assert clip.video == f"videos/{clip.id if number in UNFIT else prompt}-0.mp4"
        assert named[clip.id] == (prompt if number in UNFIT else None)
        assert clip.seed == 7
        assert clip.evaluations_mask == [1, 1]
        assert clip.report["seconds"]["total"] > 0
    frames, stream = decode_mp4((whole / clips["0025", 0].video).read_bytes())
    assert frames.shape == (17, 32, 48, 3)
    assert "25 fps" in stream
    assert not (whole / ".partial").exists()
    assert clips["0000", 0].image == str(vbench.parent / "data" / "crop" / "8-5" / "picture 0.jpg")


def test_killed_and_resumed_it_is_the_same_folder(
    mini_server: TritonServer, start: Start, vbench: Path, whole: Path, tmp_path: Path
) -> None:
    command = ("batch", vbench, "--out", tmp_path, "--url", mini_server.grpc_url, "--seed", 7)
    assert run_with_kills(start, command, random.Random(1), kills=3, longest_s=4.0) >= 2
    assert contents(tmp_path) == contents(whole)


def test_two_shards_at_a_time_are_the_whole(
    mini_server: TritonServer, start: Start, vbench: Path, whole: Path, tmp_path: Path
) -> None:
    """Of the entries that are hardest to name."""
    command = ("batch", vbench, "--out", tmp_path, "--url", mini_server.grpc_url, "--seed", 7, "--only", "002*")
    shards = [start(*command, "--shard", f"{number}/2") for number in (1, 2)]
    for process in shards:
        _, stderr = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 0, stderr
        assert "5 clips here" in stderr
    assert contents(tmp_path) == contents(whole, "002")


def test_presets_latents_and_the_dry_run(
    mini_server: TritonServer, stepvideo: Run, pairs: Path, tmp_path: Path
) -> None:
    """Masks and latents are those of the server; a quote is told for what was measured."""
    command: tuple[Any, ...] = ("batch", pairs, "--url", mini_server.grpc_url, "--only", "a_*", "--infer-steps", 12)
    command += ("--quality", "exact", "rough")
    done = stepvideo(*command, "--out", tmp_path, "--latents")
    assert done.returncode == 0, done.stderr
    exact, rough = read_clips(tmp_path).values()
    assert (exact.preset, rough.preset) == ("exact", "rough")
    assert exact.evaluations_mask == [1] * 12
    assert rough.evaluations_mask is not None
    assert 0 in rough.evaluations_mask
    assert exact.latents is not None
    assert np.load(tmp_path / exact.latents).shape == (3, 4, 2, 3)
    quoted = stepvideo(*command, "--out", tmp_path / "more", "--seed", *range(100), "--dry-run")
    assert quoted.returncode == 0, quoted.stderr
    assert "200 to make" in quoted.stderr
    url, hours, _, gpu_hours, _ = quoted.stdout.split()
    assert url == f"{mini_server.grpc_url}:"
    assert 0 < float(gpu_hours) <= float(hours)
    refused = stepvideo(*command, "--out", tmp_path / "more", "--quality", "quick")
    assert refused.returncode == 2
    assert "QUALITY must be one of exact, rough, or mask:" in refused.stderr


@pytest.fixture(scope="module")
def toy_server(root: Path, tmp_path_factory: pytest.TempPathFactory, watch: WatchServer) -> Iterator[TritonServer]:
    """The toy world's checkpoint; clips of 34 frames of 64x64."""
    config = MINI_CONFIG.format(model=root / "toyworld" / "checkpoint")
    sizes = {"num_frames = 17": "num_frames = 34", "height = 32": "height = 64", "width = 48": "width = 64"}
    for before, after in sizes.items():
        config = config.replace(before, after)
    with serving(root, tmp_path_factory.mktemp("toy"), config, watch) as running:
        yield running


@pytest.mark.slow
def test_the_shared_pairs_killed_and_resumed(
    toy_server: TritonServer, start: Start, stepvideo: Run, shared: Path, tmp_path: Path
) -> None:
    command = ("batch", shared / "eval", "--url", toy_server.grpc_url, "--landscape", "64x112", "--latents", "--out")
    done = stepvideo(*command, tmp_path / "whole")
    assert done.returncode == 0, done.stderr
    clips = read_clips(tmp_path / "whole")
    assert len(clips) == 8
    shapes = {"H": (FRAMES, 64, 112, 3), "V": (FRAMES, 112, 64, 3), "S": (FRAMES, 80, 80, 3)}
    for clip in clips.values():
        frames, _ = decode_mp4((tmp_path / "whole" / clip.video).read_bytes())
        assert frames.shape == shapes[clip.id.split("_")[1]]
    assert run_with_kills(start, (*command, tmp_path / "killed"), random.Random(2), kills=5, longest_s=15.0) >= 3
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


@pytest.mark.slow
def test_the_held_out_scenes_killed_and_resumed(
    toy_server: TritonServer, start: Start, stepvideo: Run, tmp_path: Path
) -> None:
    from toyworld.evaluate import held_out_scene, wording
    from toyworld.samples import first_image, png

    for number in range(SCENES):
        scene = held_out_scene(number)
        write_pair(tmp_path / "scenes", f"scene_{number}", wording(scene, number))
        (tmp_path / "scenes" / f"scene_{number}.png").write_bytes(png(first_image(scene)))
    command = ("batch", tmp_path / "scenes", "--url", toy_server.grpc_url, "--infer-steps", 6, "--seed", 0, 1, "--out")
    done = stepvideo(*command, tmp_path / "whole")
    assert done.returncode == 0, done.stderr
    assert len(read_clips(tmp_path / "whole")) == 2 * SCENES
    assert run_with_kills(start, (*command, tmp_path / "killed"), random.Random(3), kills=5, longest_s=15.0) >= 3
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
