"""Limits of an architecture and peaks of the GPUs that predictions are made for.

Peaks are the vendors' data-sheet figures, dense (without structured sparsity), at boost clock; what a kernel reaches is
lower. Exponentials: 16 per clock and multiprocessor (the special function units), at boost clock.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from stepvideo_kernels.kernel_spec import Work

REGISTERS_PER_SM = 65_536
REGISTER_GRANULARITY = 256  # registers are handed to warps in these units
RESERVED_SHARED_BYTES = 1024  # the driver's own part of each block's shared memory
TENSOR_MEMORY_COLUMNS = 512


@dataclass(frozen=True)
class Limits:
    """Per multiprocessor."""

    threads: int
    blocks: int
    shared_bytes: int


LIMITS: Mapping[int, Limits] = {
    80: Limits(2048, 32, 164 * 1024),
    89: Limits(1536, 24, 100 * 1024),
    90: Limits(2048, 32, 228 * 1024),
    100: Limits(2048, 32, 228 * 1024),
    120: Limits(1536, 24, 100 * 1024),
}


@dataclass(frozen=True)
class Gpu:
    """tflops by Work.precision; bandwidth in TB/s; texps in tera-exponentials per second."""

    name: str
    sm: int
    tflops: Mapping[str, float]
    bandwidth: float
    texps: float


def _gpu(name: str, sm: int, peaks: tuple[float, float, float], bandwidth: float, units: int, clock_ghz: float) -> Gpu:
    bf16, fp8, fp32 = peaks
    return Gpu(name, sm, {"bf16": bf16, "fp8": fp8, "fp32": fp32}, bandwidth, 16 * units * clock_ghz / 1e3)


GPUS = (
    _gpu("A100", 80, (312, 312, 19.5), 2.04, 108, 1.41),
    _gpu("H100", 90, (989, 1979, 67), 3.35, 132, 1.83),
    _gpu("H200", 90, (989, 1979, 67), 4.8, 132, 1.83),
    _gpu("B200", 100, (2250, 4500, 80), 8.0, 148, 1.96),
    _gpu("L40S", 89, (362, 733, 91.6), 0.864, 142, 2.52),
    _gpu("RTX PRO 6000", 120, (504, 1008, 125), 1.79, 188, 2.62),
)


@dataclass(frozen=True)
class Prediction:
    """The least time that a GPU's peaks allow, and which of them sets it."""

    gpu: str
    milliseconds: float
    limit: str


def roofline(work: Work, sm: int) -> list[Prediction]:
    """One for each GPU of the architecture; the slowest of memory, arithmetic and exponentials."""
    predictions = []
    for gpu in GPUS:
        if gpu.sm != sm:
            continue
        times = {
            "memory": work.bytes / (gpu.bandwidth * 1e12),
            f"{work.precision} arithmetic": work.flops / (gpu.tflops[work.precision] * 1e12),
            "exponentials": work.exps / (gpu.texps * 1e12),
        }
        limit = max(times, key=lambda name: times[name])
        predictions.append(Prediction(gpu.name, times[limit] * 1e3, limit))
    return predictions


def blocks_per_sm(sm: int, *, threads: int, registers: int, shared_bytes: int, tensor_columns: int) -> int:
    """How many blocks one multiprocessor can hold, by threads, registers, shared and tensor memory."""
    limits = LIMITS[sm]
    warps = -(-threads // 32)
    per_warp = -(-registers * 32 // REGISTER_GRANULARITY) * REGISTER_GRANULARITY
    candidates = [
        limits.blocks,
        limits.threads // threads,
        REGISTERS_PER_SM // (per_warp * warps),
        limits.shared_bytes // (shared_bytes + RESERVED_SHARED_BYTES),
    ]
    if tensor_columns:
        candidates.append(TENSOR_MEMORY_COLUMNS // tensor_columns)
    return min(candidates)


def occupancy(sm: int, blocks: int, threads: int) -> float:
    """Resident threads as a fraction of what fits."""
    return blocks * threads / LIMITS[sm].threads


def residency(sm: int, registers: int, threads: int, shared_bytes: int, tensor_columns: int) -> dict[str, float]:
    """Blocks on a multiprocessor and the fraction of its threads that they fill, as JSON values."""
    blocks = blocks_per_sm(
        sm, threads=threads, registers=registers, shared_bytes=shared_bytes, tensor_columns=tensor_columns
    )
    return {"blocks_per_sm": blocks, "occupancy": round(occupancy(sm, blocks, threads), 3)}
