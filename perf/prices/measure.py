"""The same request under several variants, in this process: what each costs against the first."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stepvideo_serve.assembly.runners import latent_channels
from stepvideo_serve.assembly.stages import Denoiser, FrameDecoder, ImageEncoder, build_text_encoder
from stepvideo_serve.config import GatesConfig, ServeConfig
from stepvideo_serve.pipeline.generate import Cancelled, Frames, Result, generate
from stepvideo_serve.planning.prices import EQUAL_DB
from stepvideo_serve.request import OUTPUT_LATENTS, GenerationRequest
from stepvideo_serve.request.presets import EVALUATED, EXACT_PRESET, Preset
from stepvideo_serve.sampling.denoise import flow_times, needs_guidance
from stepvideo_serve.sampling.evaluation import EvaluationPlan, guided_share
from stepvideo_serve.sampling.job import DenoiseJob, StepDone
from stepvideo_serve.text.states import TextStates

Observe = Callable[[Frames, int], dict[str, float]]
"""(frames uint8 [F, H, W, 3], number of the case) -> what they show, by name; "speed" is that along the prompt."""


@dataclass(frozen=True)
class Case:
    """One request to measure."""

    name: str
    request: GenerationRequest


@dataclass(frozen=True)
class Variant:
    """A way to run every request. steps: other STEPS than the request's; precision: another than the configured one;
    decode: whether its frames are looked at."""

    name: str
    preset: Preset = EXACT_PRESET
    steps: int | None = None
    precision: str | None = None
    decode: bool = True


@dataclass(frozen=True)
class Clip:
    """One request under one variant. See planning/prices.py for the figures; `shown` is what was observed."""

    variant: str
    mask: str
    evaluations: int
    guided_share: float
    seconds: float
    latent_error: float
    psnr_db: float | None
    shown: dict[str, float]


def prompts_of(cases: Sequence[Case]) -> list[str]:
    """Every text that the cases need encoded, once."""
    texts = [case.request.positive_prompt for case in cases]
    texts += [case.request.negative_prompt for case in cases if needs_guidance(case.request.cfg_scale)]
    return list(dict.fromkeys(texts))


def encode_texts(config: ServeConfig, texts: Sequence[str]) -> dict[str, TextStates]:
    """The states of each text. The encoders are freed afterwards: they and the DiT are never in memory together."""
    encoder = build_text_encoder(config)
    return {text: encoder.encode(text)[0] for text in texts}


class PriceStages:
    """The stages of the pipeline in this process, with the texts encoded before. `preset` holds for the next run, and
    `last` is that run's last step."""

    def __init__(self, config: ServeConfig, texts: Mapping[str, TextStates]) -> None:
        self.config = config
        self.latent_channels, self.presets = latent_channels(config), config.presets
        self.preset = EXACT_PRESET
        self.last: StepDone | None = None
        self._texts = texts
        self._image, self._denoiser, self._frames = ImageEncoder(config), Denoiser(config), FrameDecoder(config)

    def encode_text(self, prompt: str) -> TextStates:
        return self._texts[prompt]

    def encode_image(self, pixels: Tensor, noise: Tensor) -> Tensor:
        return self._image.encode(pixels, noise)[0]

    def denoise(self, job: DenoiseJob, cancelled: Cancelled) -> Iterator[StepDone]:  # noqa: ARG002  # nobody cancels
        for done in self._denoiser.run(replace(job, preset=self.preset)):
            self.last = done
            yield done

    def decode(self, latents: Tensor) -> Iterator[Frames]:
        return self._frames.decode(latents)

    def describe(self) -> dict[str, Any]:
        return {}


class Measurement:
    """Runs cases under variants. stages: by precision, None the configured one's."""

    def __init__(self, stages: Mapping[str | None, PriceStages], variants: Sequence[Variant], observe: Observe) -> None:
        self._stages, self._variants, self._observe = stages, variants, observe

    def clips(self, case: Case, number: int, said: Callable[[str], None]) -> list[Clip]:
        """One Clip per variant, the first is the reference of the others. Raises RequestError."""
        found: list[Clip] = []
        reference: tuple[Tensor, Frames] | None = None
        for variant in self._variants:
            said(variant.name)
            stages = self._stages[variant.precision]
            latents, seconds = run(stages, case.request, variant)
            decoder = self._stages[None] if variant.precision is None else stages
            frames = np.concatenate(list(decoder.decode(latents))) if variant.decode or reference is None else None
            if reference is None:
                assert frames is not None
                reference = latents, frames
            found.append(self._clip(variant, case, number, (latents, frames), reference, seconds))
        return found

    def _clip(
        self,
        variant: Variant,
        case: Case,
        number: int,
        drawn: tuple[Tensor, Frames | None],
        reference: tuple[Tensor, Frames],
        seconds: float,
    ) -> Clip:
        last = self._stages[variant.precision].last
        assert last is not None
        assert last.state is not None
        latents, frames = drawn
        return Clip(
            variant=variant.name,
            mask=last.state.mask,
            evaluations=last.state.mask.count(EVALUATED),
            guided_share=_guided_share(variant, case.request, last.state.mask),
            seconds=seconds,
            latent_error=float((latents - reference[0]).double().norm() / reference[0].double().norm()),
            psnr_db=None if frames is None else psnr_db(frames, reference[1]),
            shown={} if frames is None else self._observe(frames, number),
        )


def run(stages: PriceStages, request: GenerationRequest, variant: Variant) -> tuple[Tensor, float]:
    """The final latents [F, C, h, w] and the denoising's seconds. Raises RequestError."""
    stages.preset = variant.preset
    asked = replace(request, output=OUTPUT_LATENTS, preview_every=0, steps=variant.steps or request.steps)
    gates = GatesConfig(first_frame="off", black="off", frozen="off")
    *_, result = generate(asked, stages, stages.config.video, lambda: False, gates)
    assert isinstance(result, Result)
    assert result.latents is not None
    return torch.from_numpy(result.latents), result.report["seconds"]["denoise"]


def psnr_db(frames: Frames, reference: Frames) -> float:
    """Of uint8 frames, over all values; 99 where they are equal."""
    difference: NDArray[np.float32] = frames.astype(np.float32) - reference.astype(np.float32)
    square = float(np.square(difference).mean(dtype=np.float64))
    return EQUAL_DB if square == 0 else min(EQUAL_DB, 20 * math.log10(255) - 10 * math.log10(square))


def _guided_share(variant: Variant, request: GenerationRequest, mask: str) -> float:
    times = flow_times(len(mask), request.time_shift)
    guided = needs_guidance(request.cfg_scale)
    plan = EvaluationPlan.of(variant.preset, times, guided, request.cfg_scale, request.time_shift)
    return guided_share(plan, mask)
