"""How a rank process makes what it runs; named as a text, since the process imports it."""

from pathlib import Path
from typing import Any

import torch

from stepvideo_serve.assembly.denoiser_rank import DenoiserRank
from stepvideo_serve.config import ServeConfig
from stepvideo_serve.errors import SetupError
from stepvideo_serve.memory.placement import Placement
from stepvideo_serve.parallel.collectives import init_process_group
from stepvideo_serve.parallel.gpus import DriverGpus, check_gpus
from stepvideo_serve.parallel.layout import Layout
from stepvideo_serve.serving.observe.logs import configure_logging

COLLECTIVE_TIMEOUT_S = 86_400.0  # the parent finds stuck ranks, long before


def build_rank(settings: dict[str, Any]) -> DenoiserRank:
    """The factory for `RankGroup`; settings["config"] is the path of serve.toml."""
    config = ServeConfig.load(Path(settings["config"]))
    configure_logging(config.logging, f"dit_denoiser rank {settings['rank']}", in_stub=False)
    layout = Layout.parse(config.denoiser.layout)
    if config.model.device == "cuda":
        _use_gpu(Placement.of(config), settings["rank"])
    if layout.world_size > 1:
        backend = "cpu:gloo,cuda:nccl" if config.model.device == "cuda" else "gloo"
        init_process_group(settings, backend, COLLECTIVE_TIMEOUT_S)
    return DenoiserRank(config, layout, settings["rank"])


def _use_gpu(placement: Placement, rank: int) -> None:
    """Rank N computes on GPU N. Raises SetupError where it cannot."""
    gpus = DriverGpus()
    if not gpus.count():
        raise SetupError(
            f'[model] device = "cuda" needs a GPU for each rank, found 0 that torch {torch.__version__} can use: see '
            "nvidia-smi and CUDA_VISIBLE_DEVICES, and install a torch for CUDA."
        )
    check_gpus(placement.layout, rank, gpus, placement.shared)
    torch.cuda.set_device(rank)
