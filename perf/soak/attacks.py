"""What a stranger sends who means harm: calls of the internal models, and public requests that cost more than others.

Two kinds. REFUSED asks for what nobody outside may have: it ends with an error before any rank hears of it. SERVED is
what every caller may ask for, and only costs: it gets its share of the server as any other request.
"""

import io
import struct
import uuid
import zlib
from dataclasses import dataclass
from functools import partial
from typing import Any

import grpc
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from perf.soak.wire import CANCELLED, OK, Outcome, Values, message, outcome_of
from stepvideo_serve.launch.boundary import INTERNAL_MODELS, PARAMETER

REFUSED, SERVED = "refused", "served"
GROUPS = (REFUSED, SERVED)
INVALID, FULL, DEADLINE = "INVALID_ARGUMENT", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED"
WRONG_TOKEN = "x" * 43  # as long as a right one
NOTE = b'{"step": [1e15, 1e200]}'
LARGE_SIDE = 8000  # 64 megapixels, the most
SCANS = 100  # the most
SCANNED_SIDE = 1600

Changes = dict[str, NDArray[Any] | bytes]


@dataclass(frozen=True)
class Attack:
    """One request to `model`. `token`: what it carries as the boundary's; None: nothing. `ends`: how it may end.
    `leave_after_s`: the caller cancels after so long."""

    name: str
    model: str
    values: Values
    ends: frozenset[str]
    token: str | None = None
    leave_after_s: float | None = None

    @property
    def public(self) -> bool:
        """Whether the model counts it among its requests."""
        return self.model not in INTERNAL_MODELS

    def send(self, channel: grpc.Channel, limit_s: float) -> Outcome:
        """To its end."""
        values = dict(self.values)
        if "RUN_ID" in values:
            values["RUN_ID"] = uuid.uuid4().hex.encode()
        request = message(self.model, values)
        if self.token is not None:
            request.parameters[PARAMETER].string_param = self.token
        return outcome_of(channel, request, limit_s, self.leave_after_s)


def refused(good: Values) -> list[Attack]:
    """Each call of an internal model without a token and with a wrong one; public requests that are beyond the limits,
    or have no time. `good`: a public request that would be served."""
    attacks = [
        Attack(name, model, values, frozenset({INVALID}), token)
        for name, model, values in _direct_calls()
        for token in (None, WRONG_TOKEN)
    ]
    hopeless: Changes = {"REQUEST_PRIORITY": np.array([1], np.int32), "TIMEOUT_S": np.array([1e-3], np.float32)}
    public = partial(_public, good)
    return [
        *attacks,
        public("prompt of 1 MiB", {INVALID}, {"PROMPT": b"a b " * (1 << 18)}),
        public("png above 64 megapixels", {INVALID}, {"IMAGE": blank_png(LARGE_SIDE + 1, LARGE_SIDE, rows=1)}),
        public("jpeg of too many scans", {INVALID}, {"IMAGE": scanned_jpeg(64, SCANS + 1)}),
        public("hopeless, highest priority", {DEADLINE}, hopeless),
    ]


def served(good: Values) -> list[Attack]:
    """The costliest of what is allowed, at the highest priority."""
    first: Changes = {"REQUEST_PRIORITY": np.array([1], np.int32)}
    ends = {OK, FULL}
    public = partial(_public, good)
    return [
        public("highest priority", ends, first),
        public("png of 64 megapixels", ends, {**first, "IMAGE": blank_png(LARGE_SIDE, LARGE_SIDE)}),
        public("jpeg of 100 scans", ends, {**first, "IMAGE": scanned_jpeg(SCANNED_SIDE, SCANS)}),
        public("highest priority, left", ends | {CANCELLED}, first, leave_after_s=0.05),
    ]


def _public(good: Values, name: str, ends: set[str], changes: Changes, leave_after_s: float | None = None) -> Attack:
    return Attack(name, "ti2v_unary", {**good, **changes}, frozenset(ends), leave_after_s=leave_after_s)


def _direct_calls() -> list[tuple[str, str, Values]]:
    latents = np.zeros((3, 8, 2, 2), np.float32)
    pixels = {"PIXELS": np.zeros((3, 2048, 2048), np.float32), "NOISE": np.zeros((8, 128, 128), np.float32)}
    run: Values = {"RUN_ID": b"", "latents": latents}
    return [
        ("note", "dit_denoiser", {"KIND": b"note", "NOTE": NOTE}),
        ("urgent decoding", "dit_denoiser", {**run, "KIND": b"decode"}),
        ("urgent text", "dit_denoiser", {"RUN_ID": b"", "KIND": b"text", "input_ids": np.ones((1, 3), np.int64)}),
        ("denoising", "dit_denoiser", {**run, "SETTINGS": b"{}"}),
        ("cancel", "dit_denoiser", {"CANCEL_RUN": b"nobody"}),
        ("picture of 2048x2048", "vae_encoder", pixels),
        ("latents of 16 MiB", "vae_decoder", {**run, "latents": np.zeros((16, 8, 180, 180), np.float32)}),
        ("prompt of 1 MiB, direct", "text_encoder", {"PROMPT": b"a b " * (1 << 18)}),
    ]


def blank_png(width: int, height: int, rows: int | None = None) -> bytes:
    """A transparent RGBA picture, packed as tightly as zlib can. `rows`: how many the file has, all by default."""
    packer = zlib.compressobj(9)
    row = bytes(1 + 4 * width)
    packed = b"".join([*(packer.compress(row) for _ in range(height if rows is None else rows)), packer.flush()])
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)), (b"IDAT", packed), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    )


def scanned_jpeg(side: int, scans: int) -> bytes:
    """A progressive grey picture, whose last scan is repeated until there are so many."""
    file = io.BytesIO()
    Image.new("RGB", (side, side), (90, 90, 90)).save(file, "JPEG", progressive=True, subsampling=0)
    data, mark = file.getvalue(), b"\xff\xda"
    last = data.rindex(mark)
    return data[:last] + data[last:-2] * (scans + 1 - data.count(mark)) + data[-2:]
