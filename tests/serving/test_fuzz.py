"""Hostile requests by the thousand to the real server: each is refused, none crashes it or reaches the ranks.

The same requests every time. `slow` sends 2,100 of them, the ordinary suite 60.
"""

import struct
import urllib.request
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np
import psutil
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2_grpc

from stepvideo_serve.launch.server import TritonServer
from tests.serving.calls import CODED, PATIENCE_S, Refused, Server, Values, grpc_request

REFUSED = ("INVALID_ARGUMENT", "NOT_FOUND")  # statuses; a stream has none
OVERLONG = "猫 跳 " * 200  # more than 320 tokens, whatever is before it

Spoilt = dict[str, Any]  # inputs to replace; None leaves one out


def integers_outside(low: int, high: int) -> st.SearchStrategy[int]:
    """32-bit integers that are not from low to high."""
    return st.one_of(
        st.integers(-(2**31), low - 1), st.integers(high + 1, 2**31 - 1), st.sampled_from([low - 1, high + 1])
    )


def reals_outside(low: float, high: float) -> st.SearchStrategy[float]:
    return st.one_of(
        st.floats(width=32, max_value=low, exclude_max=True),
        st.floats(width=32, min_value=high, exclude_min=True),
        st.sampled_from([float("nan"), float("inf"), float("-inf")]),
    )


def off_grid(multiple: int, most: int) -> st.SearchStrategy[int]:
    """Sizes that are no positive multiple, or too large."""
    return st.one_of(
        st.integers(1, most).filter(lambda value: value % multiple != 0), integers_outside(1, most), st.just(0)
    )


def one(name: str, dtype: type[np.generic], values: st.SearchStrategy[Any]) -> st.SearchStrategy[Spoilt]:
    return values.map(lambda value: {name: np.array([value], dtype)})


