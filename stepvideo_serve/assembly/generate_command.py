"""One request in this process, without a server: the way to look into the model.

    python -m stepvideo_serve generate --config serve.toml --image first.png --prompt TEXT --out video.mp4 \\
        --seed 7 --profile step.json

The inputs are those of the table of fields, with the flags of the client and what [defaults] of the configuration fills
in. All stages run here, on one rank whatever [denoiser] layout says: the bits are those of a server with one rank.
Exit codes: 0 done, 1 an error that is one sentence, 2 usage, 130 Ctrl-C.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from stepvideo_serve.assembly.output_files import check_target, is_special, write_file
from stepvideo_serve.assembly.runners import latent_channels
from stepvideo_serve.assembly.stages import LocalStages
from stepvideo_serve.assembly.step_profile import profiled, ranged
from stepvideo_serve.assembly.step_progress import StepProgress
from stepvideo_serve.config import ServeConfig
from stepvideo_serve.errors import InvalidRequest, StepVideoError
from stepvideo_serve.pipeline.generate import Cancelled, Frames, Progress, Result, generate
from stepvideo_serve.request import (
    OUTPUT_MP4,
    PREVIEW_JPEG,
    Default,
    Field,
    GenerationRequest,
    RequestLimits,
    card_warnings,
    check_quality,
    fields_for,
    parse_request,
)
from stepvideo_serve.request.rules import Choice, Multiple
from stepvideo_serve.sampling.job import DenoiseJob, StepDone
from stepvideo_serve.scheduling.run_queue import Waiting
from stepvideo_serve.text.states import TextStates
from stepvideo_serve.video.preview import SUFFIXES, encode_preview

EXIT_OK = 0
EXIT_ERROR = 1
EXIT_USAGE = 2
EXIT_CANCELLED = 130

DRAFT_QUALITY = "fast"
WITHOUT_EFFECT = ("priority", "request_id", "max_response_bytes")
"""Options about a server that others use too; accepted, so that a client's command line can be repeated here."""

INTEGERS: dict[str, type[np.signedinteger[Any]]] = {"INT32": np.int32, "INT64": np.int64}


