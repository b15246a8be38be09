"""The stages of the pipeline as a configuration says: in this process, or one rank's part of them."""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stepvideo_serve.assembly.checkpoint import Checkpoint
from stepvideo_serve.assembly.runners import (
    compute_dtype,
    latent_channels,
    load_runners,
    load_sharded_runners,
    open_manifest,
    served_checkpoint,
)
from stepvideo_serve.config import ServeConfig
from stepvideo_serve.dit.shape_check import check_shapes
from stepvideo_serve.dit.velocity import DiTVelocity, Graph
from stepvideo_serve.engine.manifest import content_key
from stepvideo_serve.engine.runner import EngineRunner
from stepvideo_serve.errors import InvalidRequest, RequestCancelled
from stepvideo_serve.geometry import LATENTS_PER_CHUNK
from stepvideo_serve.memory.placement import DECODER, ENCODER, TEXT, Placement
from stepvideo_serve.parallel.collectives import Collectives
from stepvideo_serve.parallel.communicator import Communicator, OneRank
from stepvideo_serve.parallel.layout import SINGLE, Layout
from stepvideo_serve.pipeline.generate import Cancelled, Frames
from stepvideo_serve.sampling.job import DenoiseJob, StepDone, run_job
from stepvideo_serve.text.states import TextStates
from stepvideo_serve.vae.chunking import blend_borders, decode_chunks, sample_posterior
from stepvideo_serve.video.mp4 import to_uint8
from stepvideo_serve.video.preview import LatentPreview

if TYPE_CHECKING:
    from stepvideo_serve.text.encode import TextEncoder


def build_text_encoder(config: ServeConfig, step_llm: Graph | None = None) -> "TextEncoder":
    """Both text encoders; `step_llm` takes the place of the whole Step-LLM where it runs elsewhere."""
    from stepvideo_serve.text.encode import TextEncoder  # imports transformers, which only this stage should pay for

    checkpoint = Checkpoint(config.model.dir)
    names = ("hunyuan_clip",) if step_llm else ("step_llm", "hunyuan_clip")
    runners = load_runners(config, names, threads=0, stage=TEXT)
    return TextEncoder(
        step_llm or runners["step_llm"].from_cpu,
        runners["hunyuan_clip"].from_cpu,
        checkpoint.step_tokenizer(),
        checkpoint.clip_tokenizer(),
        config.text.cache_entries,
    )


class ImageEncoder:
    """First image -> its latent.

    Keeps the posteriors of the `cache_entries` images used last, by the hash of their pixels. The noise is not part of
    them, so an image is found again whatever the seed.
    """

    def __init__(self, config: ServeConfig) -> None:
        self._graph = load_runners(config, ("vae_encoder",), threads=0, stage=ENCODER)["vae_encoder"]
        self._dtype = compute_dtype(config)
        self._cache_entries = config.encoder.cache_entries
        self._cache: OrderedDict[tuple[torch.Size, bytes], tuple[Tensor, Tensor]] = OrderedDict()

    def encode(self, pixels: Tensor, noise: Tensor) -> tuple[Tensor, bool]:
        """pixels fp32 [3, H, W] in [-1, 1], noise [C, h, w] -> latent [C, h, w] fp32, and whether the image was known.

        Raises InvalidRequest for noise that does not fit the picture.
        """
        key = (pixels.shape, sha256(pixels.contiguous().numpy().data).digest())
        cached = key in self._cache
        mean, logvar = self._cache.pop(key) if cached else self._posterior(pixels)
        self._cache[key] = mean, logvar
        while len(self._cache) > self._cache_entries:
            self._cache.popitem(last=False)
        if noise.shape != mean.shape:
            raise InvalidRequest(f"NOISE must be {list(mean.shape)} for this picture, got {list(noise.shape)}.")
        return sample_posterior(mean, logvar, noise), cached

    def _posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and logarithm of the variance, [C, h, w] fp32 each."""
        out = self._graph(pixels=pixels[None, None].to(self._graph.device, self._dtype))
        mean, logvar = (out[name][0, 0].float().cpu() for name in ("latent_mean", "latent_logvar"))
        return mean, logvar


class FrameDecoder:
    """Latents -> frames, one chunk at a time."""

    def __init__(self, config: ServeConfig) -> None:
        runners = load_runners(config, ("vae_decoder",), config.decoder.threads, stage=DECODER)
        self._graph = runners["vae_decoder"]
        self._dtype = compute_dtype(config)

    def decode(self, latents: Tensor) -> Iterator[Frames]:
        """latents [F, C, h, w] -> uint8 [n, H, W, 3] per chunk."""

        def chunk(part: Tensor) -> Tensor:
            return self._graph(latents=part.to(self._graph.device, self._dtype))["frames"].float()

        return (to_uint8(frames) for frames in decode_chunks(latents, chunk))


def build_frame_decoder(config: ServeConfig) -> FrameDecoder | None:
    """What the model vae_decoder decodes with; None where several ranks do, each with a decoder of its own: one more
    would only take 12 GiB of the first GPU from them."""
    return None if Placement.of(config).ranks_decode else FrameDecoder(config)


Watched = Callable[[str, Graph], Graph]
"""The name of one of the DiT's graphs and the graph -> what is called in its place."""


