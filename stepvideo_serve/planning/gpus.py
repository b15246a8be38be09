"""What the planner knows about a GPU, and how much of it a run is expected to reach.

Peaks are those of NVIDIA's data sheets without sparsity (H100 and H200 SXM, HGX B200 at 1000 W, L40S). The shares that
are reached:

    bf16 0.57, fp8 0.50   LightX2V's Wan2.1 on eight H100 and TensorRT-LLM's Wan2.2 on B200 report 57-58 % of the bf16
                          peak; FP8 linears with FP8 attention reach about 1 PFLOP/s of 1.98 on Hopper. This project's
                          own step in torch on one H200 reaches 0.53 in bf16, with its fused kernels 0.59 (docs/gpu.md).
                          The L40S is given the same shares for want of numbers; its power limit may take more.
    Video-VAE 0.33        of the bf16 peak: measured in torch on one H200 with the fused attention (docs/gpu.md)
    links 0.80            protocol overhead of about 20 % (NVIDIA/nccl-tests issue 212: 370 of 450 GB/s); what
                          NVSwitch can save by summing itself is not assumed
    while sums run 0.85   of the computation goes on: NCCL takes some of the multiprocessors
"""

from collections.abc import Mapping
from dataclasses import dataclass

from stepvideo_serve.errors import ConfigError
from stepvideo_serve.memory.sizes import GIB

EFFICIENCY: Mapping[str, float] = {"bf16": 0.57, "fp8": 0.50}
VAE_EFFICIENCY = 0.33
LINK_EFFICIENCY = 0.80
OVERLAP_LOSS = 0.15
ONE_NODE = 8


@dataclass(frozen=True)
class GPU:
    """memory_gib as CUDA reports it, rounded down. dense_flops: peak FLOP/s by precision. link_bytes_per_s: in one
    direction, out of one GPU, whatever the number of peers. latency_s: of one collective, however small."""

    name: str
    memory_gib: int
    dense_flops: Mapping[str, float]
    link: str
    link_bytes_per_s: float
    latency_s: float

    @property
    def memory_bytes(self) -> int:
        return self.memory_gib * GIB

    def flops(self, precision: str) -> float:
        """FLOP/s that the matrix multiplications of a transformer are expected to reach."""
        return self.dense_flops[precision] * EFFICIENCY[precision]

    @property
    def vae_flops(self) -> float:
        """FLOP/s that the Video-VAE is expected to reach, in bf16."""
        return self.dense_flops["bf16"] * VAE_EFFICIENCY

    def send_seconds(self, wire_bytes: float, calls: int = 1) -> float:
        """For `calls` collectives that send `wire_bytes` together."""
        return wire_bytes / (self.link_bytes_per_s * LINK_EFFICIENCY) + calls * self.latency_s


GPUS: Mapping[str, GPU] = {
    gpu.name: gpu
    for gpu in (
        GPU("H100", 79, {"bf16": 989e12, "fp8": 1979e12}, "NVLink 4", 450e9, 20e-6),
        GPU("H200", 139, {"bf16": 989e12, "fp8": 1979e12}, "NVLink 4", 450e9, 20e-6),
        GPU("B200", 178, {"bf16": 2250e12, "fp8": 4500e12}, "NVLink 5", 900e9, 20e-6),
        GPU("L40S", 44, {"bf16": 362e12, "fp8": 733e12}, "PCIe 4.0 x16", 32e9, 40e-6),
    )
}


def gpu_named(name: str) -> GPU:
    """Upper or lower case. Raises ConfigError for a GPU that is not in the table."""
    if name.upper() not in GPUS:
        raise ConfigError(f"The GPU must be one of {', '.join(GPUS)}, got {name!r}: choose the nearest of these.")
    return GPUS[name.upper()]
