"""What every preset of quality costs on a checkpoint, in this process: a table, and the price file for [pricing].

    python -m perf.prices --model-dir DIR --requests DIR [--settings 9:7] [--out build/prices.json]

Each request (a pair NAME.png and NAME.txt; without --requests the toy world's held-out scenes) is run exactly, under
each preset of --config and with fewer steps. Says first how long that will take at most. An interrupted run goes on
where it stopped: at most one request is measured again. Exits with 2 when something must be put right.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np

from export.compare.graph_stages import read_requests
from perf.prices.journal import Journal
from perf.prices.measure import Case, Clip, Measurement, PriceStages, Variant, encode_texts, prompts_of, run
from perf.prices.summary import measures, table
from stepvideo_serve.assembly.checkpoint import Checkpoint
from stepvideo_serve.config import ServeConfig
from stepvideo_serve.errors import ConfigError, InvalidRequest, StepVideoError
from stepvideo_serve.planning.prices import Comparison, Measures, Price, PriceFile, Served, Setting
from stepvideo_serve.request.presets import EXACT, Preset
from stepvideo_serve.sampling.denoise import flow_times
from stepvideo_serve.sampling.evaluation import EvaluationPlan
from toyworld.evaluate import CHECKPOINT
from toyworld.priced_scenes import observe, scene_request
from toyworld.samples import Sampling, serve_config

PACE_STEPS: Final = 2
Guidance = tuple[float, float]
"""CFG_SCALE and TIME_SHIFT."""
USUAL_SETTINGS: Final[list[Guidance]] = [(9.0, 7.0)]  # of a request that says nothing
TOY_SETTINGS: Final[list[Guidance]] = [(4.0, 7.0), (9.0, 13.0)]  # what it was trained for, and the model's own


@dataclass(frozen=True)
class Work:
    """All requests at one guidance, and the variants that they are run under."""

    guidance: Guidance
    cases: list[Case]
    variants: list[Variant]

    @property
    def setting(self) -> Setting:
        one = self.cases[0].request
        return Setting(one.num_frames, one.height, one.width, one.steps, one.cfg_scale, one.time_shift)

    def key(self, case: Case) -> str:
        """What a journal calls the case."""
        return f"{self.guidance[0]:g}:{self.guidance[1]:g} {case.name}"


def main() -> int:
    options = _parser().parse_args()
    try:
        price(options)
    except KeyboardInterrupt:
        print("perf.prices: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    except (StepVideoError, OSError) as error:
        print(f"perf.prices: {error}", file=sys.stderr)
        return 2
    return 0


def price(options: argparse.Namespace) -> None:
    """Measures, prints the table and writes the price file. Raises StepVideoError or OSError."""
    config = _config(options)
    presets = ServeConfig.load(options.config).presets
    works = list(_works(options, config, presets))
    served = Served(Checkpoint(options.model_dir).identity, options.precision, options.backend, "single")
    asked = {work.key(case): str(work.variants) for work in works for case in work.cases}
    journal = Journal(options.out.with_suffix(".journal"), {"served": asdict(served), "asked": asked})
    left = sum(work.key(case) not in journal.done for work in works for case in work.cases)
    if left:
        _measure(options, config, works, journal, left)
    rows = [(work, name, row) for work in works for name, row in _figures(work, journal)]
    for work in works:
        print(f"\nCFG {work.guidance[0]:g}, shift {work.guidance[1]:g}, {work.setting.steps} steps\n")
        print(table([(name, row) for of, name, row in rows if of is work]))
    prices = [Price(name, presets[name].parameters(), work.setting, row) for work, name, row in rows if name in presets]
    others = [Comparison(name, work.setting, row) for work, name, row in rows if name not in presets]
    PriceFile.of(served, [one for one in prices if one.preset != EXACT], others).save(options.out)
    journal.finish()
    print(f"\n{options.out}: {len(prices) - len(works)} prices; name the file in [pricing] files of serve.toml")


def _measure(
    options: argparse.Namespace, config: ServeConfig, works: Sequence[Work], journal: Journal, left: int
) -> None:
    """Adds what is missing to the journal."""
    _say(f"encoding the texts and loading {options.model_dir}")
    stages = _stages(config, works)
    seconds = _longest_s(stages[None], works, journal)
    _say(f"{left} requests to measure: at most {_duration(seconds)}")
    began_s, done = time.monotonic(), 0
    for work in works:
        measurement = Measurement(stages, work.variants, _observer(options))
        for number, case in enumerate(work.cases, start=options.first):
            key = work.key(case)
            if key in journal.done:
                continue
            journal.add(key, measurement.clips(case, number, partial(_say_begun, key)))
            done += 1
            elapsed_s = time.monotonic() - began_s
            rest = _duration(elapsed_s / done * (left - done))
            _say(f"{done} of {left} requests in {_duration(elapsed_s)}, about {rest} left")


def _longest_s(stages: PriceStages, works: Sequence[Work], journal: Journal) -> float:
    """Seconds that the rest takes if every step is evaluated, from two steps and one decoding of the first request."""
    request = works[0].cases[0].request
    latents, seconds = run(stages, request, Variant("pace", steps=min(PACE_STEPS, request.steps)))
    began_s = time.monotonic()
    for _ in stages.decode(latents):
        continue
    decode_s, step_s = time.monotonic() - began_s, seconds / min(PACE_STEPS, request.steps)
    total = 0.0
    for work in works:
        missing = sum(work.key(case) not in journal.done for case in work.cases)
        steps = sum(variant.steps or work.setting.steps for variant in work.variants)
        total += missing * (steps * step_s + sum(variant.decode for variant in work.variants) * decode_s)
    return total


def _figures(work: Work, journal: Journal) -> Iterator[tuple[str, Measures]]:
    """The variants with their figures, exact first."""
    of_cases = [journal.done[work.key(case)] for case in work.cases]
    exact = [clips[0] for clips in of_cases]
    for index, variant in enumerate(work.variants):
        clips: list[Clip] = [clips[index] for clips in of_cases]
        yield variant.name, measures(clips, exact)


def _works(options: argparse.Namespace, config: ServeConfig, presets: dict[str, Preset]) -> Iterator[Work]:
    for guidance in options.settings or (TOY_SETTINGS if options.requests is None else USUAL_SETTINGS):
        cases = _cases(options, config, guidance)
        yield Work(guidance, cases, _variants(options, presets, cases[0]))


def _cases(options: argparse.Namespace, config: ServeConfig, guidance: Guidance) -> list[Case]:
    channels = Checkpoint(config.model.dir).dit_config.in_channels
    if options.requests is None:
        sampling = Sampling(options.steps, guidance[1], guidance[0])
        numbers = range(options.first, options.first + options.clips)
        return [Case(f"scene {i}", scene_request(config, channels, i, sampling)) for i in numbers]
    size = {name: getattr(options, name) for name in ("num_frames", "height", "width") if getattr(options, name)}
    found = read_requests(
        options.requests,
        options.first + options.clips,
        channels,
        **size,
        steps=options.steps,
        cfg_scale=float(np.float32(guidance[0])),
        time_shift=float(np.float32(guidance[1])),
    )
    cases = [Case(name, request) for name, request in found.items()][options.first :]
    if not cases:
        raise ConfigError(f"--first must be below the {len(found)} pairs of {options.requests}, got {options.first}.")
    return cases


def _variants(options: argparse.Namespace, presets: dict[str, Preset], case: Case) -> list[Variant]:
    """exact, the presets that hold at this setting, fewer steps, and torch in bf16 where asked for."""
    request = case.request
    found = [Variant(EXACT)]
    for name in options.presets or presets:
        if name not in presets:
            raise ConfigError(f"--presets must be among {', '.join(presets)} of {options.config}, got {name!r}.")
        try:
            times = flow_times(request.steps, request.time_shift)
            EvaluationPlan.of(presets[name], times, True, request.cfg_scale, request.time_shift)
        except InvalidRequest as error:
            _say(f"{name} is left out: {error}")
            continue
        if name != EXACT:
            found.append(Variant(name, presets[name]))
    found += [Variant(f"{steps} steps", steps=steps) for steps in options.fewer_steps if steps < request.steps]
    if options.bf16:
        found.append(Variant("bf16", precision="bf16", decode=options.decode_bf16))
    return found


def _stages(config: ServeConfig, works: Sequence[Work]) -> dict[str | None, PriceStages]:
    """By precision, None the configured one's."""
    texts = list(dict.fromkeys(text for work in works for text in prompts_of(work.cases)))
    found: dict[str | None, PriceStages] = {None: PriceStages(config, encode_texts(config, texts))}
    if any(variant.precision for work in works for variant in work.variants):
        half = replace(config, model=replace(config.model, precision="bf16"))
        found["bf16"] = PriceStages(half, encode_texts(half, texts))
    return found


