"""Driver, GPUs, their memory, and what ranks exchange by. What needs a GPU is not looked at where there is none."""

import ctypes
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import torch
import torch.distributed

from stepvideo_serve.assembly.on_gpus import ledger_of_engines
from stepvideo_serve.doctor.case import Case
from stepvideo_serve.doctor.finding import Finding, Findings, fault, ok, unseen, warning
from stepvideo_serve.doctor.of_engines import needed_graphs
from stepvideo_serve.engine.nvinfer import PACKAGES
from stepvideo_serve.errors import SetupError
from stepvideo_serve.geometry import VideoGeometry
from stepvideo_serve.memory.ledger import Ledger
from stepvideo_serve.memory.placement import SECTIONS, Placement, gpu_of
from stepvideo_serve.memory.predicted import predicted, runs_on
from stepvideo_serve.memory.sizes import GIB
from stepvideo_serve.parallel.gpus import DriverGpus, Gpus, apart, check_gpus
from stepvideo_serve.planning.model_size import ModelConfigs, model_size, workload

KERNEL_MODULE: Final = Path("/proc/driver/nvidia/version")
NEWEST: Final = 580  # the first driver of CUDA 13
WITH_PACKAGE: Final = (535, 550, 570)  # those that CUDA 13's compatibility package helps, on data-centre GPUs
FP8_SM: Final = (8, 9)
SLOW_SETTINGS: Final = ("NCCL_P2P_DISABLE", "NCCL_SHM_DISABLE")
NO_GPU: Final = "There is no GPU here to ask."
NOT_ASKED_FOR: Final = '[model] device is "cpu".'


def driver(case: Case) -> Findings:
    """The driver's library against CUDA, and the kernel's part of it: the two differ with the compatibility package."""
    if not case.wants_gpus:
        yield unseen(NOT_ASKED_FOR)
        return
    needed = torch.version.cuda
    if needed is None:
        yield fault(
            f'torch {torch.__version__} is a build for processors, [model] device is "cuda".',
            "install torch for CUDA, as the package index has it for Linux (docs/engines.md)",
        )
        return
    major, minor = (int(part) for part in needed.split(".")[:2])
    yield judge_driver(kernel_module(KERNEL_MODULE), cuda_of_driver(), (major, minor))


def judge_driver(kernel: int | None, cuda: tuple[int, int] | None, needed: tuple[int, int]) -> Finding:
    """kernel: the branch of the kernel module, such as 550; cuda: the version that libcuda takes; None: not found."""
    if cuda is None or kernel is None:
        which = "libcuda.so.1" if cuda is None else "its kernel module"
        return fault(
            f"The NVIDIA driver must be there, {which} was not found.",
            f"install R{NEWEST} or newer; start a container with --gpus all",
        )
    said = f"driver R{kernel}, CUDA {cuda[0]}.{cuda[1]}, torch for CUDA {needed[0]}.{needed[1]}"
    if cuda[0] < needed[0]:
        return fault(
            f"The driver must take CUDA {needed[0]}, found {said}.",
            f"update to R{NEWEST} or newer; R{', R'.join(map(str, WITH_PACKAGE))} on data-centre GPUs take the "
            "compatibility package, which the image brings (set no LD_LIBRARY_PATH there)",
        )
    if kernel < NEWEST and cuda[0] >= 13:
        if kernel not in WITH_PACKAGE:
            return warning(
                f"{said[0].upper()}{said[1:]}: the compatibility package is not made for this driver.",
                f"update to R{NEWEST} or newer",
            )
        return ok(f"{said[0].upper()}{said[1:]}, by the compatibility package.")
    return ok(f"{said[0].upper()}{said[1:]}.")


def kernel_module(path: Path) -> int | None:
    """The branch of the NVIDIA kernel module; None where none is loaded."""
    try:
        found = re.search(r"Kernel Module\b.*?\s(\d{3})\.\d+", path.read_text(encoding="utf-8"))
    except OSError:
        return None
    return int(found[1]) if found else None


