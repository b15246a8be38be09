"""What a rank calls the caller's fault: tensors that no graph takes, before anything has run, and nothing later."""

from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from stepvideo_serve.assembly.denoiser_rank import DenoiserRank
from stepvideo_serve.config import ServeConfig
from stepvideo_serve.engine.runner import EngineRunner
from stepvideo_serve.errors import EngineError, InvalidRequest
from stepvideo_serve.parallel.layout import SINGLE
from stepvideo_serve.parallel.rank_process import JobContext
from tests.mini import job_settings, normal
from tests.serving.launch import EAGER

PARAMS = {"kind": "denoise", "settings": job_settings(2, cfg_scale=1.0), "timeout_s": None}
TENSORS = {
    "latents": normal(3, 4, 2, 2).numpy(),
    "condition": normal(4, 2, 2).numpy(),
    "positive_llm": normal(5, 48).numpy(),
    "positive_clip": normal(77, 32).numpy(),
}


class NoContext:
    """The surroundings of a job that nobody watches."""

    def report(self, params: dict[str, Any], tensors: dict[str, Any]) -> None: ...
    def mark_step(self) -> None: ...

    def cancelled(self) -> bool:
        return False


@pytest.fixture
def rank(mini_checkpoint: Path, tmp_path: Path) -> DenoiserRank:
    path = tmp_path / "serve.toml"
    path.write_text(EAGER.format(model=mini_checkpoint, layout="single"))
    return DenoiserRank(ServeConfig.load(path), SINGLE, 0)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The graphs that were run. Where it holds "fail" first, the sixth call is one that its engine refuses."""
    names: list[str] = []
    plain = EngineRunner.__call__

    def call(self: EngineRunner, **inputs: Any) -> Any:
        names.append(self.spec.name)
        if names[0] == "fail" and len(names) > 5:
            raise EngineError(f"Engine {self.spec.name} must run, TensorRT refused.")
        return plain(self, **inputs)

    monkeypatch.setattr(EngineRunner, "__call__", call)
    return names


def run(rank: DenoiserRank, **changes: Any) -> Any:
    return rank.run(PARAMS, {**TENSORS, **changes}, cast(JobContext, NoContext()))


@pytest.mark.parametrize(
    "changes",
    [
        {"latents": np.zeros((3, 5, 2, 2), np.float32), "condition": np.zeros((5, 2, 2), np.float32)},
        {"positive_llm": np.zeros((3, 7), np.float32)},
        {"negative_llm": np.zeros((321, 48), np.float32), "negative_clip": np.zeros((77, 32), np.float32)},
    ],
    ids=["channels", "text-width", "negative-too-long"],
)
def test_tensors_that_fit_no_graph_are_refused_before_any_runs(
    rank: DenoiserRank, calls: list[str], changes: dict[str, Any]
) -> None:
    with pytest.raises(InvalidRequest, match="The tensors must fit the graphs, they do not: Engine dit_"):
        run(rank, **changes)
    assert calls == []
    assert run(rank)[1]["latents"].shape == (3, 4, 2, 2)


def test_an_engine_that_refuses_later_is_not_the_callers_fault(rank: DenoiserRank, calls: list[str]) -> None:
    calls.append("fail")
    with pytest.raises(EngineError, match="TensorRT refused"):
        run(rank)
    assert len(calls) == 6