def _config(options: argparse.Namespace) -> ServeConfig:
    """What is run. Raises ConfigError for options that contradict each other."""
    if (options.backend == "eager") != (options.engines is None):
        raise ConfigError("--engines must name the folder of graphs for every --backend but eager: give both or none.")
    if options.bf16 and (options.backend, options.precision) != ("eager", "fp32"):
        raise ConfigError("--bf16 compares torch's precisions and needs --backend eager --precision fp32: drop it.")
    if options.requests is None and options.model_dir.resolve() != CHECKPOINT.resolve():
        raise ConfigError(
            f"--requests must name a folder of images and texts for any checkpoint but {CHECKPOINT.parent.name}'s, got "
            "none: name one (make prices MODEL_DIR=... REQUESTS=...)."
        )
    base = serve_config(options.model_dir, options.precision, options.threads, options.engines)
    return replace(base, model=replace(base.model, backend=options.backend, device=options.device))


def _observer(options: argparse.Namespace) -> Callable[[Any, int], dict[str, float]]:
    return observe if options.requests is None else lambda frames, number: {}  # noqa: ARG005


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _say_begun(key: str, variant: str) -> None:
    _say(f"  {key}: {variant}")


def _guidance(text: str) -> Guidance:
    scale, _, shift = text.partition(":")
    values = float(scale), float(shift)
    if not all(0 < value < math.inf for value in values):
        raise ValueError(text)
    return values


