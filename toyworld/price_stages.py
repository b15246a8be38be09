"""The stages of the pipeline as the price list's variants compute them: on a group of ranks, on FP8 graphs."""

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

import torch

from export.compare.denoising import graph_opener
from stepvideo_serve.assembly.checkpoint import Checkpoint
from stepvideo_serve.assembly.graphs import dit_graph_names
from stepvideo_serve.assembly.layer_weights import LayerWeights
from stepvideo_serve.assembly.stages import LocalStages
from stepvideo_serve.dit.velocity import DiTVelocity
from stepvideo_serve.engine.manifest import Manifest
from stepvideo_serve.parallel.group import RankGroup
from stepvideo_serve.parallel.job import ResultEvent, StepEvent
from stepvideo_serve.parallel.layout import Layout
from stepvideo_serve.pipeline.generate import Cancelled
from stepvideo_serve.sampling.job import DenoiseJob, StepDone, run_job
from stepvideo_serve.text.encode import TextEncoder
from stepvideo_serve.text.states import TextStates
from stepvideo_serve.video.preview import LatentPreview

RANK_FACTORY: Final = "stepvideo_serve.serving.rank_factory:build_rank"
START_TIMEOUT_S: Final = 300.0
ARENA_BYTES: Final = 16 << 20


class RankStages:
    """The stages of this process, with the denoising on a group of ranks."""

    def __init__(self, local: LocalStages, group: RankGroup) -> None:
        self._local, self._group = local, group
        self.latent_channels, self.presets = local.latent_channels, local.presets
        self.encode_text, self.encode_image = local.encode_text, local.encode_image
        self.decode, self.describe = local.decode, local.describe

    def denoise(self, job: DenoiseJob, cancelled: Cancelled) -> Iterator[StepDone]:  # noqa: ARG002  # nobody cancels
        params, tensors = job.message()
        for event in self._group.run({**params, "timeout_s": job.timeout_s}, tensors):
            if isinstance(event, ResultEvent):
                yield StepDone(job.steps, job.steps, 0.0, None, torch.from_numpy(event.tensors["latents"]))
            elif isinstance(event, StepEvent) and event.params["step"] < job.steps:
                yield StepDone(event.params["step"], job.steps, event.params["seconds"], None, None)


@contextmanager
def ranks_of(checkpoint: Path, layout: str, threads: int) -> Iterator[RankGroup]:
    """Rank processes of the layout on this machine's CPU. Raises SetupError or WorkerFailed."""
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "serve.toml"
        model = f'[model]\ndir = "{checkpoint.absolute()}"\nengines_dir = "{folder}"\nbackend = "eager"\n'
        config.write_text(f'{model}[denoiser]\nlayout = "{layout}"\nthreads = {threads}\n', encoding="utf-8")
        with RankGroup(
            RANK_FACTORY,
            {"config": str(config)},
            size=Layout.parse(layout).world_size,
            start_timeout_s=START_TIMEOUT_S,
            arena_bytes=ARENA_BYTES,
            threads_per_rank=threads,
        ) as group:
            yield group


class GraphStages:
    """Text and denoising on exported graphs, the VAE as in `local`: it has no FP8."""

    def __init__(self, local: LocalStages, text: TextEncoder, dit: DiTVelocity) -> None:
        self._text, self._dit = text, dit
        self._preview = LatentPreview(torch.eye(3, local.latent_channels), torch.zeros(3))
        self.latent_channels, self.presets = local.latent_channels, local.presets
        self.encode_image, self.decode, self.describe = local.encode_image, local.decode, local.describe

    def encode_text(self, prompt: str) -> TextStates:
        return self._text.encode(prompt)[0]

    def denoise(self, job: DenoiseJob, cancelled: Cancelled) -> Iterator[StepDone]:  # noqa: ARG002  # nobody cancels
        return run_job(job, self._dit, self._preview.render)


@contextmanager
def fp8_stages(checkpoint: Path, folder: Path, local: LocalStages, threads: int) -> Iterator[GraphStages]:
    """The graphs of an FP8 export in ONNX Runtime, in fp16 where they say bf16: it has no bf16 on a CPU.

    Raises EngineError for another precision, another checkpoint's graphs or a missing one.
    """
    source, manifest = Checkpoint(checkpoint), Manifest.load(folder)
    manifest.require(precision="fp8", checkpoint=source.identity)
    opening = graph_opener(folder, manifest, source, LayerWeights(source), threads)
    with opening as (open_graph, dtype), ExitStack() as opened:
        names = ("step_llm", "hunyuan_clip", *dit_graph_names(source.dit_config.num_layers))
        graphs = {name: opened.enter_context(open_graph(name)) for name in names}
        llm, clip = graphs.pop("step_llm"), graphs.pop("hunyuan_clip")
        text = TextEncoder(llm, clip, source.step_tokenizer(), source.clip_tokenizer(), cache_entries=64)
        yield GraphStages(local, text, DiTVelocity(graphs, source.dit_config, dtype, torch.device("cpu")))
