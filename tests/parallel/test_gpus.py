"""What is looked at before a rank takes its GPU; the driver is played."""

import logging
from dataclasses import dataclass

import pytest

from stepvideo_serve.errors import ConfigError, SetupError
from stepvideo_serve.parallel.gpus import DEFAULT, EXCLUSIVE_PROCESS, PROHIBITED, DriverGpus, check_gpus
from stepvideo_serve.parallel.layout import SINGLE, Layout


@dataclass(frozen=True)
class Machine:
    """GPUs with these modes; `apart`: pairs that cannot reach each other."""

    modes: tuple[int, ...]
    apart: frozenset[tuple[int, int]] = frozenset()

    def count(self) -> int:
        return len(self.modes)

    def compute_mode(self, index: int) -> int:
        return self.modes[index]

    def reaches(self, index: int, other: int) -> bool:
        return (index, other) not in self.apart


def test_fewer_gpus_than_ranks() -> None:
    with pytest.raises(ConfigError, match="layout cfg2 needs 2 GPUs, found 1: see nvidia-smi"):
        check_gpus(Layout(cfg=2), 0, Machine((DEFAULT,)))


def test_the_first_gpu_is_shared() -> None:
    with pytest.raises(
        SetupError, match=r"GPU 0 must be open to rank 0 and .*EXCLUSIVE_PROCESS: nvidia-smi -i 0 -c DEF"
    ):
        check_gpus(SINGLE, 0, Machine((EXCLUSIVE_PROCESS,)))
    check_gpus(Layout(tp=2), 1, Machine((DEFAULT, EXCLUSIVE_PROCESS)))
    with pytest.raises(SetupError, match="GPU 1 must be open to rank 1 and the models beside it"):
        check_gpus(Layout(tp=2), 1, Machine((DEFAULT, EXCLUSIVE_PROCESS)), shared=(0, 1))


def test_a_gpu_that_takes_nobody() -> None:
    with pytest.raises(SetupError, match="GPU 1 must be open to rank 1, its compute mode is PROHIBITED"):
        check_gpus(Layout(tp=2), 1, Machine((DEFAULT, PROHIBITED)))


def test_partners_out_of_reach_are_said_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """Rank 1 of cfg2.tp2 exchanges with 0 (tp) and 3 (cfg), and with nobody else."""
    machine = Machine((DEFAULT,) * 4, frozenset({(1, 2), (1, 3)}))
    with caplog.at_level(logging.WARNING):
        check_gpus(Layout(cfg=2, tp=2), 1, machine)
        assert "GPU 1 cannot reach the memory of GPU 3 (P2P)" in caplog.text
        caplog.clear()
        check_gpus(Layout(cfg=2, tp=2), 0, machine)
        assert not caplog.text


def test_without_a_driver_there_are_none() -> None:
    """A driver that cannot be asked for the mode of a GPU does not keep a rank from it."""
    gpus = DriverGpus()
    if gpus.count():
        pytest.skip("needs a machine without a GPU")
    assert gpus.compute_mode(0) == DEFAULT