def _count(text: str) -> int:
    if (value := int(text)) < 1:
        raise ValueError(text)
    return value


def _number(text: str) -> int:
    if (value := int(text)) < 0:
        raise ValueError(text)
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m perf.prices", description="Price the presets of quality.")
    parser.add_argument("--model-dir", type=Path, required=True, metavar="DIR")
    parser.add_argument("--requests", type=Path, metavar="DIR", help="pairs of image and text; else toy-world scenes")
    parser.add_argument("--clips", type=_count, default=16, help="requests at each setting (default %(default)s)")
    parser.add_argument("--first", type=_number, default=0, help="number of the first request (default %(default)s)")
    parser.add_argument(
        "--settings", type=_guidance, nargs="+", metavar="CFG:SHIFT", help="default 9:7, in the toy world 4:7 9:13"
    )
    parser.add_argument("--steps", type=_count, default=50, help="of exact and the presets (default %(default)s)")
    parser.add_argument("--num-frames", type=_count, help="of --requests; default as a request's")
    parser.add_argument("--height", type=_count)
    parser.add_argument("--width", type=_count)
    parser.add_argument("--config", type=Path, default=Path("serve.toml"), help="where the presets stand")
    parser.add_argument("--presets", nargs="+", metavar="NAME", help="these only (default all)")
    parser.add_argument("--fewer-steps", type=_count, nargs="*", default=[20, 30], help="default 20 30")
    parser.add_argument("--bf16", action="store_true", help="also torch in bf16, for comparison")
    parser.add_argument("--decode-bf16", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--backend", choices=("eager", "ort", "tensorrt", "tensorrt_rtx"), default="eager")
    parser.add_argument("--engines", type=Path, metavar="DIR", help="graphs or engines of the checkpoint")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16", "fp8", "nvfp4"), default="fp32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=_number, default=0, help="CPU threads; 0 = all cores")
    parser.add_argument("--out", type=Path, default=Path("build/prices.json"), help="price file (default %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
