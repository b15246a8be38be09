"""What precision and parallelism cost: every variant against the fp32 sample of the same seed.

    python -m toyworld.price_list [--scenes 4] [--layouts cfg2,tp2,sp2] [--engines fp8=DIR]

Samples held-out scenes and prints a table: relative RMS difference of the latents, PSNR of the decoded frames (both
against fp32 in one process), and what the frames show. Layouts run on real ranks on this machine's CPU. Exits with 1
when a layout differs by more than fp32 rounding, or FP8 by more than twice what bf16 does.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from stepvideo_serve.assembly import LocalStages
from stepvideo_serve.config import ServeConfig
from stepvideo_serve.errors import ConfigError, StepVideoError
from stepvideo_serve.parallel.group import RankGroup
from stepvideo_serve.parallel.layout import Layout
from stepvideo_serve.parallel.run import ResultEvent, StepEvent
from stepvideo_serve.pipeline import Cancelled, Stages
from stepvideo_serve.sampling.job import DenoiseJob, StepDone
from toyworld import metrics
from toyworld.evaluate import CHECKPOINT, Measured, held_out_scene, measure, wording
from toyworld.samples import Sampling, bytes_to_pixels, local_stages, sample, serve_config

RANK_FACTORY: Final = "stepvideo_serve.serving.rank:build_rank"
START_TIMEOUT_S: Final = 300.0
ARENA_BYTES: Final = 16 << 20
LAYOUT_TOLERANCE: Final = 1e-4  # what two equivalent fp32 runs may differ by, end to end
FP8_OVER_BF16: Final = 2.0
REFERENCE: Final = "fp32"


@dataclass(frozen=True)
class Drawn:
    """Samples of one variant: latents fp32 [n, 6, C, 4, 4], frames uint8 [n, 34, 64, 64, 3], and the measurements."""

    latents: NDArray[np.float32]
    frames: NDArray[np.uint8]
    measured: list[Measured]


@dataclass(frozen=True)
class Price:
    """One row: latent error is the RMS difference from fp32 over the RMS of fp32, psnr_db the frames' (infinite when
    equal); the shares are those of samples that do as prompted."""

    variant: str
    latent_error: float
    psnr_db: float
    direction: float
    colour: float
    first_frame_db: float


class RankStages:
    """The stages of this process, with the denoising on a group of ranks."""

    def __init__(self, local: LocalStages, group: RankGroup) -> None:
        self._local, self._group = local, group
        self.latent_channels = local.latent_channels
        self.encode_text, self.encode_image = local.encode_text, local.encode_image
        self.decode, self.describe = local.decode, local.describe

    def denoise(self, job: DenoiseJob, cancelled: Cancelled) -> Iterator[StepDone]:  # noqa: ARG002  # nobody cancels
        tensors = {"latents": job.latents, "condition": job.condition}
        texts = {"positive": job.positive, "negative": job.negative}
        for branch, text in texts.items():
            if text is not None:
                tensors |= {f"{branch}_llm": text.llm, f"{branch}_clip": text.clip}
        names = ("steps", "cfg_scale", "time_shift", "motion_score", "preview_every", "timeout_s")
        params = {"kind": "denoise", **{name: getattr(job, name) for name in names}}
        for event in self._group.run(params, {name: tensor.numpy() for name, tensor in tensors.items()}):
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


def draw(stages: Stages, config: ServeConfig, scenes: int, sampling: Sampling, name: str) -> Drawn:
    """The held-out scenes 0 .. scenes - 1, seed = number of the scene."""
    latents, frames, measured = [], [], []
    for index in range(scenes):
        print(f"{name}: scene {index + 1}/{scenes}", file=sys.stderr, flush=True)
        scene = held_out_scene(index)
        latents.append(sample(stages, config, scene, wording(scene, index), index, sampling, output="latents"))
        frames.append(np.concatenate(list(stages.decode(torch.from_numpy(latents[-1])))))
        measured.append(measure(bytes_to_pixels(frames[-1]), scene))
    return Drawn(np.stack(latents), np.stack(frames), measured)


def price(variant: str, drawn: Drawn, reference: Drawn) -> Price:
    difference = drawn.latents - reference.latents
    return Price(
        variant=variant,
        latent_error=float(np.sqrt(np.square(difference).mean() / np.square(reference.latents).mean())),
        psnr_db=metrics.psnr(torch.from_numpy(drawn.frames) / 127.5, torch.from_numpy(reference.frames) / 127.5),
        direction=statistics.mean(float(one.direction) for one in drawn.measured),
        colour=statistics.mean(float(one.colour) for one in drawn.measured),
        first_frame_db=statistics.mean(one.first_frame_db for one in drawn.measured),
    )


def faults(prices: list[Price]) -> list[str]:
    """One sentence per row that is dearer than it may be."""
    by_name = {row.variant: row for row in prices}
    found = [
        f"Layout {row.variant} must agree with one rank to {LAYOUT_TOLERANCE:g}, its latents differ by "
        f"{row.latent_error:.2g}."
        for row in prices
        if row.variant not in ("bf16", "fp8", REFERENCE) and row.latent_error > LAYOUT_TOLERANCE
    ]
    if "fp8" in by_name and by_name["fp8"].latent_error > FP8_OVER_BF16 * by_name["bf16"].latent_error:
        found.append(
            f"FP8 must cost at most {FP8_OVER_BF16:g} times bf16's latent error of {by_name['bf16'].latent_error:.2g}, "
            f"it costs {by_name['fp8'].latent_error:.2g}."
        )
    return found


def table(prices: list[Price]) -> str:
    """Markdown, for README."""
    lines = [
        "| variant | latent error | PSNR of frames, dB | direction | colour | first frame, dB |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in prices:
        psnr = "equal" if row.psnr_db == float("inf") else f"{row.psnr_db:.1f}"
        lines.append(
            f"| {row.variant} | {row.latent_error:.1e} | {psnr} | {row.direction:.2f} | {row.colour:.2f} | "
            f"{row.first_frame_db:.1f} |"
        )
    return "\n".join(lines)


def price_all(
    checkpoint: Path, layouts: list[str], engines: dict[str, Path], scenes: int, sampling: Sampling, threads: int
) -> list[Price]:
    """All variants, the reference first. `engines`: folders of exported graphs, by precision."""
    config = serve_config(checkpoint, threads=threads)
    local = local_stages(config)
    reference = draw(local, config, scenes, sampling, REFERENCE)
    prices = [price(REFERENCE, reference, reference)]
    half = serve_config(checkpoint, "bf16", threads)
    prices.append(price("bf16", draw(local_stages(half), half, scenes, sampling, "bf16"), reference))
    for precision, folder in engines.items():
        exported = serve_config(checkpoint, precision, threads, folder)
        drawn = draw(local_stages(exported), exported, scenes, sampling, precision)
        prices.append(price(precision, drawn, reference))
    for layout in layouts:
        with ranks_of(checkpoint, layout, threads) as group:
            drawn = draw(RankStages(local, group), config, scenes, sampling, layout)
            prices.append(price(layout, drawn, reference))
    return prices


def main() -> int:
    options = _parser().parse_args()
    try:
        engines = dict(_engine_folder(text) for text in options.engines)
        sampling = Sampling(steps=options.steps)
        layouts = [name for name in options.layouts.split(",") if name]
        prices = price_all(options.checkpoint, layouts, engines, options.scenes, sampling, options.threads)
    except (StepVideoError, OSError) as error:
        print(f"toyworld.price_list: {error}", file=sys.stderr)
        return 2
    print(table(prices))
    if options.json:
        rows: list[dict[str, Any]] = [asdict(row) for row in prices]
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    found = faults(prices)
    for sentence in found:
        print(f"toyworld.price_list: {sentence}", file=sys.stderr)
    return int(bool(found))


def _engine_folder(text: str) -> tuple[str, Path]:
    precision, separator, folder = text.partition("=")
    if not separator:
        raise ConfigError(f"--engines must be PRECISION=DIR, got {text}: write for example fp8=build/onnx-fp8.")
    return precision, Path(folder)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m toyworld.price_list", description="Price precision and layouts.")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--scenes", type=int, default=4, help="held-out scenes (default %(default)s)")
    parser.add_argument("--layouts", default="cfg2,tp2,sp2", help="comma-separated (default %(default)s)")
    parser.add_argument("--engines", action="append", default=[], metavar="PRECISION=DIR", help="exported graphs")
    parser.add_argument("--steps", type=int, default=Sampling.steps)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads per rank (default %(default)s)")
    parser.add_argument("--json", type=Path, help="file for the table's numbers")
    return parser


if __name__ == "__main__":
    sys.exit(main())
