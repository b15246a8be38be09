"""From first image and prompt to frames: every prefix with `.init_latents`, such as `e2e.*`.

The stages are those of serving, in the order of serving; noise is given instead of drawn from a seed.
"""

import re
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from export.goldens.answers import GIVEN, PIPELINE_TOLERANCE, UNKNOWN, Answer, Computed, Skipped
from export.goldens.folder import Goldens
from export.goldens.networks import Networks
from export.goldens.text import context_mask, padded_tokens, text_states
from stepvideo_serve.dit.velocity import DiTVelocity
from stepvideo_serve.geometry import PIXELS_PER_LATENT
from stepvideo_serve.sampling.denoise import denoise, flow_times, guide, needs_guidance
from stepvideo_serve.vae.chunking import decode_chunks, sample_posterior
from stepvideo_serve.video.image import fit_image
from stepvideo_serve.video.mp4 import crop_to_standard, to_uint8

KNOWN = re.compile(r"guided\d+|latents[1-9]\d*|video|frames_u8")


class PipelineGoldens:
    """Entries of one prefix; goldens.json holds the settings of the run under that name."""

    def __init__(self, goldens: Goldens, networks: Networks, prefix: str) -> None:
        self._goldens, self._networks, self._prefix = goldens, networks, prefix

    def recompute(self, name: str) -> Answer:
        part = name.removeprefix(f"{self._prefix}.")
        if part in ("init_latents", "encode_noise"):
            return GIVEN
        if self._prefix not in self._goldens.settings:
            return Skipped(f"goldens.json does not say the settings of {self._prefix}")
        if part == "cond":
            return Computed(self._condition)
        if part == "y_mask":
            tokenizer = self._networks.checkpoint.step_tokenizer()
            ids = [tokenizer.encode(prompt, truncate=True) for prompt in self._prompts()]
            return Computed(context_mask(padded_tokens(ids)[1]))
        if not KNOWN.fullmatch(part):
            return UNKNOWN
        if part == "frames_u8":
            return Computed(self._goldens.described_part(name, self._frames(), axis=0))
        whole = self._video if part == "video" else self._steps.get(part)
        if whole is None:
            return UNKNOWN
        return Computed(self._goldens.described_part(name, whole[None], axis=1), PIPELINE_TOLERANCE)

    def _setting(self, key: str) -> Any:
        return self._goldens.setting(self._prefix, key)

    def _prompts(self) -> tuple[str, str]:
        return self._setting("prompt") + self._setting("pos_magic"), self._setting("neg_magic")

    def _noise(self) -> Tensor:
        """[F, C, h, w]; the size of the video follows from it."""
        name = f"{self._prefix}.init_latents"
        channels = self._networks.checkpoint.dit_config.in_channels
        self._goldens.require_size(name, 2, channels, "latent channels")
        return self._goldens.tensor(name)[0]

    @cached_property
    def _condition(self) -> Tensor:
        """[1, 1, C, h, w]."""
        height, width = (PIXELS_PER_LATENT * size for size in self._noise().shape[2:])
        pixels = fit_image(self._goldens.image(self._setting("image")), height, width)
        posterior = self._networks.graph("vae_encoder")(pixels=pixels[None, None])
        noise = self._goldens.tensor(f"{self._prefix}.encode_noise")
        return sample_posterior(posterior["latent_mean"], posterior["latent_logvar"], noise)

    @cached_property
    def _steps(self) -> dict[str, Tensor]:
        """`guidedN`: the guided velocity of step N, `latentsN`: the latents after N steps, each [F, C, h, w]."""
        checkpoint, noise = self._networks.checkpoint, self._noise()
        tokenizers = checkpoint.step_tokenizer(), checkpoint.clip_tokenizer()
        scale = float(self._setting("cfg"))
        prompts = self._prompts() if needs_guidance(scale) else self._prompts()[:1]
        texts = tuple(text_states(self._networks, *tokenizers, prompt) for prompt in prompts)
        dit = DiTVelocity(self._networks.dit_graphs(), checkpoint.dit_config, torch.float32)
        request = dit.prepare(tuple(noise.shape), self._condition[0, 0], float(self._setting("motion")), texts)
        recorded: dict[str, Tensor] = {}

        def velocity(latents: Tensor, time: float) -> Tensor:
            branches = dit(latents, time, request)
            guided = guide(*branches, scale) if len(branches) == 2 else branches[0]
            recorded[f"guided{len(recorded) // 2}"] = guided
            return guided

        times = flow_times(int(self._setting("steps")), float(self._setting("shift")))
        for done, latents in enumerate(denoise(noise, times, velocity), 1):
            recorded[f"latents{done}"] = latents
        return recorded

    @cached_property
    def _video(self) -> Tensor:
        """[F, 3, H, W], not clamped."""
        graph = self._networks.graph("vae_decoder")
        latents = self._steps[f"latents{int(self._setting('steps'))}"]
        return torch.cat(list(decode_chunks(latents, lambda chunk: graph(latents=chunk)["frames"])))

    def _frames(self) -> Tensor:
        """uint8 [F, H, W, 3]. NaN, which serving refuses, becomes grey here, so that the comparison fails."""
        return torch.from_numpy(crop_to_standard(to_uint8(self._video.nan_to_num())))
