"""What precision and parallelism cost: every variant against the fp32 sample of the same seed.

    python -m toyworld.price_list [--scenes 4] [--layouts cfg2,cfg2.tp2] [--fp8 DIR]

Samples held-out scenes and prints a table: relative RMS difference of the latents, PSNR of the decoded frames (both
against fp32 in one process), and what the frames show. --fp8 names a folder of export.to_onnx --precision fp8, whose
graphs run in ONNX Runtime. Layouts run on real ranks on this machine's CPU. Exits with 1 when a layout differs by more
than fp32 rounding, or FP8 by more than twice what bf16 does.
"""

import argparse
import json
import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from stepvideo_serve.config import ServeConfig
from stepvideo_serve.errors import StepVideoError
from stepvideo_serve.pipeline.generate import Stages
from toyworld import metrics
from toyworld.evaluate import CHECKPOINT, Measured, held_out_scene, measure, wording
from toyworld.price_stages import RankStages, fp8_stages, ranks_of
from toyworld.samples import Sampling, bytes_to_pixels, local_stages, sample, serve_config

LAYOUTS: Final = "cfg2,tp2,sp2,cfg2.tp2,cfg2.sp2"  # all that two heads allow
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
    """Markdown, for docs/measured.md."""
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
    checkpoint: Path, layouts: list[str], fp8: Path | None, scenes: int, sampling: Sampling, threads: int
) -> list[Price]:
    """All variants, the reference first. `fp8`: a folder of exported graphs."""
    config = serve_config(checkpoint, threads=threads)
    local = local_stages(config)
    reference = draw(local, config, scenes, sampling, REFERENCE)
    prices = [price(REFERENCE, reference, reference)]
    half = serve_config(checkpoint, "bf16", threads)
    halves = local_stages(half)
    prices.append(price("bf16", draw(halves, half, scenes, sampling, "bf16"), reference))
    if fp8 is not None:
        with fp8_stages(checkpoint, fp8, halves, threads) as stages:
            prices.append(price("fp8", draw(stages, half, scenes, sampling, "fp8"), reference))
    for layout in layouts:
        with ranks_of(checkpoint, layout, threads) as group:
            drawn = draw(RankStages(local, group), config, scenes, sampling, layout)
            prices.append(price(layout, drawn, reference))
    return prices


def main() -> int:
    options = _parser().parse_args()
    try:
        sampling = Sampling(steps=options.steps)
        layouts = [name for name in options.layouts.split(",") if name]
        prices = price_all(options.checkpoint, layouts, options.fp8, options.scenes, sampling, options.threads)
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m toyworld.price_list", description="Price precision and layouts.")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--scenes", type=int, default=4, help="held-out scenes (default %(default)s)")
    parser.add_argument("--layouts", default=LAYOUTS, help="comma-separated (default %(default)s)")
    parser.add_argument("--fp8", type=Path, metavar="DIR", help="FP8 graphs of the checkpoint")
    parser.add_argument("--steps", type=int, default=Sampling.steps)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads per rank (default %(default)s)")
    parser.add_argument("--json", type=Path, help="file for the table's numbers")
    return parser


if __name__ == "__main__":
    sys.exit(main())
