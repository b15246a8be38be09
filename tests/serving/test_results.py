"""What comes back: the same over every way in as from the pipeline in this process, and what accompanies it."""

import io
import re
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from stepvideo_serve.assembly.checkpoint import Checkpoint
from stepvideo_serve.assembly.stages import LocalStages
from stepvideo_serve.config import ServeConfig
from stepvideo_serve.pipeline.generate import Result, generate
from stepvideo_serve.request import parse_request
from stepvideo_serve.sampling.denoise import request_noise
from tests.serving.calls import Answer, Outputs, Server, Values, as_array, report_of
from tests.video.decode import decode_mp4

FRAMES, HEIGHT, WIDTH, STEPS = 34, 32, 48, 3
WAYS: dict[str, Callable[[Server, Values], Outputs]] = {
    "stream": Server.stream_result,
    "grpc": Server.grpc,
    "http": Server.http,
}
every_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())


@pytest.fixture(scope="module")
def clip(small: Values) -> Values:
    """Two chunks of the smallest pictures."""
    size = {"NUM_FRAMES": FRAMES, "HEIGHT": HEIGHT, "WIDTH": WIDTH, "STEPS": STEPS}
    return {**small, **{name: np.array([value], np.int32) for name, value in size.items()}}


@pytest.fixture(scope="module")
def here(local: LocalStages, config: ServeConfig) -> Callable[[Values], Result]:
    """Runs a request in this process."""

    def run(values: Values) -> Result:
        arrays = {name: as_array(value) for name, value in values.items()}
        request = parse_request(arrays, config.limits, local.latent_channels)
        *_, result = generate(request, local, config.video, cancelled=lambda: False)
        assert isinstance(result, Result)
        return result

    return run


@pytest.fixture(scope="module")
def mp4(here: Callable[[Values], Result], clip: Values) -> bytes:
    video = here({**clip, "OUTPUT": b"mp4"}).video
    assert video is not None
    return video


@pytest.fixture(scope="module")
def streamed(server: Server, clip: Values) -> Answer:
    """A run with a preview at every second step."""
    return server.stream({**clip, "STEPS": np.array([5], np.int32), "PREVIEW_EVERY": np.array([2], np.int32)})


@every_way
def test_the_mp4_is_that_of_the_local_pipeline(
    server: Server, clip: Values, mp4: bytes, way: Callable[[Server, Values], Outputs]
) -> None:
    outputs = way(server, {**clip, "OUTPUT": b"mp4"})
    assert set(outputs) == {"VIDEO", "SEED", "REPORT"}
    assert outputs["VIDEO"].shape == (1,)
    assert outputs["VIDEO"][0] == mp4


@every_way
def test_the_latents_are_those_of_the_local_pipeline(
    server: Server,
    here: Callable[[Values], Result],
    clip: Values,
    way: Callable[[Server, Values], Outputs],
) -> None:
    outputs = way(server, clip)
    assert set(outputs) == {"LATENTS", "SEED", "REPORT"}
    assert outputs["LATENTS"].dtype == np.float32
    expected = here(clip).latents
    assert expected is not None
    np.testing.assert_array_equal(outputs["LATENTS"], expected)


def test_the_frames_are_those_of_the_local_pipeline(
    server: Server, here: Callable[[Values], Result], clip: Values
) -> None:
    asked = {**clip, "OUTPUT": b"frames"}
    outputs = server.stream_result(asked)
    assert outputs["FRAMES"].shape == (FRAMES, HEIGHT, WIDTH, 3)
    assert outputs["FRAMES"].dtype == np.uint8
    expected = here(asked).frames
    assert expected is not None
    np.testing.assert_array_equal(outputs["FRAMES"], expected)


def test_the_mp4_plays(mp4: bytes) -> None:
    frames, stream = decode_mp4(mp4)
    assert frames.shape == (FRAMES, HEIGHT, WIDTH, 3)
    assert re.search(r"h264 .*yuv420p.* 25 fps", stream)


