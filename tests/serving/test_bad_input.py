"""Hostile and mistaken requests, over every way in: one sentence at once, and a server that goes on."""

import io
import re
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from tritonclient.grpc import service_pb2_grpc

from stepvideo_serve.request import INPUT_NAMES
from tests.serving.calls import PATIENCE_S, Refused, Server, Values, grpc_request

AT_ONCE_S = 20.0  # a run of the same size that is let in takes longer than this by two orders of magnitude
MAX_SENTENCE = 600

Change = Callable[[Values], Values]


def change(**values: NDArray[Any] | bytes) -> Change:
    return lambda small: {**small, **values}


def number(dtype: type[np.generic], **values: float) -> Change:
    return change(**{name: np.array([value], dtype) for name, value in values.items()})


def integer(**values: int) -> Change:
    return number(np.int32, **values)


def real(**values: float) -> Change:
    return number(np.float32, **values)


def without(name: str) -> Change:
    return lambda small: {key: value for key, value in small.items() if key != name}


def truncated(small: Values) -> Values:
    image = small["IMAGE"]
    assert isinstance(image, bytes)
    return {**small, "IMAGE": image[: len(image) // 2]}


def bomb(_: Values) -> bytes:
    """A PNG of 69 bytes that claims 10 gigapixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(8))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data


def animated(_: Values) -> bytes:
    file = io.BytesIO()
    first, second = (Image.new("RGB", (32, 32), colour) for colour in ("red", "blue"))
    first.save(file, "WEBP", save_all=True, append_images=[second])
    return file.getvalue()


def cmyk(_: Values) -> bytes:
    file = io.BytesIO()
    Image.new("CMYK", (32, 32)).save(file, "JPEG")
    return file.getvalue()


def image(make: Callable[[Values], bytes]) -> Change:
    return lambda small: {**small, "IMAGE": make(small)}


def latents(fill: float, *shape: int) -> Change:
    return change(LATENTS=np.full(shape, fill, np.float32))


# What our models refuse: the change to a good request, and what the sentence must say.
OURS: dict[str, tuple[Change, str]] = {
    "no-prompt": (without("PROMPT"), "PROMPT is required"),
    "no-image": (without("IMAGE"), "IMAGE is required"),
    "image-empty": (change(IMAGE=b""), "IMAGE .* 0 bytes"),
    "image-truncated": (truncated, "IMAGE must be a complete"),
    "image-oversized": (change(IMAGE=bytes(2_000_001)), "IMAGE must be at most 2000000 bytes, got 2000001"),
    "image-bomb": (image(bomb), "IMAGE must have at most .* pixels, got 100000x100000"),
    "image-not-one": (
        change(IMAGE=b"%PDF-1.7 not a picture"),
        "IMAGE must be the bytes of a PNG, JPEG or WebP file, got a PDF",
    ),
    "image-animated": (image(animated), "animation of 2 frames"),
    "image-cmyk": (image(cmyk), "CMYK"),
    "prompt-not-utf8": (change(PROMPT=b"caf\xe9"), "PROMPT must be UTF-8, got byte 0xe9 at offset 3"),
    "prompt-overlong": (change(PROMPT="猫 跳 ".encode() * 200), r"at most 320 tokens, got \d{3,4}"),
    "prompt-oversized": (change(PROMPT=b"a" * 16385), "PROMPT must be at most 16384 bytes, got 16385"),
    "prompt-control": (change(PROMPT=b"a\x00b"), r"control characters .* U\+0000"),
    "negative-overlong": (change(NEGATIVE_PROMPT="猫 跳 ".encode() * 200), r"at most 320 tokens, got \d{3,4}"),
    "frames-off-grid": (integer(NUM_FRAMES=18), "NUM_FRAMES must be a positive multiple of 17, got 18: use 17 or 34"),
    "frames-zero": (integer(NUM_FRAMES=0), "NUM_FRAMES .* got 0"),
    "frames-too-many": (integer(NUM_FRAMES=119), "NUM_FRAMES must be at most 102 on this server, got 119"),
    "height-off-grid": (integer(HEIGHT=60), "HEIGHT must be a positive multiple of 16, got 60: use 48 or 64"),
    "height-negative": (integer(HEIGHT=-64), "HEIGHT .* got -64"),
    "height-too-large": (integer(HEIGHT=528), "HEIGHT must be at most 512 on this server, got 528"),
    "width-off-grid": (integer(WIDTH=100), "WIDTH must be a positive multiple of 16, got 100"),
    "width-largest-int": (integer(WIDTH=2**31 - 16), "WIDTH must be at most 512"),
    "steps-zero": (integer(STEPS=0), "STEPS must be from 1 to 100000, got 0"),
    "steps-too-many": (integer(STEPS=100_001), "STEPS must be from 1 to 100000"),
    "cfg-nan": (real(CFG_SCALE=np.nan), "CFG_SCALE must be a finite number, got nan"),
    "cfg-below": (real(CFG_SCALE=0.5), "CFG_SCALE must be from 1 to 30, got 0.5"),
    "shift-infinite": (real(TIME_SHIFT=np.inf), "TIME_SHIFT must be a finite number, got inf"),
    "motion-negative": (real(MOTION_SCORE=-1), "MOTION_SCORE must be from 0 to 100, got -1"),
    "timeout-zero": (real(TIMEOUT_S=0), "TIMEOUT_S must be above 0"),
    "timeout-nan": (real(TIMEOUT_S=np.nan), "TIMEOUT_S must be a finite number"),
    "seed-negative": (number(np.int64, SEED=-1), "SEED must be from 0 to"),
    "preview-negative": (integer(PREVIEW_EVERY=-1), "PREVIEW_EVERY must be from 0"),
    "preview-format-unknown": (change(PREVIEW_FORMAT=b"gif"), "PREVIEW_FORMAT must be one of jpeg, webp, got b'gif'"),
    "priority-unknown": (integer(REQUEST_PRIORITY=4), "REQUEST_PRIORITY must be from 1 to 3, got 4"),
    "output-unknown": (change(OUTPUT=b"gif"), "OUTPUT must be one of mp4, frames, latents, got b'gif'"),
    "latents-shape": (latents(0, 3, 8, 4, 5), r"LATENTS must be FP32 of shape \[3, 8, 4, 6\]"),
    "latents-channels": (latents(0, 3, 16, 4, 6), r"LATENTS must be FP32 of shape \[3, 8, 4, 6\]"),
    "latents-nan": (latents(np.nan, 3, 8, 4, 6), "LATENTS must hold finite numbers, got 576"),
    "noise-shape": (change(ENCODE_NOISE=np.zeros((3, 8, 4, 6), np.float32)), r"shape \[1, 8, 4, 6\]"),
    "noise-infinite": (change(ENCODE_NOISE=np.full((1, 8, 4, 6), np.inf, np.float32)), "got 192 NaN or infinite"),
}
# What Triton refuses by the models' configurations, in its own words.
BY_CORE: dict[str, tuple[Change, str]] = {
    "one-input": (
        lambda small: {"PROMPT": small["PROMPT"]},
        f"expected number of inputs between 2 and {len(INPUT_NAMES)} but got 1",
    ),
    "unknown-input": (change(FRAMES=np.array([17], np.int32)), "unexpected inference input 'FRAMES'"),
    "wrong-dtype": (number(np.int64, NUM_FRAMES=17), "NUM_FRAMES.*INT32|INT64.*NUM_FRAMES"),
    "wrong-dtype-text": (integer(PROMPT=1), "PROMPT"),
    "wrong-shape": (change(STEPS=np.array([2, 2], np.int32)), r"unexpected shape for input 'STEPS'"),
    "wrong-rank": (change(LATENTS=np.zeros((8, 4, 6), np.float32)), "unexpected shape for input 'LATENTS'"),
}


def stream_refusal(server: Server, values: Values) -> Refused:
    with server.open(values) as stream:
        return stream.refusal()


def unary_refusal(server: Server, values: Values) -> Refused:
    with pytest.raises(Refused) as caught:
        server.grpc(values)
    return caught.value


def http_refusal(server: Server, values: Values) -> Refused:
    with pytest.raises(Refused) as caught:
        server.http(values)
    return caught.value


# How a request is refused there, and the status of a bad request.
WAYS = {
    "stream": (stream_refusal, None),
    "grpc": (unary_refusal, "INVALID_ARGUMENT"),
    "http": (http_refusal, "400"),
}
every_way = pytest.mark.parametrize(("refusal", "status"), WAYS.values(), ids=WAYS.keys())


@pytest.fixture(autouse=True, scope="module")
def server_goes_on(server: Server, small: Values) -> Iterator[None]:
    """After all of this a normal request is answered, on both public models."""
    before = server.grpc(small)["LATENTS"]
    yield
    for after in (server.stream_result(small), server.grpc(small), server.http(small)):
        np.testing.assert_array_equal(after["LATENTS"], before)


def check_sentence(text: str, says: str) -> None:
    assert re.search(says, text), text
    assert "\n" not in text.strip()
    assert "Traceback" not in text
    assert 0 < len(text) <= MAX_SENTENCE


@every_way
@pytest.mark.parametrize(("spoil", "sentence"), OURS.values(), ids=OURS.keys())
def test_refused_by_the_model(
    server: Server,
    small: Values,
    spoil: Change,
    sentence: str,
    refusal: Callable[[Server, Values], Refused],
    status: str | None,
) -> None:
    began_s = time.monotonic()
    refused = refusal(server, spoil(small))
    assert time.monotonic() - began_s < AT_ONCE_S
    assert refused.status == status
    assert refused.text.startswith("INVALID_ARGUMENT: ")
    check_sentence(refused.text, sentence)


@every_way
@pytest.mark.parametrize(("spoil", "sentence"), BY_CORE.values(), ids=BY_CORE.keys())
def test_refused_by_triton(
    server: Server,
    small: Values,
    spoil: Change,
    sentence: str,
    refusal: Callable[[Server, Values], Refused],
    status: str | None,
) -> None:
    refused = refusal(server, spoil(small))
    assert refused.status == status
    assert refused.by_core
    check_sentence(refused.text, sentence)


@pytest.mark.parametrize("name", ["PROMPT", "IMAGE"])
@pytest.mark.parametrize("raw", [b"", b"\x01", b"\xff\xff\xff\xffabc", b"\x01\x00\x00\x00a\x01\x00\x00\x00b"])
def test_a_malformed_bytes_tensor_is_refused(server: Server, small: Values, name: str, raw: bytes) -> None:
    request = grpc_request("ti2v_unary", small)
    request.raw_input_contents[list(small).index(name)] = raw
    with grpc.insecure_channel(server.grpc_url) as channel:
        call = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer.future(request, timeout=PATIENCE_S)
        assert call.exception().code() is grpc.StatusCode.INVALID_ARGUMENT
        check_sentence(call.details(), f"string .*{name}")
