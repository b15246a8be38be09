"""What one rank of a layout runs: its graphs, its communicator, its share of the frames."""

from collections.abc import Callable, Iterator
from dataclasses import replace

from torch import Tensor

from stepvideo_serve.assembly import compute_dtype, load_preview, load_runners
from stepvideo_serve.components import (
    components,
    core_component,
    llm_part_components,
    part_components,
    sharded_graph_names,
)
from stepvideo_serve.config import ServeConfig
from stepvideo_serve.dit.sharded import ShardedVelocity
from stepvideo_serve.engine.eager import EagerRunner
from stepvideo_serve.engine.manifest import content_key
from stepvideo_serve.engine.runner import EngineRunner
from stepvideo_serve.errors import ConfigError
from stepvideo_serve.geometry import LATENTS_PER_CHUNK
from stepvideo_serve.parallel.collectives import Collectives
from stepvideo_serve.parallel.layout import Layout, part_folder
from stepvideo_serve.pipeline import Frames
from stepvideo_serve.sampling.job import DenoiseJob, StepDone, run_job
from stepvideo_serve.sharding import TensorPart
from stepvideo_serve.text.segments import ShardedStepLLM, llm_graph_names
from stepvideo_serve.vae.chunking import blend_borders
from stepvideo_serve.video.mp4 import to_uint8
from stepvideo_serve.weights.checkpoint import Checkpoint


class ShardedDenoiser:
    """One rank's part of the loop; every rank of the layout runs the same jobs in the same order."""

    def __init__(self, config: ServeConfig, layout: Layout, ranks: Collectives) -> None:
        dit_config = Checkpoint(config.model.dir).dit_config
        self._runners = load_sharded_runners(config, layout, ranks.tp_index)
        self._dit = ShardedVelocity(self._runners, dit_config, compute_dtype(config), config.model.device, ranks)
        self._preview = load_preview(config, dit_config.in_channels)

    def run(self, job: DenoiseJob) -> Iterator[StepDone]:
        """One StepDone per step; see `run_job`."""
        return run_job(job, self._dit, self._preview.render)

    @property
    def engines(self) -> str:
        """Identifies all graphs of this rank together, for reports."""
        ids = sorted(runner.engine_id for runner in self._runners.values())
        return f"{len(ids)} graphs, {content_key(ids=ids)[:12]}"


def load_sharded_runners(config: ServeConfig, layout: Layout, tp_index: int) -> dict[str, EngineRunner]:
    """The graphs of the ranks with this tensor-parallel index. Raises ConfigError, EngineError or CheckpointError."""
    checkpoint = Checkpoint(config.model.dir)
    dit_config = checkpoint.dit_config
    layout.check(dit_config.num_heads)
    common, own = sharded_graph_names(dit_config, layout.tp, layout.sp)
    threads, model = config.denoiser.threads, config.model
    if not own:
        return load_runners(config, common, threads)
    if model.backend != "eager":
        part = part_folder(layout, tp_index)
        local = replace(config, model=replace(model, engines_dir=model.engines_dir / part))
        return {**load_runners(config, common, threads), **load_runners(local, own, threads, part)}
    table = components(checkpoint, model.precision)
    table |= part_components(checkpoint, model.precision, TensorPart(tp_index, layout.tp), sequence=layout.sp > 1)
    core = core_component(model.precision, dit_config.num_heads // (layout.tp * layout.sp))
    table[core.name] = core
    return {name: EagerRunner(table[name].spec, table[name].load(), model.device) for name in (*common, *own)}


def build_sharded_llm(config: ServeConfig, layout: Layout, ranks: Collectives) -> ShardedStepLLM:
    """This rank's slice of Step-LLM. Raises ConfigError when the layout does not cut it."""
    checkpoint = Checkpoint(config.model.dir)
    llm_config = checkpoint.llm_config
    layout.check(checkpoint.dit_config.num_heads, llm_groups=llm_config.num_groups)
    if layout.tp == 1:
        raise ConfigError(f"[text] on_ranks needs a layout with tensor parallelism, got {layout}: set it to false.")
    names, model = llm_graph_names(llm_config.num_layers), config.model
    if model.backend == "eager":
        table = llm_part_components(checkpoint, model.precision, TensorPart(ranks.tp_index, layout.tp))
        graphs: dict[str, EngineRunner] = {
            name: EagerRunner(table[name].spec, table[name].load(), model.device) for name in names
        }
    else:
        part = part_folder(layout, ranks.tp_index)
        local = replace(config, model=replace(model, engines_dir=model.engines_dir / part))
        graphs = load_runners(local, names, config.denoiser.threads, part)
    return ShardedStepLLM(graphs, llm_config, ranks)


class ShardedDecoder:
    """The VAE decoder on every rank: chunks are dealt out in rounds, the leader blends them in order."""

    def __init__(self, config: ServeConfig, ranks: Collectives, rank: int, world_size: int) -> None:
        self._graph = load_runners(config, ("vae_decoder",), config.decoder.threads)["vae_decoder"]
        self._dtype = compute_dtype(config)
        self._ranks, self._rank, self._world_size = ranks, rank, world_size

    def decode(self, latents: Tensor, go_on: Callable[[], None]) -> Iterator[Frames]:
        """latents [F, C, h, w] -> on the leader, uint8 frames [n, H, W, 3] a chunk; on other ranks, nothing.

        `go_on` is called by all ranks after each round, and may raise on all of them.
        """
        yield from (to_uint8(frames) for frames in blend_borders(self._chunks(latents, go_on)))

    def _chunks(self, latents: Tensor, go_on: Callable[[], None]) -> Iterator[Tensor]:
        """Decoded chunks [17, 3, H, W] in order, on the leader."""
        chunks = latents.split(LATENTS_PER_CHUNK)
        for first in range(0, len(chunks), self._world_size):
            owners = range(min(self._world_size, len(chunks) - first))
            own = self._decode(chunks[first + self._rank]) if self._rank in owners else None
            like = own if own is not None else latents
            yield from self._ranks.collect(own, like, owners)
            go_on()

    def _decode(self, chunk: Tensor) -> Tensor:
        return self._graph(latents=chunk[None].to(self._graph.device, self._dtype))["frames"][0].float()