def png(width: int, height: int, depth: int, colour: int, data: bytes) -> bytes:
    """A PNG with a header of one's choice and right checksums."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def garbage_images() -> st.SearchStrategy[bytes]:
    starts = st.sampled_from(
        [
            b"",
            b"\x89PNG\r\n\x1a\n",
            b"\xff\xd8\xff\xe0\x00\x10JFIF\x00",
            b"RIFF\x10\x00\x00\x00WEBPVP8L",
            b"GIF89a",
            b"<svg>",
        ]
    )
    side = st.one_of(st.integers(0, 2**32 - 1), st.sampled_from([0, 1, 2**31, 100_000]))
    byte = st.integers(0, 255)
    # Never a whole picture: 64 bytes that do not unpack to one of at least 17 x 17 pixels, or none at all.
    broken = st.builds(png, side.filter(lambda n: n > 16 or n == 0), side, byte, byte, st.binary(max_size=64))
    return st.one_of(st.builds(lambda start, rest: start + rest, starts, st.binary(max_size=400)), broken)


def hostile_text() -> st.SearchStrategy[str]:
    """Anything that UTF-8 can say, and what has broken tokenizers before."""
    nasty = [
        "\u202e",
        "\u200b" * 50,
        "e" + "\u0301" * 60,
        "\ufeff",
        "\U000e0001",
        "<s></s><unk>",
        "[MASK][CLS][SEP]",
        "%s%n{}",
    ]
    return st.one_of(
        st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=60), st.sampled_from(nasty), st.just("𝔘𝔫𝔦" * 9)
    )


def spoilt_text(name: str) -> st.SearchStrategy[Spoilt]:
    control = st.sampled_from([chr(code) for code in (*range(9), 11, 12, *range(14, 32), 127, 0x85)])
    bad = st.one_of(
        st.binary(max_size=200).map(lambda tail: tail + b"\xff"),
        st.builds(lambda text, char: (text + char).encode(), hostile_text(), control),
        hostile_text().map(lambda text: (text + OVERLONG).encode()),
        st.integers(16385, 40_000).map(lambda size: b"a" * size),
    )
    return bad.map(lambda raw: {name: raw})


def wrong_tensor(name: str) -> st.SearchStrategy[Spoilt]:
    """Other types and shapes than the input has."""
    dtypes = st.sampled_from([np.uint8, np.int8, np.int16, np.uint32, np.float16, np.float64, np.bool_])
    shapes = st.sampled_from([(1,), (0,), (2,), (1, 1), (1, 0, 3, 3), (3, 8, 4, 6), (1,) * 8])
    return st.builds(lambda dtype, shape: {name: np.zeros(shape, dtype)}, dtypes, shapes)


def spoilt_noise(name: str, shape: tuple[int, ...]) -> st.SearchStrategy[Spoilt]:
    wrong = st.lists(st.integers(0, 9), min_size=4, max_size=4).filter(lambda dims: tuple(dims) != shape)
    bad = st.sampled_from([np.nan, np.inf, -np.inf, 1001.0, -3.4e38])
    index = st.integers(0, int(np.prod(shape)) - 1)

    def with_one(value: float, at: int) -> Spoilt:
        array = np.zeros(shape, np.float32)
        array.flat[at] = value
        return {name: array}

    return st.one_of(wrong.map(lambda dims: {name: np.zeros(dims, np.float32)}), st.builds(with_one, bad, index))


NUMBERS = {
    "NUM_FRAMES": off_grid(17, 102),
    "HEIGHT": off_grid(16, 512),
    "WIDTH": off_grid(16, 512),
    "STEPS": integers_outside(1, 100_000),
    "PREVIEW_EVERY": integers_outside(0, 100_000),
    "REQUEST_PRIORITY": integers_outside(1, 3),
}
REALS = {"CFG_SCALE": (1.0, 30.0), "TIME_SHIFT": (float(np.float32(0.1)), 100.0), "MOTION_SCORE": (0.0, 100.0)}
NAMES = (
    *NUMBERS,
    *REALS,
    "SEED",
    "TIMEOUT_S",
    "PROMPT",
    "IMAGE",
    "NEGATIVE_PROMPT",
    "POSITIVE_SUFFIX",
    "OUTPUT",
    "PREVIEW_FORMAT",
    "REQUEST_ID",
)


def spoilt() -> st.SearchStrategy[Spoilt]:
    """One input that no server may accept; all others are good."""
    words = st.binary(max_size=20).filter(lambda raw: raw not in (b"mp4", b"frames", b"latents"))
    ids = st.one_of(st.binary(max_size=20).map(lambda raw: raw + b"\n"), st.just(b""), st.just(b"a" * 129))
    seeds = st.one_of(st.integers(-(2**63), -1), st.sampled_from([-1, -(2**63)]))
    return st.one_of(
        *(one(name, np.int32, values) for name, values in NUMBERS.items()),
        *(one(name, np.float32, reals_outside(*bounds)) for name, bounds in REALS.items()),
        one("TIMEOUT_S", np.float32, reals_outside(0.0, 86_400.0)),
        one("SEED", np.int64, seeds),
        *(spoilt_text(name) for name in ("PROMPT", "NEGATIVE_PROMPT", "POSITIVE_SUFFIX")),
        garbage_images().map(lambda raw: {"IMAGE": raw}),
        words.map(lambda raw: {"OUTPUT": raw}),
        words.map(lambda raw: {"PREVIEW_FORMAT": raw + b"\n"}),
        ids.map(lambda raw: {"REQUEST_ID": raw}),
        *(wrong_tensor(name) for name in (*NAMES, "LATENTS", "ENCODE_NOISE")),
        spoilt_noise("LATENTS", (3, 8, 4, 6)),
        spoilt_noise("ENCODE_NOISE", (1, 8, 4, 6)),
        st.sampled_from(["PROMPT", "IMAGE"]).map(lambda name: {name: None}),
    )


@dataclass(frozen=True)
class Malformed:
    """What the protocol allows to be said and no tensor is: changes to one input of the message."""

    name: str
    shape: list[int] | None = None
    datatype: str | None = None
    raw: bytes | None = None
    drop_raw: bool = False
    twice: bool = False


def malformed() -> st.SearchStrategy[Malformed]:
    names = st.sampled_from(["PROMPT", "IMAGE", "STEPS", "SEED", "OUTPUT"])
    dims = st.one_of(st.integers(2, 2**62), st.integers(-(2**63), -1), st.sampled_from([0, 2**31, 2**32, 2**63 - 1]))
    shapes = st.lists(dims, min_size=1, max_size=6)
    raws = st.binary(max_size=40).filter(
        lambda raw: len(raw) not in (4, 8) and raw[:4] != struct.pack("<I", len(raw) - 4 if len(raw) >= 4 else 0)
    )
    return st.one_of(
        st.builds(Malformed, names, shape=shapes),
        st.builds(Malformed, names, datatype=st.sampled_from(["", "FOO", "BYTE", "FP8", "INT3", "A" * 5000])),
        st.builds(Malformed, names, raw=raws),
        st.builds(Malformed, names, drop_raw=st.just(True)),
        st.builds(Malformed, names, shape=shapes, raw=raws),
    )


def malformed_message(model: str, good: Values, how: Malformed) -> Any:
    request = grpc_request(model, good)
    index = list(good).index(how.name)
    tensor = request.inputs[index]
    if how.shape is not None:
        tensor.shape[:] = how.shape
    if how.datatype is not None:
        tensor.datatype = how.datatype
    if how.raw is not None:
        request.raw_input_contents[index] = how.raw
    if how.drop_raw:
        del request.raw_input_contents[index]
    return request


@dataclass
class Target:
    """One channel to the server, and what has been sent over it."""

    channel: Any
    good: Values
    sent: int = 0
    by_core: int = 0
    surprises: list[str] = field(default_factory=list)

    def unary(self, request: Any) -> Refused:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(self.channel)
        self.sent += 1
        try:
            stub.ModelInfer(request, timeout=PATIENCE_S)
        except grpc.RpcError as error:
            return Refused(error.details(), error.code().name)
        raise AssertionError("it was accepted")

    def stream(self, request: Any) -> Refused:
        """The first response, which must be an error."""
        self.sent += 1
        call = service_pb2_grpc.GRPCInferenceServiceStub(self.channel).ModelStreamInfer(
            iter([request]), timeout=PATIENCE_S
        )
        try:
            for message in call:
                assert message.error_message, "it was accepted"
                return Refused(message.error_message, None)
        except grpc.RpcError as error:
            return Refused(error.details(), error.code().name)
        finally:
            call.cancel()
        raise AssertionError("the stream ended without an answer")


def check(refused: Refused) -> None:
    """In our words INVALID_ARGUMENT, or in Triton's own."""
    code = CODED.match(refused.text)
    assert code is None or code[1] == "INVALID_ARGUMENT", refused
    assert refused.status is None or refused.status in REFUSED, refused
    assert "Traceback" not in refused.text


