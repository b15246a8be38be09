"""Previews: small pictures of a run under way, as each of its callers asked for them."""

import io
import uuid

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from stepvideo_serve.scheduling.idempotency import FREE_INPUTS, Caller, Outputs, SharedAnswer
from stepvideo_serve.serving.previews import PREVIEW, PreviewAnswer, PreviewFiles
from tests.serving.calls import Answer, Refused, Server, Values

FORMATS = {"jpeg": "JPEG", "webp": "WEBP"}


def pictures(content: bytes) -> tuple[str | None, list[NDArray[np.uint8]]]:
    """The kind of a file, and the pictures in it."""
    with Image.open(io.BytesIO(content)) as image:
        shown = []
        for index in range(getattr(image, "n_frames", 1)):
            image.seek(index)
            shown.append(np.array(image.convert("RGB")))
        return image.format, shown


def previews(answer: Answer) -> dict[int, bytes]:
    return {int(step["STEP"][0]): step[PREVIEW][0] for step in answer.progress if PREVIEW in step}


def test_an_animation_has_a_different_picture_for_each_latent_frame(server: Server, small: Values) -> None:
    numbers = {"NUM_FRAMES": 34, "STEPS": 5, "PREVIEW_EVERY": 2}
    asked = {**small, **{name: np.array([value], np.int32) for name, value in numbers.items()}}
    found = previews(server.stream({**asked, "PREVIEW_FORMAT": b"webp"}))
    assert found.keys() == {2, 4}
    for content in found.values():
        kind, shown = pictures(content)
        assert (kind, len(shown)) == ("WEBP", 6), "34 frames are 6 latent frames"
        assert {picture.shape for picture in shown} == {(8, 12, 3)}, "64x96 are 4x6 cells"
        assert len({picture.tobytes() for picture in shown}) == 6
    assert found[2] != found[4]


def test_callers_of_one_run_have_each_their_own_format(server: Server, long: Values) -> None:
    numbers = {"STEPS": np.array([12], np.int32), "PREVIEW_EVERY": np.array([1], np.int32)}
    asked = {**long, **numbers, "REQUEST_ID": f"test-{uuid.uuid4()}".encode()}
    begun = server.executions("vae_encoder")
    with server.open(asked) as first:
        first.wait_for_step(2)
        moving, without = {**asked, "PREVIEW_FORMAT": b"webp"}, {**asked, "PREVIEW_EVERY": np.array([0], np.int32)}
        with server.open(moving) as second, server.open(without) as third:
            answers = [stream.collect() for stream in (first, second, third)]
    assert server.executions("vae_encoder") == begun + 1
    still, animated, none = map(previews, answers)
    assert {pictures(content)[0] for content in still.values()} == {"JPEG"}
    assert {pictures(content)[0] for content in animated.values()} == {"WEBP"}
    assert animated.keys() >= {10, 11}, "as often as the request that began the run says"
    assert len(pictures(animated[11])[1]) > 1
    assert none == {}
    kept = server.stream(moving)
    assert (kept.progress, sorted(kept.result)) == ([], sorted(answers[0].result)), "a kept result comes alone"


def test_an_unknown_format_is_refused(server: Server, small: Values) -> None:
    said = "INVALID_ARGUMENT: PREVIEW_FORMAT must be one of jpeg, webp, got b'gif': use one of these words."
    with pytest.raises(Refused) as refused:
        server.stream({**small, "PREVIEW_FORMAT": b"gif"})
    assert refused.value.text == said


class Heard:
    """A caller who keeps what it hears."""

    def __init__(self) -> None:
        self.progress: list[Outputs] = []

    def send(self, outputs: Outputs) -> None:
        self.progress.append(outputs)

    def finish(self, outputs: Outputs) -> None:
        self.progress.append(outputs)

    def fail(self, error: BaseException) -> None:
        raise error

    def cancelled(self) -> bool:
        return False

    def dismiss_gone(self) -> None:
        return


def test_a_file_is_made_once_for_all_who_want_it() -> None:
    made: list[str] = []

    def encode(frames: NDArray[np.uint8], preview_format: str) -> bytes:
        made.append(preview_format)
        return f"{preview_format} {len(frames)}".encode()

    files = PreviewFiles(encode)
    run = SharedAnswer(lambda _answer, _outputs: None, "id", b"mark", clock=lambda: 0.0)
    callers = [(Heard(), shown) for shown in ("webp", "jpeg", "webp", None)]
    for heard, shown in callers:
        run.attach(Caller(PreviewAnswer(heard, shown, files), None, 0.0, repeated=False))
    step = np.array([1], np.int32)
    for count in (3, 6):
        run.send({"STEP": step, PREVIEW: np.zeros((count, 2, 2, 3), np.uint8)})
    run.send({"STEP": step})
    assert made == ["webp", "jpeg"] * 2
    for heard, shown in callers:
        files_heard = [outputs[PREVIEW][0] for outputs in heard.progress if PREVIEW in outputs]
        assert files_heard == ([] if shown is None else [f"{shown} 3".encode(), f"{shown} 6".encode()])
        assert [outputs["STEP"] is step for outputs in heard.progress] == [True] * 3


def test_what_is_no_progress_goes_through() -> None:
    heard = Heard()
    answer = PreviewAnswer(heard, "jpeg", PreviewFiles())
    answer.finish({"SEED": np.array([7], np.int64)})
    assert [list(outputs) for outputs in heard.progress] == [["SEED"]]
    with pytest.raises(TimeoutError):
        answer.fail(TimeoutError())
    assert "PREVIEW_FORMAT" in FREE_INPUTS, "a repeat may ask for another one"
