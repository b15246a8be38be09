"""What a request will take, from what it asks for and what the server has measured. Pure arithmetic.

Seconds are the sum of the stages, each told by its rate (pace.py) from its work: FLOPs of the steps, pixels of the
pictures, tokens of the texts. Waiting is apart. Memory is what the ledger predicts (memory/).
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import ceil, prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stepvideo_serve.config import ServeConfig
from stepvideo_serve.errors import ServiceUnavailable
from stepvideo_serve.geometry import FRAMES_PER_CHUNK, VideoGeometry
from stepvideo_serve.memory.placement import Placement
from stepvideo_serve.memory.predicted import predicted, runs_on
from stepvideo_serve.memory.sizes import ModelSize, Workload
from stepvideo_serve.parallel.layout import Layout
from stepvideo_serve.planning.evaluations import EvaluationCounts, Expected, known_evaluations
from stepvideo_serve.planning.model_size import ModelConfigs, decoder_bytes, encoder_bytes, model_size
from stepvideo_serve.planning.pace import Rate, step_flops
from stepvideo_serve.request import (
    INPUT_NAMES,
    OUTPUT_LATENTS,
    OUTPUT_MP4,
    GenerationRequest,
    check_names,
    check_quality,
    field_value,
    fields_for,
    parse_request,
)
from stepvideo_serve.request.presets import EVALUATED, Preset, preset_name
from stepvideo_serve.sampling.denoise import flow_times, needs_guidance
from stepvideo_serve.sampling.evaluation import EvaluationPlan, guided_share
from stepvideo_serve.text.states import CLIP_TOKENS, LLM_MAX_TOKENS

PARTS: Mapping[str, tuple[str, ...]] = {
    "text": ("text",),
    "vae_encode": ("image", "vae_encode"),
    "denoise": ("prepare", "step", "forecast"),
    "vae_decode": ("vae_decode",),
    "mp4": ("check", "mp4"),
}
"""The parts of a quote, and the stages that each is made of."""

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class QuoteRequest:
    """What is asked about. preset: what QUALITY means. prompt_tokens and negative_tokens: Step-LLM tokens of the texts,
    both 2 to 320; a negative text of None is the usual one, which is in the cache."""

    request: GenerationRequest
    preset: Preset
    prompt_tokens: int
    negative_tokens: int | None

    @classmethod
    def parse(cls, inputs: Arrays, config: ServeConfig, latent_channels: int) -> "QuoteRequest":
        """From the inputs of `ti2v_quote`, under the rules of `ti2v`. Raises InvalidRequest."""
        check_names(inputs, fields_for("quote"))
        nobody = {name: np.array([value], np.object_) for name, value in (("PROMPT", b""), ("IMAGE", b"none"))}
        shared = {name: array for name, array in inputs.items() if name in INPUT_NAMES}
        request = parse_request({**nobody, **shared}, config.limits, latent_channels, config.defaults)
        preset = check_quality(request, config.presets)
        own = [field for field in fields_for("quote") if field.name not in INPUT_NAMES]
        values = {field.attribute: field_value(field, inputs, config.limits, config.defaults) for field in own}
        return cls(request, preset, **values)

    @property
    def texts(self) -> list[int]:
        """Context tokens of each guidance branch."""
        negative = self.negative_tokens or LLM_MAX_TOKENS
        branches = [self.prompt_tokens, negative] if needs_guidance(self.request.cfg_scale) else [self.prompt_tokens]
        return [CLIP_TOKENS + tokens for tokens in branches]

    @property
    def new_tokens(self) -> int:
        """Tokens of the texts that are not in the cache."""
        guided = needs_guidance(self.request.cfg_scale)
        return self.prompt_tokens + ((self.negative_tokens or 0) if guided else 0)


@dataclass(frozen=True)
class Server:
    """What decides about a quote besides the measurements."""

    size: ModelSize
    configs: ModelConfigs
    placement: Placement
    precision: str
    device: str
    runs: str

    @classmethod
    def of(cls, config: ServeConfig) -> "Server":
        """Raises SetupError."""
        configs, model = ModelConfigs.load(config.model.dir), config.model
        runs = runs_on(model.backend)
        return cls(model_size(configs), configs, Placement.of(config), model.precision, model.device, runs)

    @property
    def layout(self) -> Layout:
        return self.placement.layout

    @property
    def decoders(self) -> int:
        """How many decode at the same time: all ranks, or one model."""
        return self.layout.world_size

    def peak_memory_bytes(self, geometry: VideoGeometry, branches: int) -> int:
        """Of the fullest GPU, predicted. Without GPUs: what its processes would hold there, but for CUDA's own."""
        work = Workload(
            tokens=geometry.tokens // self.configs.dit.patch_size**2,
            text_tokens=CLIP_TOKENS + LLM_MAX_TOKENS,
            steps=0,
            chunks=geometry.chunks,
            prepare_flops=0.0,
            llm_flops=0.0,
            encode_flops=0.0,
            chunk_flops=0.0,
            chunk_bytes=decoder_bytes(self.configs.vae, geometry.height, geometry.width),
            image_bytes=encoder_bytes(self.configs.vae, geometry.height, geometry.width),
            branches=branches,
        )
        ledger = predicted(self.size, self.placement, work, self.precision, self.runs)
        if self.device == "cuda":
            return max(ledger.by_gpu.values())
        return max(sum(holding.tensors for holding in ledger.on(gpu)) for gpu in ledger.by_gpu)