def test_given_noise_replaces_that_of_the_seed(server: Server, local: LocalStages, clip: Values) -> None:
    shape = (FRAMES // 17 * 3, local.latent_channels, HEIGHT // 16, WIDTH // 16)
    latents, encode_noise = request_noise(7, shape)
    given = {"LATENTS": latents.numpy(), "ENCODE_NOISE": encode_noise.numpy()}
    other_seed = {"SEED": np.array([8], np.int64)}
    of_seed = server.grpc(clip)["LATENTS"]
    np.testing.assert_array_equal(server.grpc({**clip, **given, **other_seed})["LATENTS"], of_seed)
    for name in given:  # each of the two matters
        half = {name: given[name]}
        assert not np.array_equal(server.grpc({**clip, **half, **other_seed})["LATENTS"], of_seed)


def test_a_seed_is_returned_and_without_one_every_call_has_its_own(server: Server, small: Values) -> None:
    assert server.grpc(small)["SEED"].tolist() == [7]
    unseeded = {name: value for name, value in small.items() if name != "SEED"}
    first, second = server.stream_result(unseeded), server.grpc(unseeded)
    assert first["SEED"][0] != second["SEED"][0]
    assert not np.array_equal(first["LATENTS"], second["LATENTS"])
    again = server.grpc({**small, "SEED": first["SEED"]})
    np.testing.assert_array_equal(again["LATENTS"], first["LATENTS"])


def test_one_progress_response_per_step_in_order(streamed: Answer) -> None:
    assert [int(step["STEP"][0]) for step in streamed.progress] == [1, 2, 3, 4, 5]
    assert {int(step["TOTAL_STEPS"][0]) for step in streamed.progress} == {5}
    elapsed: NDArray[np.float32] = np.concatenate([step["ELAPSED_S"] for step in streamed.progress])
    assert elapsed.dtype == np.float32
    assert (np.diff(elapsed) > 0).all()
    assert 0 < elapsed[-1] <= report_of(streamed.result)["seconds"]["total"]


def test_a_step_is_reported_when_it_ends_and_not_with_the_next_one(server: Server, long: Values) -> None:
    answer = server.stream({**long, "STEPS": np.array([4], np.int32)})
    elapsed = [float(step["ELAPSED_S"][0]) for step in answer.progress]
    last_step_s = report_of(answer.result)["step_seconds"][-1]
    assert elapsed[-1] - elapsed[-2] > last_step_s / 4


def test_previews_come_when_asked_for(server: Server, streamed: Answer, small: Values) -> None:
    previews = {int(step["STEP"][0]): step.get("PREVIEW") for step in streamed.progress}
    assert {step for step, preview in previews.items() if preview is not None} == {2, 4}
    for step in (2, 4):
        jpeg = streamed.progress[step - 1]["PREVIEW"][0]
        with Image.open(io.BytesIO(jpeg)) as image:
            assert image.format == "JPEG"
            assert image.width > image.height > 1  # three latent frames side by side
            image.load()
    assert all("PREVIEW" not in step for step in server.stream(small).progress)


def test_a_stream_ends_with_an_empty_response(streamed: Answer) -> None:
    assert set(streamed.result) == {"LATENTS", "SEED", "REPORT"}
    assert streamed.ended_empty


def test_the_report_says_what_ran_and_where_the_time_went(server: Server, config: ServeConfig, clip: Values) -> None:
    report = report_of(server.stream_result({**clip, "OUTPUT": b"mp4"}))
    asked = {"seed": 7, "frames": FRAMES, "height": HEIGHT, "width": WIDTH, "steps": STEPS}
    ran = {"backend": "ort", "precision": "fp32", "layout": "single"}
    ran["checkpoint"] = Checkpoint(config.model.dir).identity
    assert report.items() >= {**asked, **ran}.items()
    assert re.fullmatch(r"\d+ graphs, [0-9a-f]{12}", report["engines"])
    seconds = report["seconds"]
    assert seconds.keys() == {"total", "image", "text", "vae_encode", "denoise", "vae_decode", "mp4", "check"}
    assert all(value > 0 for value in seconds.values())
    assert len(report["step_seconds"]) == STEPS
    assert sum(report["step_seconds"]) <= seconds["denoise"] <= seconds["total"]


def test_a_prompt_is_encoded_once(server: Server) -> None:
    first, second = (server.grpc({"PROMPT": "此文只在此处".encode()}, "text_encoder") for _ in range(2))
    assert (bool(first["CACHED"][0]), bool(second["CACHED"][0])) == (False, True)
    for name in ("LLM_STATES", "CLIP_STATES"):
        np.testing.assert_array_equal(first[name], second[name])
