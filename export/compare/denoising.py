"""A short denoising loop on the graphs of an export, against torch in fp32 and against what torch loses in bf16.

Graphs that take their weights as inputs get those of a checkpoint or of its weight set, and the report names them.
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from export.compare.fp16_copy import twin_spec, write_fp16_twin
from export.compare.graph_stages import GraphStages, Open, encode_prompts, make_request, prompts_of
from export.compare.one_graph import error_row, weights_in
from export.compare.shared_graphs import with_step_llm
from export.graphs.preview_fit import smooth_images
from stepvideo_serve.assembly.checkpoint import Checkpoint
from stepvideo_serve.assembly.graphs import components
from stepvideo_serve.assembly.layer_weights import LayerWeights
from stepvideo_serve.config import VideoConfig
from stepvideo_serve.engine.manifest import GraphEntry, Manifest
from stepvideo_serve.engine.ort import OrtRunner
from stepvideo_serve.engine.parity import WEIGHTS
from stepvideo_serve.engine.runner import EagerRunner
from stepvideo_serve.engine.spec import TORCH_DTYPES
from stepvideo_serve.errors import ExportError
from stepvideo_serve.pipeline.generate import generate
from stepvideo_serve.request import GenerationRequest
from stepvideo_serve.sampling.job import DenoiseJob, StepDone

FP32_ALLOWED = 1e-4
"""Largest error of fp32 latents, relative to the largest magnitude: what two equivalent official runs may differ by."""
BF16_RATIO = 2.0
"""Root mean square error of latents in low precision, over that of torch in bf16."""
PROMPT = "镜头慢慢推近，画面中的光线柔和地变化。"

Latents = list[Tensor]


class RecordingStages(GraphStages):
    """Keeps the latents [F, C, h, w] after every step in `latents`."""

    latents: Latents

    def denoise(self, job: DenoiseJob, cancelled: Callable[[], bool]) -> Iterator[StepDone]:
        self.latents = []
        for done in super().denoise(job, cancelled):
            if done.latents is not None:
                self.latents.append(done.latents.clone())
            yield done


def run_loop(checkpoint: Checkpoint, open_graph: Open, dtype: torch.dtype, request: GenerationRequest) -> Latents:
    """The latents after each step, from prompt and image on."""
    texts = encode_prompts(checkpoint, open_graph, prompts_of([request]))
    stages = RecordingStages(checkpoint, open_graph, texts, dtype)
    try:
        for _ in generate(request, stages, VideoConfig(), lambda: False):
            continue
        return stages.latents
    finally:
        stages.close()


def run_eager(checkpoint: Checkpoint, precision: str, request: GenerationRequest) -> Latents:
    """In torch, in "fp32" or "bf16"."""
    table = components(checkpoint, precision)
    dtype = TORCH_DTYPES[table["dit_final"].spec.outputs[0].dtype]
    return run_loop(checkpoint, lambda name: EagerRunner(table[name].spec, table[name].load()), dtype, request)


@contextmanager
def graph_opener(
    directory: Path, manifest: Manifest, checkpoint: Checkpoint, weights: LayerWeights, threads: int
) -> Iterator[tuple[Open, torch.dtype]]:
    """Opens the ONNX graphs of a folder in ONNX Runtime, bf16 and FP8 ones as their fp16 twins; and their dtype. Graphs
    that take them as inputs get their `weights`; twins of FP8 ones are in fp32, whose range products without scales
    need.

    Raises EngineError for a graph that is not there, ExportError for what is no ONNX graph or has plugins.
    """
    kind = twin_dtype(manifest)
    with tempfile.TemporaryDirectory(prefix=".twins-", dir=directory) as twins:

        def open_graph(name: str) -> OrtRunner:
            entry = manifest.graph(name)
            path = directory / entry.file
            _require_standard(name, entry)
            spec, given = twin_spec(entry.spec, kind), weights.of(name, entry.spec)
            if spec != entry.spec:
                twin = Path(twins, path.name)
                if not twin.is_file():  # of a graph that layers share
                    write_fp16_twin(path, twin, kind)
                path = twin
            return OrtRunner(spec, path, threads, weights=weights_in(spec, given))

        yield with_step_llm(checkpoint, manifest, kind, open_graph), TORCH_DTYPES[kind]


def twin_dtype(manifest: Manifest) -> str:
    """In what the graphs of a folder run on a CPU."""
    if manifest.precision == "fp32" or (manifest.precision == "fp8" and manifest.takes_weights):
        return "float32"
    return "float16"


def _require_standard(name: str, entry: GraphEntry) -> None:
    chosen = entry.extras.get("ops", {}).values()
    fp4 = entry.extras.get("fp8", {}).get("fp4_linears", 0) > 0
    if not entry.file.endswith(".onnx") or fp4 or any(choice["implementation"] == "plugin" for choice in chosen):
        raise ExportError(
            f"{name} must be an ONNX graph of standard operators to run on a CPU, {Path(entry.file).name} is not: "
            "compare the graphs of an export without plugins and NVFP4."
        )


def loop_report(
    directory: Path,
    manifest: Manifest,
    checkpoint: Checkpoint,
    weights: LayerWeights,
    request: GenerationRequest,
    threads: int = 0,
) -> dict[str, Any]:
    """Runs the loop three times and compares; JSON values for `Manifest.extra["loop_parity"]`.

    steps    per step, "graphs" and "bf16": error, rms, cosine (see compare.error_row)
    weights  by graph that takes them as inputs, what its own report calls those of this loop
    value, allowed, passed, rule   the verdict, on the latents after the last step
    """
    reference = run_eager(checkpoint, "fp32", request)
    bf16 = run_eager(checkpoint, "bf16", request)
    with graph_opener(directory, manifest, checkpoint, weights, threads) as (open_graph, dtype):
        found = run_loop(checkpoint, open_graph, dtype, request)
    graphs, yardstick = ([error_row(x, wide) for x, wide in zip(run, reference, strict=True)] for run in (found, bf16))
    given = {name: weights.identity(name) for name, entry in manifest.graphs.items() if entry.spec.weights}
    return {
        "request": _describe(request),
        "graphs": {name: entry.key for name, entry in manifest.graphs.items()},
        "steps": [{"graphs": ours, "bf16": theirs} for ours, theirs in zip(graphs, yardstick, strict=True)],
        **({WEIGHTS: given} if given else {}),
        **verdict(manifest.precision, graphs[-1], yardstick[-1]),
    }


def verdict(precision: str, graphs: dict[str, float], bf16: dict[str, float]) -> dict[str, Any]:
    """value, allowed, passed, rule."""
    if precision == "fp32":
        value, allowed, rule = graphs["error"], FP32_ALLOWED, "largest error of the latents, fp32"
    else:
        value, allowed = graphs["rms"] / bf16["rms"], BF16_RATIO
        rule = "rms error of the latents over that of torch in bf16"
    return {"value": value, "allowed": allowed, "passed": bool(value <= allowed), "rule": rule}


def sample_request(checkpoint: Checkpoint, **options: int | float) -> GenerationRequest:
    """A request with a smooth random picture; `options` as in stages.read_requests."""
    pixels = ((smooth_images()[0].permute(1, 2, 0) + 1) * 127.5).numpy().astype(np.uint8)
    file = BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return make_request(PROMPT, file.getvalue(), checkpoint.dit_config.in_channels, {"seed": 0, **options})


def _describe(request: GenerationRequest) -> dict[str, Any]:
    names = ("num_frames", "height", "width", "steps", "cfg_scale", "time_shift", "motion_score", "seed")
    return {name: getattr(request, name) for name in names}
