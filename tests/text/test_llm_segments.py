"""Step-LLM split by tensor parallelism against the whole one: in one process, and over real ranks."""

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from export.tiny.config import llm_json
from export.tiny_checkpoint import random_state, save_weights, write_json
from stepvideo_serve.assembly.checkpoint import Checkpoint, meta_shapes
from stepvideo_serve.text.segments import LlmAttention, ShardedStepLLM, llm_graph_names
from stepvideo_serve.text.step_llm import StepLLM, StepLLMConfig, alibi_slopes
from stepvideo_serve.weights.cuts import WHOLE, TensorPart
from tests.mini import MINI, relative_error
from tests.text.llm_rank import graphs_of, token_ids

TIMEOUT_S = 60
TOLERANCE = 2e-5
CONFIGS = {
    "6 heads, 2 groups": MINI.llm,
    "12 heads, 4 groups": StepLLMConfig(
        width=96, num_heads=12, num_groups=4, num_layers=2, ffn_width=256, vocab_size=64, norm_eps=1e-5
    ),
}


@dataclass(frozen=True)
class Summed:
    result: Tensor

    def wait(self) -> Tensor:
        return self.result


class Meeting:
    """Where ranks that are threads add up what they bring."""

    def __init__(self, ranks: int) -> None:
        self.partials: list[Tensor | None] = [None] * ranks
        self.barrier = threading.Barrier(ranks, timeout=TIMEOUT_S)

    def sum(self, rank: int, partial: Tensor) -> Tensor:
        self.partials[rank] = partial
        self.barrier.wait()
        total = torch.stack([p for p in self.partials if p is not None]).sum(dim=0)
        self.barrier.wait()
        return total


class ThreadRank:
    """The communicator of one thread. Step-LLM is tensor parallel only: that it calls anything else is a failure."""

    cfg = sp = 1
    cfg_index = sp_index = 0

    def __init__(self, meeting: Meeting, rank: int) -> None:
        self.tp, self.tp_index, self._meeting = len(meeting.partials), rank, meeting
        self.sums = 0

    def sum_tp(self, partial: Tensor) -> Summed:
        self.sums += 1
        return Summed(self._meeting.sum(self.tp_index, partial))

    def to_heads(self, qkv: Tensor, counts: list[int]) -> Tensor:
        raise AssertionError(f"Step-LLM is never split by tokens, got {qkv.shape} and {counts}")

    def to_tokens(self, out: Tensor, counts: list[int]) -> Tensor:
        raise AssertionError(f"Step-LLM is never split by tokens, got {out.shape} and {counts}")

    def gather_tokens(self, own: Tensor, counts: list[int]) -> Tensor:
        raise AssertionError(f"Step-LLM is never split by tokens, got {own.shape} and {counts}")

    def exchange_branches(self, own: Tensor) -> tuple[Tensor, Tensor]:
        raise AssertionError(f"Step-LLM has no guidance branches, got {own.shape}")

    def agree(self, value: int) -> int:
        raise AssertionError(f"Step-LLM decides nothing, got {value}")


@pytest.fixture(scope="module", params=CONFIGS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Of Step-LLM alone."""
    config, folder = CONFIGS[request.param], tmp_path_factory.mktemp("llm")
    write_json(folder / "step_llm" / "config.json", llm_json(config))
    save_weights(folder / "step_llm", "model", random_state(meta_shapes(lambda: StepLLM(config)), 5))
    return Checkpoint(folder)


def whole_states(checkpoint: Checkpoint, length: int) -> Tensor:
    with torch.inference_mode():
        states: Tensor = checkpoint.step_llm()(token_ids(length, checkpoint.llm_config.vocab_size))
    return states


def on_threads(checkpoint: Checkpoint, ranks: int, length: int) -> list[tuple[Tensor, int]]:
    """What each rank returns, and how often it summed."""
    meeting = Meeting(ranks)

    def run(rank: int) -> tuple[Tensor, int]:
        communicator = ThreadRank(meeting, rank)
        graphs = graphs_of(checkpoint, TensorPart(rank, ranks))
        assert list(graphs) == llm_graph_names(checkpoint.llm_config.num_layers)
        llm = ShardedStepLLM(graphs, checkpoint.llm_config, communicator)
        return llm(input_ids=token_ids(length, checkpoint.llm_config.vocab_size))["llm_states"], communicator.sums

    with ThreadPoolExecutor(ranks) as threads:
        return list(threads.map(run, range(ranks)))


@pytest.mark.parametrize("length", [2, 17, 320])
def test_the_parts_together_are_step_llm(checkpoint: Checkpoint, length: int) -> None:
    expected = whole_states(checkpoint, length)
    for ranks in {1, 2, checkpoint.llm_config.num_groups}:
        answers = on_threads(checkpoint, ranks, length)
        assert all(torch.equal(states, answers[0][0]) for states, _ in answers)
        assert relative_error(answers[0][0], expected) < TOLERANCE
        assert {sums for _, sums in answers} == {2 * checkpoint.llm_config.num_layers}


@pytest.mark.parametrize(("heads", "count"), [(6, 2), (12, 4), (48, 8)])
def test_each_rank_has_the_slopes_of_its_own_heads(heads: int, count: int) -> None:
    """Those past the largest power of two too, which follow another series."""
    config = StepLLMConfig(
        width=96, num_heads=heads, num_groups=count, num_layers=1, ffn_width=256, vocab_size=4, norm_eps=1e-5
    )
    assert LlmAttention(config, WHOLE).slopes == alibi_slopes(heads)
    own = heads // count
    for i in range(count):
        assert LlmAttention(config, TensorPart(i, count)).slopes == alibi_slopes(heads)[i * own : (i + 1) * own]


def test_real_ranks(mini_checkpoint: Path, root: Path, tmp_path: Path) -> None:
    """Over gloo, each reading its slices only."""
    ranks, length = MINI.llm.num_groups, 40
    outs = [tmp_path / f"{rank}.safetensors" for rank in range(ranks)]
    common = [sys.executable, "-m", "tests.text.llm_rank", str(mini_checkpoint), str(tmp_path / "store")]
    processes = [
        subprocess.Popen(
            [*common, str(rank), str(ranks), str(out), str(length)],
            cwd=root,
            env={**os.environ, "GLOO_SOCKET_IFNAME": "lo"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, out in enumerate(outs)
    ]
    try:
        for process in processes:
            _, errors = process.communicate(timeout=2 * TIMEOUT_S)
            assert process.returncode == 0, errors
    finally:
        for process in processes:
            process.kill()
            process.wait()
    expected = whole_states(Checkpoint(mini_checkpoint), length)
    states = [load_file(out)["llm_states"] for out in outs]
    assert all(torch.equal(other, states[0]) for other in states)
    assert relative_error(states[0], expected) < TOLERANCE
