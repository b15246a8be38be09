"""What was computed is looked at before it is handed out: in this process, on the ranks, and on the real server."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from safetensors.torch import load_file, save_file

from stepvideo_serve.assembly.stages import LocalStages
from stepvideo_serve.config import GatesConfig, ServeConfig
from stepvideo_serve.errors import BadOutput
from stepvideo_serve.parallel.job import StepEvent
from stepvideo_serve.pipeline.generate import Result, generate
from stepvideo_serve.request import parse_request
from stepvideo_serve.video.probe import Mp4Facts, probe_mp4
from tests.server_deaths import WatchServer
from tests.serving.calls import Refused, Server, Values, as_array, report_of
from tests.serving.launch import CONFIG, EAGER, Engines, ranks, serving

FRAMES, HEIGHT, WIDTH, STEPS = 17, 32, 48, 2
# Thresholds that every video fails.
UNREACHABLE = """
[gates]
first_frame_psnr_db = 99.0
black_level = 255.0
frozen_difference = 255.0
"""
NORMAL = np.random.default_rng(7).standard_normal


@pytest.fixture(scope="module")
def clip(small: Values) -> Values:
    size = {"NUM_FRAMES": FRAMES, "HEIGHT": HEIGHT, "WIDTH": WIDTH, "STEPS": STEPS}
    return {**small, "OUTPUT": b"mp4", **{name: np.array([value], np.int32) for name, value in size.items()}}


@pytest.fixture(scope="module")
def broken_checkpoint(mini_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose velocity has a NaN."""
    folder = tmp_path_factory.mktemp("broken") / "mini"
    shutil.copytree(mini_checkpoint, folder)
    [path] = [path for path in folder.glob("transformer/*.safetensors") if "proj_out.bias" in load_file(path)]
    tensors = load_file(path)
    tensors["proj_out.bias"][1] = float("nan")
    save_file(tensors, path)
    return folder


@pytest.fixture(scope="module")
def run(mini_checkpoint: Path, clip: Values, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Result]:
    """Runs the clip in this process, with the gates of the keywords."""
    path = tmp_path_factory.mktemp("gates") / "serve.toml"
    path.write_text(EAGER.format(model=mini_checkpoint, layout="single"))
    config = ServeConfig.load(path)
    stages = LocalStages(config)

    def run(output: bytes = b"mp4", **gates: Any) -> Result:
        arrays = {name: as_array(value) for name, value in {**clip, "OUTPUT": output}.items()}
        request = parse_request(arrays, config.limits, stages.latent_channels)
        *_, result = generate(request, stages, config.video, lambda: False, GatesConfig(**gates))
        assert isinstance(result, Result)
        return result

    return run


@pytest.fixture(scope="module")
def warning_server(
    root: Path, engines: Engines, tmp_path_factory: pytest.TempPathFactory, watch: WatchServer
) -> Iterator[tuple[Server, Path]]:
    """A server that warns of every video, and its log."""
    folder = tmp_path_factory.mktemp("warning")
    config = CONFIG.format(model=engines.model_dir, engines=engines.graphs_dir, max_queued=4) + UNREACHABLE
    with serving(root, folder, config, watch) as triton:
        yield Server(triton.grpc_url, triton.http_url, triton.pid), folder / "server.log"


def test_a_file_that_was_handed_out_has_been_decoded(run: Callable[..., Result]) -> None:
    result = run()
    assert result.video is not None
    assert probe_mp4(result.video) == Mp4Facts(FRAMES, HEIGHT, WIDTH, 25.0)
    assert result.report["seconds"]["check"] > 0
    assert result.report["media"].keys() == {"first_frame_psnr_db", "brightness", "change"}
    assert result.report["media"]["brightness"] > 0


