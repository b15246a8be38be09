"""The pipeline in this process on given graphs, from prompt and image to latents: for calibration and comparison.

Text is encoded before the rest, so that the text encoders and the DiT are never in memory together.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stepvideo_serve.assembly.checkpoint import Checkpoint
from stepvideo_serve.assembly.graphs import dit_graph_names
from stepvideo_serve.dit.velocity import DiTVelocity
from stepvideo_serve.engine.runner import EngineRunner
from stepvideo_serve.errors import ExportError
from stepvideo_serve.pipeline.generate import Cancelled, Frames
from stepvideo_serve.request import OUTPUT_LATENTS, GenerationRequest, RequestLimits, parse_request
from stepvideo_serve.request.presets import shipped_presets
from stepvideo_serve.sampling.denoise import needs_guidance
from stepvideo_serve.sampling.job import DenoiseJob, StepDone, run_job
from stepvideo_serve.text.states import TextStates
from stepvideo_serve.vae.chunking import sample_posterior
from stepvideo_serve.video.preview import LatentPreview
from stepvideo_serve.weights.whole_file import is_hidden

IMAGES = (".png", ".jpg", ".jpeg", ".webp")

Open = Callable[[str], EngineRunner]
"""Opens a graph by its name."""


class GraphStages:
    """Stages of `pipeline.generate` for requests that ask for latents. `texts` holds the states of all prompts."""

    def __init__(
        self, checkpoint: Checkpoint, open_graph: Open, texts: Mapping[str, TextStates], dtype: torch.dtype
    ) -> None:
        config = checkpoint.dit_config
        self.latent_channels, self.presets = config.in_channels, shipped_presets()
        self._texts, self._dtype = texts, dtype
        self._image = open_graph("vae_encoder")
        graphs = {name: open_graph(name) for name in dit_graph_names(config.num_layers)}
        self._runners = [self._image, *graphs.values()]
        self._dit = DiTVelocity(graphs, config, dtype, self._image.device)
        self._preview = LatentPreview(torch.eye(3, config.in_channels), torch.zeros(3))

    def encode_text(self, prompt: str) -> TextStates:
        return self._texts[prompt]

    def encode_image(self, pixels: Tensor, noise: Tensor) -> Tensor:
        out = self._image(pixels=pixels[None, None].to(self._image.device, self._dtype))
        mean, logvar = (out[name][0, 0].float().cpu() for name in ("latent_mean", "latent_logvar"))
        return sample_posterior(mean, logvar, noise)

    def denoise(self, job: DenoiseJob, cancelled: Cancelled) -> Iterator[StepDone]:
        del cancelled  # nobody can
        return run_job(job, self._dit, self._preview.render)

    def decode(self, latents: Tensor) -> Iterator[Frames]:
        raise ExportError(f"These stages end at the latents, got some of shape {list(latents.shape)} to decode.")

    def describe(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        """Frees the graphs."""
        for runner in self._runners:
            runner.close()


def encode_prompts(checkpoint: Checkpoint, open_graph: Open, prompts: Iterable[str]) -> dict[str, TextStates]:
    """The states of each prompt; the text encoders are freed afterwards."""
    from stepvideo_serve.text.encode import TextEncoder  # imports transformers, which takes long

    wanted = list(dict.fromkeys(prompts))
    with open_graph("step_llm") as llm, open_graph("hunyuan_clip") as clip:
        tokenizers = checkpoint.step_tokenizer(), checkpoint.clip_tokenizer()
        encoder = TextEncoder(llm.from_cpu, clip.from_cpu, *tokenizers, cache_entries=0)
        return {prompt: encoder.encode(prompt)[0] for prompt in wanted}


def prompts_of(requests: Iterable[GenerationRequest]) -> list[str]:
    """Every prompt that the requests need encoded."""
    found = []
    for request in requests:
        found.append(request.positive_prompt)
        if needs_guidance(request.cfg_scale):
            found.append(request.negative_prompt)
    return found


def read_requests(
    folder: Path, limit: int | None, channels: int, **options: int | float
) -> dict[str, GenerationRequest]:
    """A request per pair NAME.png (or .jpg, .webp) and NAME.txt below `folder`, by its path without the suffix.

    `options` are inputs of a request by their names in lower case, such as num_frames=17, steps=8; the n-th request
    has the seed n. Raises ExportError when there is no pair or an image lacks its text, and InvalidRequest.
    """
    if limit is not None and limit < 1:
        raise ExportError(f"--limit must be at least 1 pair, got {limit}: correct it.")
    if not folder.is_dir():
        raise ExportError(f"--requests must be a folder of image and text pairs, found no folder {folder}.")
    files = (path for path in folder.rglob("*") if not is_hidden(path))
    images = sorted(path for path in files if path.suffix.lower() in IMAGES)[:limit]
    if not images:
        raise ExportError(f"--requests must hold pairs such as cat.png and cat.txt, found no image in {folder}.")
    if missing := [path for path in images if not path.with_suffix(".txt").is_file()]:
        raise ExportError(f"{missing[0]} needs its prompt beside it in {missing[0].stem}.txt, found none: add it.")
    found = {}
    for index, path in enumerate(images):
        prompt = path.with_suffix(".txt").read_text(encoding="utf-8").strip()
        name = path.relative_to(folder).with_suffix("").as_posix()
        found[name] = make_request(prompt, path.read_bytes(), channels, {"seed": index, **options})
    return found


def make_request(prompt: str, image: bytes, channels: int, options: Mapping[str, int | float]) -> GenerationRequest:
    """A request for latents; `options` as in `read_requests`. Raises InvalidRequest."""
    inputs = {
        "PROMPT": np.array([prompt.encode()], dtype=object),
        "IMAGE": np.array([image], dtype=object),
        "OUTPUT": np.array([OUTPUT_LATENTS.encode()], dtype=object),
    }
    for name, value in options.items():
        kind = np.int64 if name == "seed" else np.int32 if isinstance(value, int) else np.float32
        inputs[name.upper()] = np.array([value], dtype=kind)
    return parse_request(inputs, RequestLimits(), channels)