def stage_work(request: GenerationRequest, new_tokens: int, image_is_new: bool, decoders: int) -> dict[str, float]:
    """The work of the stages that `ti2v` times, without those that have none; units as in pace.WORK."""
    geometry = request.geometry
    pixels = geometry.height * geometry.width
    decoded = pixels * FRAMES_PER_CHUNK * ceil(geometry.chunks / decoders)
    everything = pixels * geometry.num_frames
    work = {
        "text": new_tokens,
        "image": pixels,
        "vae_encode": pixels if image_is_new else 0,
        "vae_decode": decoded if request.output != OUTPUT_LATENTS else 0,
        "check": everything if request.output == OUTPUT_MP4 else 0,
        "mp4": everything if request.output == OUTPUT_MP4 else 0,
    }
    return {stage: float(amount) for stage, amount in work.items() if amount}


def quote(asked: QuoteRequest, server: Server, state: Mapping[str, Any]) -> dict[str, Any]:
    """The report: seconds and GPU seconds by part and in all, memory, waiting, evaluations. `state` is dit_denoiser's
    answer to "pace". Raises ServiceUnavailable for stages and presets that have not been measured."""
    request, geometry = asked.request, asked.request.geometry
    tokens = geometry.tokens // server.configs.dit.patch_size**2
    expected = expected_evaluations(asked, tokens, state["evaluations"])
    flops = step_flops(server.configs.dit, tokens, asked.texts)
    work = {**stage_work(request, asked.new_tokens, True, server.decoders), "prepare": float(tokens), "step": flops}
    if expected.least < request.steps:
        work["forecast"] = float(prod(geometry.latent_shape(server.configs.dit.in_channels)))
    stages = _seconds(work, state["rates"], request)
    step_s, forecast_s = stages["step"], stages.get("forecast", 0.0)
    evaluation_s = step_s
    if expected.guided_share < 1 and len(asked.texts) > 1 and server.layout.cfg == 1:
        alone = step_flops(server.configs.dit, tokens, asked.texts[:1])
        alone_s = _seconds({"step": alone}, state["rates"], request)["step"]
        evaluation_s = expected.guided_share * step_s + (1 - expected.guided_share) * alone_s

    def loop_s(evaluations: float) -> float:
        return evaluations * evaluation_s + (request.steps - evaluations) * forecast_s

    stages |= {"step": expected.mean * evaluation_s, "forecast": (request.steps - expected.mean) * forecast_s}
    parts = {part: sum(stages.get(stage, 0.0) for stage in PARTS[part]) for part in PARTS}
    total_s = sum(parts.values())
    ranks = server.layout.world_size
    encoders = ranks if server.placement.llm_on_ranks else 1
    gpus = {"text": encoders, "vae_encode": 1, "denoise": ranks, "vae_decode": ranks}
    gpu_seconds = {part: parts[part] * count for part, count in gpus.items()}
    return {
        "seconds": {"total": total_s, **parts},
        "seconds_range": [total_s + loop_s(count) - loop_s(expected.mean) for count in (expected.least, expected.most)],
        "gpu_seconds": {"total": sum(gpu_seconds.values()), **gpu_seconds},
        "step_seconds": step_s,
        "forecast_seconds": forecast_s,
        "step_flops": flops,
        "quality": {"preset": preset_name(request.quality), **asked.preset.parameters()},
        "evaluations": asdict(expected),
        "notes": _notes(asked, server.layout),
        "queue_wait_s": state["wait_s"] or 0.0,
        "waiting": state["waiting"],
        "peak_memory_mib": server.peak_memory_bytes(geometry, len(asked.texts)) / 2**20,
        "tokens": tokens,
        "frames": request.num_frames,
        "height": request.height,
        "width": request.width,
        "steps": request.steps,
        "layout": str(server.layout),
    }


def expected_evaluations(asked: QuoteRequest, tokens: int, counts: Sequence[Any]) -> Expected:
    """Exact where the preset decides beforehand, also about guidance; else as `counts` (EvaluationCounts.points) say.
    Raises ServiceUnavailable for an adaptive preset that has not run yet."""
    request, preset = asked.request, asked.preset
    if known_evaluations(preset, request.steps) is not None:
        times = flow_times(request.steps, request.time_shift)
        guided = needs_guidance(request.cfg_scale)
        plan = EvaluationPlan.of(preset, times, guided, request.cfg_scale, request.time_shift)
        mask = preset.mask or EVALUATED * request.steps
        count = mask.count(EVALUATED)
        return Expected(count, count, count, guided_share(plan, mask) if guided else 1.0)
    expected = EvaluationCounts(counts).expected(preset, request.steps, tokens)
    if expected is None:
        raise ServiceUnavailable(
            f"A quote needs a finished run of QUALITY {request.quality}, and there was none yet on this server: run "
            "one request with it first."
        )
    return expected


def _notes(asked: QuoteRequest, layout: Layout) -> list[str]:
    if layout.cfg == 1 or asked.preset.guides_always or not needs_guidance(asked.request.cfg_scale):
        return []
    return [
        f"Layout {layout} has ranks for each guidance branch: a step without guidance costs it as much as one with."
    ]


def _seconds(
    work: Mapping[str, float], rates: Mapping[str, Sequence[Any]], request: GenerationRequest
) -> dict[str, float]:
    known = {stage: Rate(rates.get(stage, ())).seconds(amount) for stage, amount in work.items()}
    missing = [stage for stage, seconds in known.items() if seconds is None]
    if missing:
        raise ServiceUnavailable(
            f"A quote needs measurements of every stage, and {', '.join(missing)} has not run yet on this server: "
            f"run one request with OUTPUT {request.output}, QUALITY {preset_name(request.quality)} and a new prompt "
            "and image first."
        )
    return {stage: seconds for stage, seconds in known.items() if seconds is not None}