@pytest.mark.parametrize("output", [b"mp4", b"frames"])
@pytest.mark.parametrize(
    ("gates", "message"),
    [
        ({"first_frame": "error", "first_frame_psnr_db": 99.0}, "The first frame must be like the image"),
        ({"black": "error", "black_level": 255.0}, "Some frame must be brighter"),
        ({"frozen": "error", "frozen_difference": 255.0}, "Some frame must differ from the first"),
    ],
)
def test_a_video_that_fails_a_gate_is_not_handed_out(
    run: Callable[..., Result], output: bytes, gates: dict[str, Any], message: str
) -> None:
    with pytest.raises(BadOutput, match=message):
        run(output, **gates)
    assert not [child for child in psutil.Process().children() if "ffmpeg" in child.name()]


def test_latents_need_not_look_like_a_video(run: Callable[..., Result]) -> None:
    report = run(b"latents", black="error", black_level=255.0).report
    assert (report["warnings"], report["media"]) == ([], {})


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "size"), [("single", 1), ("cfg2", 2)])
def test_all_ranks_stop_at_the_step_whose_latents_are_not_finite(
    root: Path, broken_checkpoint: Path, tmp_path: Path, layout: str, size: int
) -> None:
    path = tmp_path / "serve.toml"
    path.write_text(EAGER.format(model=broken_checkpoint, layout=layout))
    tensors = {
        "latents": NORMAL((3, 4, 2, 3)).astype(np.float32),
        "condition": NORMAL((4, 2, 3)).astype(np.float32),
        **{f"{branch}_llm": NORMAL((5, 48)).astype(np.float32) for branch in ("positive", "negative")},
        **{f"{branch}_clip": NORMAL((77, 32)).astype(np.float32) for branch in ("positive", "negative")},
    }
    numbers = {"steps": 5, "cfg_scale": 4.0, "time_shift": 7.0, "motion_score": 5.0, "preview_every": 0}
    with ranks(root, path, size) as group:
        pids = group.pids
        for _ in range(2):
            with group.run({"kind": "denoise", "timeout_s": None, **numbers}, tensors) as events:
                assert isinstance(next(events), StepEvent)
                with pytest.raises(BadOutput, match="must be finite after step 1 of 5, got NaN or infinite values"):
                    next(events)
        assert group.pids == pids, "they go on"


@pytest.mark.slow
def test_a_request_whose_latents_are_not_finite_ends_with_internal_and_the_server_goes_on(
    root: Path, broken_checkpoint: Path, clip: Values, tmp_path: Path, watch: WatchServer
) -> None:
    with serving(root, tmp_path, EAGER.format(model=broken_checkpoint, layout="single"), watch) as triton:
        server = Server(triton.grpc_url, triton.http_url, triton.pid)
        rank = server.rank().pid
        for steps, where in ((50, "after step 1 of 50"), (1, "after the last step")):
            with server.open({**clip, "STEPS": np.array([steps], np.int32)}) as stream:
                stream.wait_for_step(1)
                text = stream.refusal().text
            assert text.startswith(f"INTERNAL: The latents must be finite {where}, got NaN or infinite values: try ")
        with pytest.raises(Refused, match=r"INTERNAL: The latents must be finite") as caught:
            server.grpc(clip)
        assert caught.value.status == "INTERNAL"
        assert server.rank().pid == rank


def test_warnings_are_in_the_report_and_in_the_log(warning_server: tuple[Server, Path], clip: Values) -> None:
    server, log = warning_server
    for outputs in (server.stream_result(clip), server.http(clip), server.grpc({**clip, "OUTPUT": b"frames"})):
        warnings = report_of(outputs)["warnings"]
        assert [warning["gate"] for warning in warnings] == ["first_frame", "black", "frozen"]
        assert ("VIDEO" in outputs) != ("FRAMES" in outputs)
        logged = log.read_text(encoding="utf-8")
        assert all(f"gate {warning['gate']}: {warning['message']}" in logged for warning in warnings)
    assert report_of(server.stream_result({**clip, "OUTPUT": b"latents"}))["warnings"] == []
