"""How far it is from the rank's loop to the velocity: call frames and the length of the functions on the way."""

import inspect
import queue
from pathlib import Path
from types import CodeType
from typing import Any, cast

import pytest
import torch

from stepvideo_serve.assembly.denoiser_rank import DenoiserRank
from stepvideo_serve.config import ServeConfig
from stepvideo_serve.dit.velocity import DiTVelocity, PreparedRequest
from stepvideo_serve.parallel.channel import Channel
from stepvideo_serve.parallel.layout import SINGLE
from stepvideo_serve.parallel.rank_process import JobContext, RankLoop
from stepvideo_serve.parallel.shared_memory import Arena
from tests.mini import job_settings, normal
from tests.serving.launch import EAGER

MOST_FRAMES = 8
MOST_LINES = 40
PARAMS = {"kind": "denoise", "settings": job_settings(1, cfg_scale=1.0), "timeout_s": None}


class OneJob(RankLoop):
    """The loop of a rank that gets one job and whose messages nobody reads."""

    def __init__(self, tensors: dict[str, Any]) -> None:
        self._tensors = tensors
        self._inbox = queue.SimpleQueue()
        self._inbox.put((cast(JobContext, NoContext()), {"params": PARAMS, "tensors": []}))
        self._inbox.put(None)
        self._jobs = cast(Arena, self)
        self._channel = cast(Channel, self)

    def read(self, entries: list[Any]) -> dict[str, Any]:
        assert entries == []
        return self._tensors

    def send(self, wire: bytes) -> None:
        raise AssertionError(wire.decode())


class NoContext:
    """The surroundings of a job that nobody watches."""

    job_id = 1

    def report(self, params: dict[str, Any], tensors: dict[str, Any]) -> None: ...
    def finish(self, params: dict[str, Any], tensors: dict[str, Any]) -> None: ...
    def mark_step(self) -> None: ...

    def cancelled(self) -> bool:
        return False


def test_the_way_is_short(
    mini_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "serve.toml"
    path.write_text(EAGER.format(model=mini_checkpoint, layout="single"))
    tensors = {
        "latents": normal(3, 4, 2, 2).numpy(),
        "condition": normal(4, 2, 2).numpy(),
        "positive_llm": normal(5, 48).numpy(),
        "positive_clip": normal(77, 32).numpy(),
    }
    ways: list[list[CodeType]] = []
    plain = DiTVelocity.__call__

    def seen(
        self: DiTVelocity, latents: torch.Tensor, time: float, request: PreparedRequest
    ) -> tuple[torch.Tensor, ...]:
        codes = [frame.frame.f_code for frame in inspect.stack()[1:]]
        ways.append([plain.__code__, *codes[: codes.index(RankLoop.serve.__code__) + 1]])
        return plain(self, latents, time, request)

    monkeypatch.setattr(DiTVelocity, "__call__", seen)
    OneJob(tensors).serve(DenoiserRank(ServeConfig.load(path), SINGLE, 0))
    [way] = ways
    lines = {code.co_qualname: len(inspect.getsource(code).splitlines()) for code in way}
    with capsys.disabled():
        print(f"\n{len(way)} frames from the rank's loop to the velocity, lines: {lines}")
    assert len(way) <= MOST_FRAMES
    assert max(lines.values()) <= MOST_LINES