def unwatched(name: str, graph: Graph) -> Graph:  # noqa: ARG001
    """The graph itself."""
    return graph


class Denoiser:
    """One rank's part of the denoising loop, or all of it; every rank of a layout runs the same jobs in the same
    order. `watched` is asked once for each graph of the DiT, by whoever looks at their calls.

    Raises ConfigError, EngineError or CheckpointError when configuration, graphs and layout do not fit.
    """

    def __init__(
        self,
        config: ServeConfig,
        layout: Layout = SINGLE,
        ranks: Communicator | None = None,
        watched: Watched = unwatched,
    ) -> None:
        dit_config = Checkpoint(config.model.dir).dit_config
        self._ranks = ranks or OneRank()
        self._runners = load_sharded_runners(config, layout, self._ranks.tp_index)
        dtype, device = compute_dtype(config), config.model.device
        graphs = {name: watched(name, runner) for name, runner in self._runners.items()}
        self._dit = DiTVelocity(graphs, dit_config, dtype, device, self._ranks)
        self._preview = load_preview(config, dit_config.in_channels)

    def check(self, job: DenoiseJob) -> None:
        """Raises EngineError, on every rank, for a job whose tensors the graphs do not take; runs nothing."""
        specs = {name: runner.spec for name, runner in self._runners.items()}
        texts = [job.positive] if job.negative is None else [job.positive, job.negative]
        check_shapes(specs, self._dit.config, tuple(job.latents.shape), texts, self._ranks.sp)

    def run(self, job: DenoiseJob) -> Iterator[StepDone]:
        """One StepDone per step; see `run_job`. The leader decides which steps are evaluated."""
        return run_job(job, self._dit, self._preview.render, self._ranks.agree)

    @property
    def runners(self) -> Mapping[str, EngineRunner]:
        """By the names of the graphs."""
        return self._runners

    @property
    def engines(self) -> str:
        """Identifies all graphs of this rank together, for reports."""
        ids = sorted(runner.engine_id for runner in self._runners.values())
        return f"{len(ids)} graphs, {content_key(ids=ids)[:12]}"


def load_preview(config: ServeConfig, channels: int) -> LatentPreview:
    """The colour map fitted at export; without an engine directory (eager) latent channels 0..2 stand for RGB."""
    if config.model.backend == "eager":
        return LatentPreview(torch.eye(3, channels), torch.zeros(3))
    fitted = open_manifest(config).extra["preview"]
    return LatentPreview(torch.tensor(fitted["weight"]), torch.tensor(fitted["bias"]))


def describe(config: ServeConfig) -> dict[str, Any]:
    """The part of a report that the configuration alone decides. `checkpoint` is the identity of the weights, by the
    graphs' manifest; eager torch has none, and hashing the weights takes long. Raises SetupError."""
    known = {} if config.model.backend == "eager" else {"checkpoint": served_checkpoint(config)}
    return {
        "backend": config.model.backend,
        "precision": config.model.precision,
        "layout": config.denoiser.layout,
        **known,
    }


class LocalStages:
    """All stages in this process: the yardstick for the served pipeline. `watched` as for the Denoiser."""

    def __init__(self, config: ServeConfig, watched: Watched = unwatched) -> None:
        self._config = config
        self.latent_channels, self.presets = latent_channels(config), config.presets
        self._text = build_text_encoder(config)
        self._image = ImageEncoder(config)
        self._denoiser = Denoiser(config, watched=watched)
        self._frames = FrameDecoder(config)

    def encode_text(self, prompt: str) -> TextStates:
        return self._text.encode(prompt)[0]

    def encode_image(self, pixels: Tensor, noise: Tensor) -> Tensor:
        return self._image.encode(pixels, noise)[0]

    def denoise(self, job: DenoiseJob, cancelled: Cancelled) -> Iterator[StepDone]:
        for done in self._denoiser.run(job):
            yield done
            if cancelled():
                raise RequestCancelled("The request was cancelled by its caller.")

    def decode(self, latents: Tensor) -> Iterator[Frames]:
        return self._frames.decode(latents)

    def describe(self) -> dict[str, Any]:
        return {**describe(self._config), "engines": self._denoiser.engines}


class ShardedDecoder:
    """The VAE decoder on every rank: chunks are dealt out in rounds, the leader blends them in order."""

    def __init__(self, config: ServeConfig, ranks: Collectives, rank: int, world_size: int) -> None:
        self._graph = load_runners(config, ("vae_decoder",), config.decoder.threads, share=world_size)["vae_decoder"]
        self._dtype = compute_dtype(config)
        self._ranks, self._rank, self._world_size = ranks, rank, world_size

    def check(self, latents: Tensor) -> None:
        """Raises EngineError, on every rank, for latents of which the graph does not take a chunk; runs nothing."""
        for chunk in latents.split(LATENTS_PER_CHUNK):
            self._graph.spec.check_shapes({"latents": (1, *chunk.shape)})

    @property
    def runners(self) -> Mapping[str, EngineRunner]:
        """By the names of the graphs."""
        return {self._graph.spec.name: self._graph}

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