def main(arguments: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    options = _parser().parse_args(arguments)
    try:
        _generate(options)
    except KeyboardInterrupt:
        print("error: cancelled.", file=sys.stderr)
        return EXIT_CANCELLED
    except StepVideoError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_ERROR
    except OSError as error:
        name = error.filename or "a file"
        print(f"error: {name} must be written, and cannot be: {error.strerror or error}.", file=sys.stderr)
        return EXIT_ERROR
    return EXIT_OK


def _generate(options: argparse.Namespace) -> None:
    config = _on_one_rank(ServeConfig.load(options.config))
    inputs = inputs_of(options, config.limits)
    request = parse_request(inputs, config.limits, latent_channels(config), config.defaults)
    check_quality(request, config.presets)
    report_path = _check_outputs(options, request)
    draft = _draft_of(request, options, config) if options.draft_first is not None else None
    began_s = time.monotonic()
    stages = ProfiledStages(config, options.profile) if options.profile is not None else LocalStages(config)
    print(f"loaded in {time.monotonic() - began_s:.1f} s, seed {request.seed}", file=sys.stderr)
    if draft is not None:
        made = _result(generate(draft, stages, config.video, lambda: False, config.gates), None)
        if not _is_wanted(made, options, draft):
            return
    events = generate(request, stages, config.video, lambda: False, config.gates)
    result = _result(events, options.preview_dir, request.preview_format)
    warnings = [{"gate": "card", "message": sentence} for sentence in card_warnings(request, config.card)]
    result.report["warnings"] += warnings
    for warning in result.report["warnings"]:
        print(f"warning: {warning['message']}", file=sys.stderr)
    size = write_file(options.out, _content(result))
    if report_path is not None:
        report = {**result.report, "path": str(options.out), "bytes": size}
        write_file(report_path, f"{json.dumps(report, indent=2, ensure_ascii=False)}\n".encode())
    if isinstance(stages, ProfiledStages):
        print(f"{options.profile}: a trace of step {stages.profiled_step} of {request.steps}")
    print(f"{options.out}: {size:,} bytes, seed {result.seed}, {result.report['seconds']['total']:.1f} s")


def _content(result: Result) -> bytes | NDArray[Any]:
    return next(data for data in (result.video, result.frames, result.latents) if data is not None)


def _draft_of(request: GenerationRequest, options: argparse.Namespace, config: ServeConfig) -> GenerationRequest:
    """The same request with fewer evaluations of the DiT: the seed keeps the composition. Raises InvalidRequest."""
    if not options.yes and not sys.stdin.isatty():
        raise InvalidRequest("--draft-first needs a terminal to ask whether to go on, got none: add --yes to go on.")
    if options.profile is not None:
        raise InvalidRequest("--profile traces one generation, got --draft-first too, which makes two: choose one.")
    if is_special(options.out):
        raise InvalidRequest(f"--draft-first writes a file beside --out, got {options.out}: name a file.")
    draft = replace(request, quality=options.draft_first, preview_every=0)
    check_quality(draft, config.presets)
    check_target(_draft_path(options.out), "The draft of --draft-first")
    return draft


def _draft_path(out: Path) -> Path:
    """video.mp4 -> video.draft.mp4"""
    return out.with_name(f"{out.stem}.draft{out.suffix}")


def _is_wanted(made: Result, options: argparse.Namespace, draft: GenerationRequest) -> bool:
    """Shows the draft, and asks whether to make the whole."""
    path = _draft_path(options.out)
    write_file(path, _content(made))
    seconds, steps = made.report["seconds"]["total"], draft.steps
    print(f"{path}: a draft, {made.report['quality']['evaluations']} of {steps} steps evaluated, {seconds:.1f} s")
    if options.yes:
        return True
    print("Make it in full, with the same seed? [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() in ("y", "yes"):
        return True
    print(f"left at the draft: --seed {made.seed} makes the same one again", file=sys.stderr)
    return False


def _on_one_rank(config: ServeConfig) -> ServeConfig:
    """The configuration for a process that is alone."""
    return replace(
        config,
        text=replace(config.text, on_ranks=False),
        denoiser=replace(config.denoiser, layout="single"),
    )


def inputs_of(options: argparse.Namespace, limits: RequestLimits) -> dict[str, NDArray[Any]]:
    """The options that were given, as the tensors that a client would send. Raises InvalidRequest."""
    given = ((field, getattr(options, field.attribute)) for field in _fields())
    return {field.name: _tensor(field, value, limits) for field, value in given if value is not None}


def _tensor(field: Field, value: Any, limits: RequestLimits) -> NDArray[Any]:
    if isinstance(value, Path):
        return np.array([_image_bytes(value, limits)], np.object_)
    if field.dtype == "BYTES":
        return np.array([value.encode("utf-8", "surrogateescape")], np.object_)
    if field.dtype == "FP32":
        with np.errstate(over="ignore"):  # becomes infinite, which the table's rule refuses
            return np.array([value], np.float32)
    field.rule.check(field.name, value, limits)  # numpy raises where the number does not fit the type
    return np.array([value], INTEGERS[field.dtype])


def _image_bytes(path: Path, limits: RequestLimits) -> bytes:
    """The file's content, of which no more is read than shows that it is too large."""
    try:
        with path.open("rb") as file:
            return file.read(limits.max_image_bytes + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InvalidRequest(f"--image must be a file that can be read, got {path}: {reason}.") from None


def _check_outputs(options: argparse.Namespace, request: GenerationRequest) -> Path | None:
    """Refuses, before the work, outputs that could not be written. Returns where the report goes."""
    check_target(options.out, "--out")
    suffix = ".mp4" if request.output == OUTPUT_MP4 else ".npy"
    if options.out.suffix != suffix and not is_special(options.out):
        raise InvalidRequest(f"--out must end in {suffix} for --output {request.output}, got {options.out}: rename it.")
    if (request.preview_every > 0) != (options.preview_dir is not None):
        raise InvalidRequest("--preview-every and --preview-dir go together, got one of them: give both or neither.")
    if options.preview_format is not None and options.preview_dir is None:
        raise InvalidRequest("--preview-format goes with --preview-every and --preview-dir, got it alone: add these.")
    if options.preview_dir is not None:
        check_target(options.preview_dir / "step_0001.jpg", "A preview")
    if options.profile is not None:
        check_target(options.profile, "--profile")
        if request.steps == 1:
            raise InvalidRequest(
                "--profile needs --infer-steps of at least 2, got 1: the first step pays for what happens once, and is "
                "not profiled."
            )
    report_path: Path | None = options.out.with_suffix(".json") if options.json == "" else options.json
    if report_path is not None:
        report_path = Path(report_path)
        check_target(report_path, "--json")
    targets = [path.resolve() for path in (options.out, options.profile, report_path) if path and not is_special(path)]
    if len(set(targets)) < len(targets):
        raise InvalidRequest("--out, --json and --profile must be different files, got one twice: rename one.")
    return report_path


def _result(
    events: Iterator[Progress | Result], preview_dir: Path | None, preview_format: str = PREVIEW_JPEG
) -> Result:
    """Iterates to the result, showing progress and keeping previews."""
    progress = StepProgress(sys.stderr)
    try:
        for event in events:
            if isinstance(event, Result):
                return event
            progress.show(event)
            if event.preview is not None and preview_dir is not None:
                path = preview_dir / f"step_{event.step:04}{SUFFIXES[preview_format]}"
                write_file(path, encode_preview(event.preview, preview_format))
    finally:
        progress.close()
    raise RuntimeError("the pipeline ended without a result")


class ProfiledStages:
    """The stages of this process; one step of each denoising leaves a trace in a file (step_profile.py)."""

    def __init__(self, config: ServeConfig, trace: Path) -> None:
        self._stages, self._trace = LocalStages(config, ranged), trace
        self.latent_channels, self.presets = self._stages.latent_channels, self._stages.presets
        self.profiled_step: int | None = None
        """Whose trace was written."""

    def encode_text(self, prompt: str) -> TextStates:
        return self._stages.encode_text(prompt)

    def encode_image(self, pixels: Tensor, noise: Tensor) -> Tensor:
        return self._stages.encode_image(pixels, noise)

    def denoise(self, job: DenoiseJob, cancelled: Cancelled) -> Iterator[StepDone | Waiting]:
        return profiled(self._stages.denoise(job, cancelled), self._trace, self._written)

    def decode(self, latents: Tensor) -> Iterator[Frames]:
        return self._stages.decode(latents)

    def describe(self) -> dict[str, Any]:
        return self._stages.describe()

    def _written(self, step: int) -> None:
        self.profiled_step = step


class _Parser(argparse.ArgumentParser):
    """One sentence instead of the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USAGE, f"error: {message[:1].upper()}{message[1:]}: see --help.\n")


def _fields() -> tuple[Field, ...]:
    """The inputs that have an option here."""
    return tuple(field for field in fields_for("request") if "client" in field.needs)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m stepvideo_serve generate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for field in _fields():
        choices = field.rule.options if isinstance(field.rule, Choice) else None
        parser.add_argument(
            field.option,
            dest=field.attribute,
            type=_type_of(field),
            choices=choices,
            metavar=None if choices else field.metavar,
            required=field.default is Default.REQUIRED,
            help=_help(field).replace("%", "%%"),
        )
    add = parser.add_argument
    add("--config", type=Path, default=Path("serve.toml"), metavar="FILE", help="what runs (%(default)s)")
    add("--out", type=Path, required=True, metavar="FILE", help="where the video goes, or the .npy of --output")
    add("--json", nargs="?", const="", metavar="FILE", help="write the report (to --out with .json, if no FILE)")
    add("--preview-dir", type=Path, metavar="FOLDER", help="where the previews of --preview-every go")
    add(
        "--draft-first",
        nargs="?",
        const=DRAFT_QUALITY,
        metavar="PRESET",
        help=f"make a draft at this --quality ({DRAFT_QUALITY}, if none is named) and ask before the whole",
    )
    add("--yes", action="store_true", help="with --draft-first: do not ask")
    add("--profile", type=Path, metavar="FILE", help="write a torch.profiler trace of one step, in Chrome's format")
    return parser


def _type_of(field: Field) -> type[Path] | type[str] | type[int] | type[float]:
    if field.attribute == "image":
        return Path
    return {"BYTES": str, "FP32": float}.get(field.dtype, int)


def _help(field: Field) -> str:
    if field.attribute in WITHOUT_EFFECT:
        return f"{field.help}; checked here, without effect: there is no server"
    grid = f", a multiple of {field.rule.step}" if isinstance(field.rule, Multiple) else ""
    return field.help + grid + (" ([defaults])" if field.default is Default.CONFIGURED else "")
