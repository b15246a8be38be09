"""The program of one rank in tests/parallel/test_sharded.py: real gloo ranks that run every layout in turn.

    python -m tests.parallel.sharded_ranks RANK FOLDER

reads FOLDER/plan.json and writes FOLDER/<layout>.<rank>.pt.
"""

import json
import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from stepvideo_serve.assembly.stages import Denoiser, ShardedDecoder
from stepvideo_serve.config import ServeConfig
from stepvideo_serve.parallel.collectives import Collectives
from stepvideo_serve.parallel.layout import Layout
from stepvideo_serve.request.presets import Preset
from stepvideo_serve.sampling.job import DenoiseJob
from stepvideo_serve.text.states import TextStates
from tests.mini import job_settings

LATENTS = (3, 4, 3, 5)  # 45 tokens: divisible by neither 2 nor 4
LLM_TOKENS = (9, 5)
LLM_CHANNELS, CLIP_CHANNELS = 48, 32
STEPS = 3
FORECAST_STEPS = 16


def make_job(cfg_scale: float = 4.0) -> DenoiseJob:
    """The same job on every rank; two branches of different text length, unless cfg_scale is 1."""
    generator = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    texts = [TextStates(normal(n, LLM_CHANNELS), normal(77, CLIP_CHANNELS)) for n in LLM_TOKENS]
    return DenoiseJob(
        latents=normal(*LATENTS),
        condition=normal(*LATENTS[1:]),
        positive=texts[0],
        negative=texts[1] if cfg_scale > 1 else None,
        settings=job_settings(STEPS, cfg_scale),
    )


def make_forecast_job() -> DenoiseJob:
    """Some steps are forecast, some evaluated with guidance and some without."""
    preset = Preset(
        "adaptive", tolerance=100, dense_start=0.0, dense_end=0.9, longest_streak=3, guidance_from=0.1, guidance_to=0.5
    )
    return replace(make_job(), settings=job_settings(FORECAST_STEPS, 4.0), preset=preset)


def make_video() -> torch.Tensor:
    """Latents [F, C, h, w] of five chunks: more than one round, and not the same for all ranks."""
    return torch.randn((15, 4, 2, 3), generator=torch.Generator().manual_seed(6))


def run_layout(name: str, config: ServeConfig, rank: int, folder: Path) -> None:
    """Latents after each step of a guided and of an unguided job, and the bytes sent in one step of each."""
    layout = Layout.parse(name)
    if rank >= layout.world_size:
        return
    rendezvous = f"file://{folder}/{name}.store"
    dist.init_process_group("gloo", rendezvous, timeout=timedelta(seconds=60), world_size=layout.world_size, rank=rank)
    ranks = Collectives(layout, rank)
    denoiser = Denoiser(config, layout, ranks)
    results: dict[str, Any] = {}
    for kind, scale in (("guided", 4.0), ("alone", 1.0)):
        ranks.sent_bytes.clear()
        steps = [done.latents for done in denoiser.run(make_job(scale))]
        results[kind] = {"latents": torch.stack([x for x in steps if x is not None])}
        results[kind]["bytes"] = {name: total // STEPS for name, total in ranks.sent_bytes.items()}
    *_, last = denoiser.run(make_forecast_job())
    assert last.latents is not None
    assert last.state is not None
    results["forecast"] = {"latents": last.latents, "mask": last.state.mask}
    eager = replace(config, model=replace(config.model, backend="eager"))  # graphs of the VAE take long to export
    decoder = ShardedDecoder(eager, ranks, rank, layout.world_size)
    frames = list(decoder.decode(make_video(), lambda: None))
    results["frames"] = torch.cat([torch.from_numpy(chunk) for chunk in frames]) if frames else torch.empty(0)
    torch.save(results, folder / f"{name}.{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    plan = json.loads((folder / "plan.json").read_text())
    config = ServeConfig.load(Path(plan["config"]))
    for layout in plan["layouts"]:
        run_layout(layout, config, rank, folder)


if __name__ == "__main__":
    main()
