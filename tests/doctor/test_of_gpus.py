"""Drivers and GPUs that are wrong; the driver is played, as nothing here has one."""

from dataclasses import replace
from pathlib import Path

import pytest

from stepvideo_serve.config import ServeConfig
from stepvideo_serve.doctor.case import Case
from stepvideo_serve.doctor.finding import Level
from stepvideo_serve.doctor.of_gpus import (
    communication,
    gpu_memory,
    judge_driver,
    judge_gpus,
    judge_memory,
    kernel_module,
    needed_memory,
)
from stepvideo_serve.launch.options import ServerOptions
from stepvideo_serve.memory.ledger import RANK_REST_BYTES, Holding, Ledger
from stepvideo_serve.memory.sizes import GIB
from stepvideo_serve.parallel.gpus import DEFAULT, EXCLUSIVE_PROCESS
from tests.parallel.test_gpus import Machine

CUDA13 = (13, 0)


@pytest.fixture
def case(config: Path, options: ServerOptions) -> Case:
    """On GPUs, in two ranks."""
    loaded = ServeConfig.load(config)
    model = replace(loaded.model, device="cuda", precision="bf16")
    served = replace(loaded, model=model, denoiser=replace(loaded.denoiser, layout="cfg2"))
    return Case(config, served, options, {})


@pytest.mark.parametrize(
    ("kernel", "cuda", "level", "said"),
    [
        (580, (13, 0), Level.OK, "Driver R580, CUDA 13.0"),
        (595, (13, 2), Level.OK, "Driver R595"),
        (550, (13, 0), Level.OK, "by the compatibility package"),
        (560, (13, 0), Level.WARNING, "the compatibility package is not made for this driver"),
        (550, (12, 4), Level.FAULT, "must take CUDA 13, found driver R550, CUDA 12.4"),
        (580, None, Level.FAULT, "libcuda.so.1 was not found"),
        (None, (13, 0), Level.FAULT, "its kernel module was not found"),
    ],
)
def test_drivers(kernel: int | None, cuda: tuple[int, int] | None, level: Level, said: str) -> None:
    found = judge_driver(kernel, cuda, CUDA13)
    assert found.level is level
    assert said in found.found
    assert bool(found.remedy) is (level in (Level.WARNING, Level.FAULT))


def test_the_kernel_module_is_read(tmp_path: Path) -> None:
    path = tmp_path / "version"
    path.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\nGCC 13\n")
    assert kernel_module(path) == 550
    path.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.159.03  Release Build\n")
    assert kernel_module(path) == 580
    assert kernel_module(tmp_path / "none") is None


def test_gpus_as_they_should_be(case: Case) -> None:
    [found] = judge_gpus(case, Machine((DEFAULT, DEFAULT)), (9, 0), "H100")
    assert (found.level, found.found) == (Level.OK, "2 x H100, 2 for the layout cfg2.")


def test_gpus_that_are_missing_closed_or_apart(case: Case) -> None:
    [found] = judge_gpus(case, Machine((DEFAULT,)), (9, 0), "H100")
    assert (found.level, "needs 2 GPUs, found 1" in found.found) == (Level.FAULT, True)
    [found] = judge_gpus(case, Machine((EXCLUSIVE_PROCESS, DEFAULT)), (9, 0), "H100")
    assert (found.level, "nvidia-smi -i 0 -c DEFAULT" in found.found) == (Level.FAULT, True)
    machine = Machine((DEFAULT, DEFAULT), frozenset({(0, 1)}))
    [found] = judge_gpus(case, machine, (9, 0), "L40S")
    assert (found.level, "GPU 0 cannot reach the memory of GPU 1" in found.found) == (Level.WARNING, True)
    in_fp8 = replace(case.config, model=replace(case.config.model, precision="fp8"))
    [found] = judge_gpus(replace(case, config=in_fp8), Machine((DEFAULT, DEFAULT)), (8, 0), "A100")
    assert (found.level, "FP8 needs compute capability 8.9, A100 has 8.0" in found.found) == (Level.FAULT, True)


def test_memory_against_the_ledger(case: Case) -> None:
    ledger, by = needed_memory(case)
    needed = ledger.by_gpu
    assert list(needed) == [0, 1]
    assert needed[0] > needed[1] > RANK_REST_BYTES, "the stages are on the first"
    assert "ledger" in by
    levels = [next(judge_memory({0: free, 1: free}, ledger, by)).level for free in (2 * needed[0], needed[0] - 1)]
    assert levels == [Level.OK, Level.FAULT]
    [found] = gpu_memory(case)
    assert found.level is Level.UNSEEN
    assert f"GPU 0 needs {needed[0] / GIB:.1f} GiB" in found.found


def test_a_stage_on_a_gpu_of_its_own(case: Case) -> None:
    config = replace(case.config, text=replace(case.config.text, device="cuda:2"))
    before, after = (needed_memory(replace(case, config=one))[0] for one in (case.config, config))
    moved = before.of("text_encoder").total
    assert after.by_gpu == {**before.by_gpu, 0: before.by_gpu[0] - moved, 2: moved + before.of("tritonserver").total}
    [found] = judge_gpus(replace(case, config=config), Machine((DEFAULT, DEFAULT)), (9, 0), "H100")
    assert (found.level, found.found) == (
        Level.FAULT,
        "[text] device must be a GPU of this machine, got cuda:2 of 2.",
    )
    [found] = judge_gpus(replace(case, config=config), Machine((DEFAULT,) * 3), (9, 0), "H100")
    assert found.level is Level.OK


def test_each_gpu_that_has_too_little_is_named() -> None:
    ledger = Ledger(
        (Holding("rank 0", 0, weights=40 * GIB), Holding("vae_encoder", 0, weights=19 * GIB), Holding("rank 1", 1))
    )
    [found] = judge_memory({0: 10 * GIB, 1: GIB}, ledger, "predicted")
    assert found.level is Level.FAULT
    assert found.found == ("GPU 0 has 10.0 GiB free, 60.0 are needed, predicted (rank 0 40.5, vae_encoder 19.5).")
    assert len(list(judge_memory({0: 0, 1: 0}, ledger, "predicted"))) == 2


def test_how_ranks_exchange(case: Case) -> None:
    on_cpu = replace(case.config, model=replace(case.config.model, device="cpu"))
    [found] = communication(replace(case, config=on_cpu))
    assert (found.level, "2 ranks have gloo" in found.found) == (Level.OK, True)
    alone = replace(on_cpu, denoiser=replace(on_cpu.denoiser, layout="single"))
    [found] = communication(replace(case, config=alone))
    assert (found.level, found.found) == (Level.OK, "One rank exchanges nothing.")
    [found] = communication(case)
    assert (found.level, "2 ranks need NCCL" in found.found) == (Level.FAULT, True), "this torch is for processors"


def test_settings_that_make_nccl_slow(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.distributed.is_nccl_available", lambda: True)
    [found] = communication(replace(case, environ={"NCCL_P2P_DISABLE": "1"}))
    assert (found.level, found.remedy) == (Level.WARNING, "unset NCCL_P2P_DISABLE")
    [found] = communication(replace(case, environ={"NCCL_P2P_DISABLE": "0"}))
    assert found.level is Level.OK
