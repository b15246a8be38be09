"""The command line: `stepvideo generate`, `cancel`, `quote`, `defaults`, `ready` (or `python -m stepvideo_client`).

The other commands are those of an extra: stepvideo_client.evaluation.commands.
"""

import argparse
import gc
import io
import json
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import cast

from stepvideo_client.camera import MOVEMENTS, with_camera
from stepvideo_client.client import Client
from stepvideo_client.connection_options import add_connection_arguments, client_of
from stepvideo_client.errors import ClientError, InvalidInput, MalformedResponse
from stepvideo_client.evaluation.commands import add_commands
from stepvideo_client.events import Result
from stepvideo_client.exit_codes import EXIT_CANCELLED, EXIT_CODES, EXIT_OK, EXIT_SERVER_ERROR, exit_code
from stepvideo_client.fields import INPUTS, Command, Input, Options, QuoteOptions
from stepvideo_client.output import (
    STANDARD_OUTPUT,
    check_target,
    is_written_in_place,
    save_bytes,
    save_json,
    save_result,
)
from stepvideo_client.progress import Progress

ARRAYS = ("frames", "latents")  # values of OUTPUT whose results are saved as .npy

VIDEO_SUFFIXES = (".mp4", ".m4v", "")
PREVIEW_SUFFIXES = {"image/jpeg": ".jpg", "image/webp": ".webp"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    for stream in (sys.stdout, sys.stderr):  # a file's name need not be one that the console can show
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    code = _run(sys.argv[1:] if arguments is None else arguments)
    # A failed call is part of a reference cycle with its error. It must go while gRPC's threads run: at exit they stop
    # where they are, perhaps with the call's lock in their hands, and the collector would wait for it for ever.
    gc.collect()
    return code


def _run(arguments: Sequence[str]) -> int:
    try:
        args = _parser(arguments[0] if arguments else None).parse_args(arguments)
        code: int | None = args.run(args)
    except KeyboardInterrupt:
        print("stepvideo: cancelled.", file=sys.stderr)
        return EXIT_CANCELLED
    except ClientError as error:
        print(f"stepvideo: {error.code}: {error}", file=sys.stderr)
        return exit_code(error)
    except OSError as error:
        print(f"stepvideo: {error.filename or 'a file'} cannot be written: {error.strerror}.", file=sys.stderr)
        return EXIT_SERVER_ERROR
    return code or EXIT_OK


def _ready(args: argparse.Namespace) -> None:
    with client_of(args, args.url, idle_timeout_s=None) as client:
        client.wait_ready(args.timeout)


def _cancel(args: argparse.Namespace) -> None:
    with client_of(args, args.url, idle_timeout_s=None) as client:
        known = client.cancel(args.request_id)
    print(f"{args.request_id}: {'cancelled' if known else 'no run and no kept result of that id'}")


def _defaults(args: argparse.Namespace) -> None:
    with client_of(args, args.url, idle_timeout_s=None) as client:
        print(json.dumps(client.defaults(), indent=2))


def _quote(args: argparse.Namespace) -> None:
    given = {name: value for name in QuoteOptions.__annotations__ if (value := getattr(args, name)) is not None}
    with client_of(args, args.url, idle_timeout_s=None) as client:
        quote = client.quote(**cast(QuoteOptions, given))
    if args.json:
        print(json.dumps(quote.report, indent=2))
        return
    parts = ", ".join(f"{part} {s:.1f}" for part, s in quote.report["seconds"].items() if part != "total")
    print(f"{quote.seconds:.1f} s ({parts})")
    print(f"{quote.gpu_seconds:.1f} GPU-seconds, {quote.peak_memory_mib:.0f} MiB on the fullest GPU (predicted)")
    print(f"starts in {quote.queue_wait_s:.1f} s, {quote.report['waiting']} waiting")


def _generate(args: argparse.Namespace) -> None:
    if args.out is None:
        args.out = Path(args.image.stem).with_suffix(".npy" if args.output in ARRAYS else ".mp4")
    report_path = _check_outputs(args)
    prompt = with_camera(args.prompt, args.camera) if args.camera else args.prompt
    options = cast(
        Options, {name: value for name in Options.__annotations__ if (value := getattr(args, name, None)) is not None}
    )
    started = time.monotonic()
    with client_of(args, args.url, idle_timeout_s=args.idle_timeout) as client:
        try:
            if args.unary:
                result = client.generate_unary(args.image, prompt, **options)
            else:
                result = _stream(client, args, prompt, options)
        except KeyboardInterrupt:
            if args.keep_s and args.request_id:  # such a run goes on without its caller
                client.cancel(args.request_id)
            raise
    wall_s = time.monotonic() - started
    size = save_result(args.out, result)
    if report_path is not None:
        about = {"path": str(args.out), "bytes": size, "wall_seconds": round(wall_s, 3)}
        save_json(report_path, {**result.report, "seed": result.seed, **about})
    if not args.quiet:
        amount = f"{size / 1e6:.2f} MB" if size >= 1e6 else f"{size / 1e3:.1f} kB"
        to_pipe = STANDARD_OUTPUT in (args.out, report_path)
        console = sys.stderr if to_pipe else sys.stdout
        print(f"{args.out}: {amount}, seed {result.seed}, {wall_s:.1f} s", file=console)


def _stream(client: Client, args: argparse.Namespace, prompt: str, options: Options) -> Result:
    """Iterates a generation to its result, showing progress and keeping previews."""
    progress = None if args.quiet else Progress(sys.stderr)
    # Closed whatever happens, because that is what cancels on the server.
    with closing(client.generate(args.image, prompt, **options)) as events:
        try:
            for event in events:
                if isinstance(event, Result):
                    return event
                if progress is not None:
                    progress.show(event)
                if event.preview is not None and args.preview_dir is not None:
                    suffix = PREVIEW_SUFFIXES.get(event.preview_type or "", ".bin")
                    save_bytes(args.preview_dir / f"step_{event.step:04}{suffix}", event.preview)
        finally:
            if progress is not None:
                progress.close()
    raise MalformedResponse("The generation ended without a result.")


def _check_outputs(args: argparse.Namespace) -> Path | None:
    """Refuses, before the server is asked, outputs that could not be written. Returns where the report goes."""
    check_target(args.out, "--out")
    is_array = args.output in ARRAYS
    fitting = (".npy",) if is_array else VIDEO_SUFFIXES
    if args.out.suffix.lower() not in fitting and not is_written_in_place(args.out):
        wanted = "a name ending in .npy" if is_array else "a video's name such as video.mp4, because it is an mp4"
        raise InvalidInput(f"--out must be {wanted} for this --output, got {str(args.out)!r}.")
    if (args.preview_every is None) != (args.preview_dir is None):
        raise InvalidInput("--preview-every and --preview-dir go together: give both or neither.")
    if args.preview_format is not None and args.preview_dir is None:
        raise InvalidInput("--preview-format goes with --preview-every and --preview-dir: add these, or leave it out.")
    if args.preview_dir is not None:
        if args.unary:
            raise InvalidInput("--unary has no previews: leave out --preview-every and --preview-dir.")
        check_target(args.preview_dir / "step_0001.jpg", "A preview")
    if args.json is None:
        return None
    if args.json == "" and is_written_in_place(args.out):
        raise InvalidInput(f"--json needs a FILE, because --out {str(args.out)!r} is no file to put it beside.")
    report_path: Path = args.out.with_suffix(".json") if args.json == "" else Path(args.json)
    check_target(report_path, "--json")
    if report_path == args.out:
        raise InvalidInput("--json must be another file than --out.")
    return report_path


def _parser(chosen: str | None) -> argparse.ArgumentParser:
    """`chosen`: the command, where one is given. Raises InvalidInput where the command's extra is not installed."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="stepvideo", description="Client of a stepvideo-serve server.", epilog=EXIT_CODES, formatter_class=raw
    )
    commands = parser.add_subparsers(dest="command", required=True)
    ready = commands.add_parser(
        "ready", help="wait until the server takes requests", epilog=EXIT_CODES, formatter_class=raw
    )
    ready.add_argument("--timeout", type=float, default=60.0, metavar="S", help="give up after S seconds (60)")
    generate = commands.add_parser(
        "generate",
        help="make a video from a prompt and a first image",
        description="Make a video from a prompt and a first image. What is not given, the server decides.",
        epilog=EXIT_CODES,
        formatter_class=raw,
    )
    _add_generate_arguments(generate)
    cancel = commands.add_parser(
        "cancel",
        help="end the run of a request id, whoever began it, and forget its result",
        epilog=EXIT_CODES,
        formatter_class=raw,
    )
    cancel.add_argument("request_id", metavar="ID", help="what --request-id gave the run")
    quote = commands.add_parser(
        "quote",
        help="what a generation would take on this server",
        description="What a generation would take: told from what the server has measured, so not on a fresh one.",
        epilog=EXIT_CODES,
        formatter_class=raw,
    )
    _add_inputs(quote, "quote")
    quote.add_argument("--json", action="store_true", help="everything, as one JSON object")
    defaults = commands.add_parser(
        "defaults",
        help="what this server fills in for options that are not given, as JSON",
        epilog=EXIT_CODES,
        formatter_class=raw,
    )
    runs = {generate: _generate, cancel: _cancel, quote: _quote, defaults: _defaults, ready: _ready}
    for command, run in runs.items():
        add_connection_arguments(command)
        command.set_defaults(run=run)
    add_commands(commands, chosen, epilog=EXIT_CODES, formatter_class=raw)
    return parser


def _add_generate_arguments(parser: argparse.ArgumentParser) -> None:
    _add_inputs(parser, "generate")
    add = parser.add_argument
    add(
        "--out",
        type=Path,
        metavar="FILE",
        help="where the video goes (here, by the image's name), in a folder that exists; - is standard output",
    )
    add("--camera", choices=tuple(MOVEMENTS), help="a camera movement, added to the prompt")
    add("--preview-dir", type=Path, metavar="FOLDER", help="where the previews of --preview-every go")
    add("--json", nargs="?", const="", metavar="FILE", help="write the report (to --out with .json, if no FILE)")
    add("--idle-timeout", type=float, default=60.0, metavar="S", help="give up when the server is silent (60)")
    add("--unary", action="store_true", help="one call without progress, through ti2v_unary")
    add("--quiet", action="store_true", help="errors and warnings only")


def _add_inputs(parser: argparse.ArgumentParser, command: Command) -> None:
    """An option for each input of the server that has a flag; None where it is not given."""
    for option, field in INPUTS.items():
        if field.flag and command in field.commands:
            parser.add_argument(
                field.flag,
                dest=option,
                type=_type_of(option, field),
                choices=field.choices or None,
                metavar=None if field.choices else field.metavar,
                required=field.required,
                help=field.help.replace("%", "%%"),
            )


def _type_of(option: str, field: Input) -> type[Path] | type[str] | type[int] | type[float]:
    if option == "image":
        return Path
    return {"BYTES": str, "FP32": float}.get(field.datatype, int)