def spoil(good: Values, changes: Spoilt) -> Values:
    return {name: value for name, value in {**good, **changes}.items() if value is not None}


def unmoved(triton: TritonServer) -> tuple[float, float, set[int]]:
    """Steps that were computed, requests that ended with INTERNAL, and the processes of the server."""
    with urllib.request.urlopen(triton.metrics_url, timeout=PATIENCE_S) as page:
        lines = page.read().decode().splitlines()
    steps, internal = (
        sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(start) and mark in line)
        for start, mark in (("stepvideo_steps_total", ""), ("stepvideo_requests_total", '"INTERNAL"'))
    )
    return steps, internal, {process.pid for process in psutil.Process(triton.pid).children(recursive=True)}


@pytest.fixture
def target(triton: TritonServer, server: Server, small: Values) -> Iterator[Target]:
    """Whatever is sent: nothing was computed, nothing failed, no process died, and the next request is right."""
    expected = server.stream_result(small)["LATENTS"]
    before = unmoved(triton)
    with grpc.insecure_channel(server.grpc_url) as channel:
        yield Target(channel, small)
    assert unmoved(triton) == before
    np.testing.assert_array_equal(server.stream_result(small)["LATENTS"], expected)


def always(examples: int) -> settings:
    """The same examples every time, and the one that fails as it is: each costs a request."""
    return settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )


def send_values(target: Target, examples: int, stream: bool) -> None:
    @always(examples)
    @given(spoilt())
    def each(changes: Spoilt) -> None:
        model = "ti2v" if stream else "ti2v_unary"
        request = grpc_request(model, spoil(target.good, changes))
        check(target.stream(request) if stream else target.unary(request))

    each()
    assert target.sent >= examples


def send_malformed(target: Target, examples: int, stream: bool) -> None:
    @always(examples)
    @given(malformed())
    def each(how: Malformed) -> None:
        request = malformed_message("ti2v" if stream else "ti2v_unary", target.good, how)
        check(target.stream(request) if stream else target.unary(request))

    each()
    assert target.sent >= examples


ways = pytest.mark.parametrize("stream", [False, True], ids=["unary", "stream"])


@ways
def test_hostile_values(target: Target, stream: bool) -> None:
    send_values(target, 20, stream)


@ways
def test_malformed_messages(target: Target, stream: bool) -> None:
    send_malformed(target, 10, stream)


@pytest.mark.slow
@ways
def test_many_hostile_values(target: Target, stream: bool) -> None:
    send_values(target, 800, stream)


@pytest.mark.slow
@ways
def test_many_malformed_messages(target: Target, stream: bool) -> None:
    send_malformed(target, 250, stream)


def test_hostile_words_that_are_allowed(server: Server, small: Values) -> None:
    """They make a video, or are refused as too long; none fails."""

    @always(10)
    @given(hostile_text())
    def each(text: str) -> None:
        try:
            result = server.grpc({**small, "PROMPT": text.encode(), "STEPS": np.array([1], np.int32)})
        except Refused as refused:
            check(refused)
        else:
            assert np.isfinite(result["LATENTS"]).all()

    each()