def cuda_of_driver() -> tuple[int, int] | None:
    """The version of CUDA that libcuda takes; None where there is no libcuda."""
    version = ctypes.c_int()
    try:
        failed = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except OSError:
        return None
    return None if failed else (version.value // 1000, version.value % 1000 // 10)


def gpus(case: Case) -> Findings:
    """One for each rank, open to its processes, in reach of each other, and able to do the precision."""
    if not case.wants_gpus:
        yield unseen(NOT_ASKED_FOR)
    elif not torch.cuda.is_available():
        yield unseen(NO_GPU)
    else:
        capability = torch.cuda.get_device_capability(0)
        yield from judge_gpus(case, DriverGpus(), capability, torch.cuda.get_device_name(0))


def judge_gpus(case: Case, machine: Gpus, capability: tuple[int, int], name: str) -> Findings:
    """See `gpus`; `capability` and `name`: of the first."""
    layout, well = case.layout, True
    for rank in range(layout.world_size):
        try:
            check_gpus(layout, rank, machine, Placement.of(case.config).shared)
        except SetupError as error:
            well = False
            yield fault(str(error), "do what the sentence says")
            break
        if others := apart(layout, rank, machine):
            well = False
            yield warning(
                f"GPU {rank} cannot reach the memory of GPU {', '.join(map(str, others))} (P2P): what they exchange "
                "goes through the host, slowly.",
                "nvidia-smi topo -p2p r; switch the IOMMU or ACS off, or choose a layout of fewer GPUs",
            )
    for process, section in SECTIONS.items():
        gpu = gpu_of(case.config, process)
        if gpu is not None and gpu >= machine.count():
            well = False
            yield fault(
                f"[{section}] device must be a GPU of this machine, got cuda:{gpu} of {machine.count()}.",
                "name another one, or leave the key out",
            )
    if case.config.model.precision in ("fp8", "nvfp4") and capability < FP8_SM:
        well = False
        yield fault(
            f"FP8 needs compute capability {FP8_SM[0]}.{FP8_SM[1]}, {name} has {capability[0]}.{capability[1]}.",
            'serve engines in "bf16"',
        )
    if well:
        yield ok(f"{machine.count()} x {name}, {layout.world_size} for the layout {layout}.")


def gpu_memory(case: Case) -> Findings:
    """Free memory of each GPU against what the ledger says of the processes on it."""
    if not case.wants_gpus:
        yield unseen(NOT_ASKED_FOR)
        return
    ledger, by = needed_memory(case)
    if not torch.cuda.is_available():
        yield unseen(f"{NO_GPU} GPU {ledger.fullest} needs {ledger.by_gpu[ledger.fullest] / GIB:.1f} GiB, {by}.")
    else:
        there = range(torch.cuda.device_count())
        yield from judge_memory(
            {gpu: torch.cuda.mem_get_info(gpu)[0] for gpu in ledger.by_gpu if gpu in there}, ledger, by
        )


def judge_memory(free: Mapping[int, int], ledger: Ledger, by: str) -> Findings:
    """free: bytes of each GPU that is there; too few of them are another check's fault."""
    needed = ledger.by_gpu
    spare = {gpu: there - needed[gpu] for gpu, there in free.items()}
    for gpu, left in spare.items():
        if left < 0:
            held = ", ".join(f"{one.process} {one.total / GIB:.1f}" for one in ledger.on(gpu))
            yield fault(
                f"GPU {gpu} has {free[gpu] / GIB:.1f} GiB free, {needed[gpu] / GIB:.1f} are needed, {by} ({held}).",
                "end what else is on it (nvidia-smi), give a stage another GPU ([text] device), choose a layout of "
                "more GPUs (python -m stepvideo_serve layouts), or lower [limits] max_tokens",
            )
    if spare and min(spare.values()) >= 0:
        gpu = min(spare, key=spare.__getitem__)
        yield ok(
            f"GPU {gpu} needs {needed[gpu] / GIB:.1f} GiB, {by}; {spare[gpu] / GIB:.1f} to spare, the least of all."
        )


def needed_memory(case: Case) -> tuple[Ledger, str]:
    """The ledger of the configuration, and by whose word."""
    config = case.config
    if config.model.backend in PACKAGES:
        return ledger_of_engines(config, needed_graphs(config)), "by the ledger of memory and the engines' manifest"
    configs, defaults = ModelConfigs.load(config.model.dir), config.defaults
    work = workload(configs, VideoGeometry(defaults.num_frames, defaults.height, defaults.width), defaults.steps)
    runs = runs_on(config.model.backend)
    found = predicted(model_size(configs), Placement.of(config), work, config.model.precision, runs)
    return found, "predicted by the ledger of memory for a request of [defaults]"


def communication(case: Case) -> Findings:
    """NCCL between GPUs, gloo between processors."""
    ranks = case.layout.world_size
    if ranks == 1:
        yield ok("One rank exchanges nothing.")
        return
    name = "NCCL" if case.wants_gpus else "gloo"
    there = torch.distributed.is_nccl_available() if case.wants_gpus else torch.distributed.is_gloo_available()
    if not there:
        yield fault(f"{ranks} ranks need {name}, this torch {torch.__version__} has none.", "install torch with it")
        return
    slow = [setting for setting in SLOW_SETTINGS if case.environ.get(setting, "0") != "0"]
    if case.wants_gpus and slow:
        yield warning(f"{', '.join(slow)} is set: ranks exchange by slower ways.", f"unset {' '.join(slow)}")
    else:
        yield ok(f"{ranks} ranks have {name}; whether it connects, a start tries (60 s at most).")
