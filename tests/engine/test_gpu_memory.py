"""Waiting for memory that ended processes give back; CUDA's answer is made up, since no GPU is needed to wait."""

import time

import pytest
import torch

from stepvideo_serve.engine import gpu_memory
from stepvideo_serve.engine.gpu_memory import free_memory

GPU = torch.device("cuda", 0)
GIB = 2**30


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What CUDA will say is free, one answer after the other; the last one stays."""
    answers: list[int] = []

    def info(device: torch.device) -> tuple[int, int]:
        assert device == GPU
        return (answers.pop(0) if len(answers) > 1 else answers[0]), 80 * GIB

    monkeypatch.setattr(torch.cuda, "mem_get_info", info)
    monkeypatch.setattr(gpu_memory, "LOOK_S", 0.001)
    return answers


def test_enough_is_not_waited_for(free: list[int]) -> None:
    free += [50 * GIB, 60 * GIB]
    assert free_memory(GPU, 50 * GIB) == 50 * GIB
    assert free == [60 * GIB], "asked once"


def test_memory_that_grows_is_waited_for(free: list[int], caplog: pytest.LogCaptureFixture) -> None:
    free += [2 * GIB, 2 * GIB, 30 * GIB, 47 * GIB, 79 * GIB]
    assert free_memory(GPU, 48 * GIB) == 79 * GIB
    assert caplog.text.count("48.0 GiB of GPU memory are needed, 2.0 are free") == 1


def test_memory_that_does_not_come_is_not_waited_for_for_ever(free: list[int]) -> None:
    free += [2 * GIB]
    began_s = time.monotonic()
    assert free_memory(GPU, 48 * GIB, patience_s=0.05) == 2 * GIB
    assert time.monotonic() - began_s >= 0.05
