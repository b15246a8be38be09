"""The Video-VAE: `vae.enc.CASE.*`, `vae.encode_official.*`, `vae.dec.*`, `vae.mix.*`."""

import re

import torch
from torch import Tensor

from export.goldens.answers import GIVEN, NO_GRAPH, UNKNOWN, Answer, Computed, Skipped
from export.goldens.folder import Goldens
from export.goldens.networks import Networks
from stepvideo_serve.geometry import FRAMES_PER_CHUNK, LATENTS_PER_CHUNK
from stepvideo_serve.vae.chunking import ChunkDecoder, blend_borders, decode_chunks, sample_posterior

PREFIX = "vae"
OFFICIAL_CASE = "image"


class VAEGoldens:
    """Videos [B, T, 3, H, W], latents [B, T', z, h, w]."""

    def __init__(self, goldens: Goldens, networks: Networks) -> None:
        self._goldens, self._networks = goldens, networks
        self._posteriors: dict[str, tuple[Tensor, Tensor]] = {}

    def recompute(self, name: str) -> Answer:
        if re.fullmatch(r"vae\.(enc\.\w+\.(input|noise)|encode_official\.noise|dec\.latents|mix\.input)", name):
            return GIVEN
        if found := re.fullmatch(r"vae\.enc\.(\w+)\.(mean|logvar|sample)", name):
            return self._encoded(found[1], found[2], f"vae.enc.{found[1]}.noise")
        if found := re.fullmatch(r"vae\.dec\.chunk(\d+)", name):
            return self._decoded_chunk(int(found[1]))
        match name:
            case "vae.encode_official.sample":
                return self._encoded(OFFICIAL_CASE, "sample", "vae.encode_official.noise")
            case "vae.dec.video":
                return Computed(self._goldens.described_part(name, self._decoded_video(), axis=1))
            case "vae.dec.single":
                return self._decoded_single()
            case "vae.mix.output":
                return Computed(torch.stack([blended(row) for row in self._goldens.tensor("vae.mix.input")]))
        return UNKNOWN

    def _encoded(self, case: str, what: str, noise: str) -> Answer:
        source = f"vae.enc.{case}.input"
        if source not in self._goldens:
            return Skipped(f"its input {source} is not there")
        if not self._networks.has_modules and self._goldens.shape(source)[1] != 1:
            return NO_GRAPH
        mean, logvar = self._posterior(case, source)
        if what == "sample":
            self._goldens.require_size(noise, 2, mean.shape[2], "latent channels")
            return Computed(sample_posterior(mean, logvar, self._goldens.tensor(noise)))
        return Computed(mean if what == "mean" else logvar)

    def _posterior(self, case: str, source: str) -> tuple[Tensor, Tensor]:
        if case not in self._posteriors:
            video = self._goldens.tensor(source)
            if self._networks.has_modules:
                encoder = self._networks.checkpoint.vae_encoder()
                chunks = [encoder(chunk) for chunk in video.split(FRAMES_PER_CHUNK, dim=1)]
                mean, logvar = (torch.cat(parts, dim=1) for parts in zip(*chunks, strict=True))
            else:
                rows = [self._networks.graph("vae_encoder")(pixels=row[None]) for row in video]
                mean, logvar = (torch.cat([row[n] for row in rows]) for n in ("latent_mean", "latent_logvar"))
            self._posteriors[case] = mean, logvar
        return self._posteriors[case]

    def _decoded_chunk(self, index: int) -> Answer:
        chunks = self._latents().split(LATENTS_PER_CHUNK, dim=1)
        if index >= len(chunks):
            return UNKNOWN
        return Computed(torch.cat([self._decoder()(row[None]) for row in chunks[index]]))

    def _decoded_video(self) -> Tensor:
        decode = self._decoder()
        return torch.stack([torch.cat(list(decode_chunks(row, decode))) for row in self._latents()])

    def _decoded_single(self) -> Answer:
        if not self._networks.has_modules:
            return NO_GRAPH
        return Computed(self._networks.checkpoint.vae_decoder()(self._latents()[:, :1]))

    def _latents(self) -> Tensor:
        z_channels = self._networks.checkpoint.vae_config.z_channels
        self._goldens.require_size("vae.dec.latents", 2, z_channels, "latent channels")
        return self._goldens.tensor("vae.dec.latents")

    def _decoder(self) -> ChunkDecoder:
        if self._networks.has_modules:
            return self._networks.checkpoint.vae_decoder()
        graph = self._networks.graph("vae_decoder")
        return lambda latents: graph(latents=latents)["frames"]


def blended(video: Tensor) -> Tensor:
    """[F, ...] -> the same with the chunk borders blended; `video` stays as it is."""
    return torch.cat(list(blend_borders(video.clone().split(FRAMES_PER_CHUNK))))
