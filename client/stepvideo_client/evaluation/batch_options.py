"""The options of `stepvideo batch`."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from stepvideo_client.connection_options import add_connection_arguments
from stepvideo_client.evaluation.plan import Shard, Size
from stepvideo_client.evaluation.sources import RATIOS

T = TypeVar("T")


def add_batch_arguments(parser: argparse.ArgumentParser) -> None:
    """All of them."""
    add = parser.add_argument
    add("set", type=Path, metavar="SET", help="folder of pairs, Step-Video-TI2V-Eval, a .csv, or VBench's .json")
    add("--out", type=Path, required=True, metavar="FOLDER", help="where the clips go; the same command goes on there")
    add("--dry-run", action="store_true", help="make nothing: what there is to make, and what it takes")
    add("--quiet", action="store_true", help="errors only")
    _add_set_arguments(parser.add_argument_group("the set"))
    _add_clip_arguments(parser.add_argument_group("the clips"))
    _add_run_arguments(parser.add_argument_group("the run"))
    add_connection_arguments(parser, several=True)


def given_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of Settings that the command line states."""
    stated = {
        "num_frames": args.num_frames,
        "steps": args.infer_steps,
        "cfg_scale": args.cfg_scale,
        "time_shift": args.time_shift,
        "landscape": args.landscape,
        "portrait": args.portrait,
        "square": args.square,
        "motions": _unique(args.motion_score),
        "seeds": _unique(args.seed),
        "presets": _unique(args.quality),
        "latents": args.latents or None,
        "negative_prompt": args.negative_prompt,
        "positive_suffix": args.positive_suffix,
    }
    return {name: value for name, value in stated.items() if value is not None}


def _add_set_arguments(group: Any) -> None:
    add = group.add_argument
    add("--images", type=Path, metavar="FOLDER", help="VBench's crops (data/crop beside the list)")
    add("--ratio", choices=tuple(RATIOS), help="the crops to take (those nearest to --landscape)")
    add("--only", nargs="+", default=[], metavar="PATTERN", help="entries whose id fits, such as 'real_H_*'")
    add("--dimension", nargs="+", default=[], metavar="NAME", help="entries for these dimensions of VBench")
    add("--limit", type=_at_least_one, metavar="N", help="the first N of what is left")
    add("--shard", type=_checked(Shard.parse), default=Shard(1, 1), metavar="K/N", help="the K-th of N parts (1/1)")


def _add_clip_arguments(group: Any) -> None:
    add = group.add_argument
    add("--quality", nargs="+", metavar="PRESET", help="presets (exact)")
    add("--motion-score", nargs="+", type=float, metavar="X", help="motion scores (the server's default)")
    add("--seed", nargs="+", type=int, metavar="N", help="seeds (0; for VBench's list 0 1 2 3 4)")
    for name, about in (
        ("landscape", "of pictures that are wide (the server's default)"),
        ("portrait", "of pictures that are high (--landscape turned)"),
        ("square", "of those between, within a tenth (as many pixels as --landscape)"),
    ):
        add(f"--{name}", type=_checked(_size), metavar="HxW", help=f"height and width {about}")
    add("--num-frames", type=int, metavar="N", help="frames (the server's default)")
    add("--infer-steps", type=int, metavar="N", help="denoising steps (the server's default)")
    add("--cfg-scale", type=float, metavar="X", help="classifier-free guidance (the server's default)")
    add("--time-shift", type=float, metavar="X", help="shift of the schedule (the server's default)")
    add("--negative-prompt", metavar="TEXT", help="what no video must show (the official text)")
    add("--positive-suffix", metavar="TEXT", help="added to every prompt by the server (the official text)")
    add("--latents", action="store_true", help="the final latents too: a second run of each clip, twice the time")


def _add_run_arguments(group: Any) -> None:
    add = group.add_argument
    add("--priority", type=int, choices=(1, 2, 3), default=3, help="1 high, 2 normal, 3 low: others go first (3)")
    add("--waiting", type=_at_least_one, default=1, metavar="N", help="clips that wait on a server for their turn (1)")
    add("--attempts", type=_at_least_one, default=3, metavar="N", help="failures after which a clip is given up (3)")
    add(
        "--patience",
        type=float,
        default=1800.0,
        metavar="S",
        help="give up when no server answers for S seconds (1800)",
    )
    add(
        "--idle-timeout", type=float, default=60.0, metavar="S", help="a server that is silent for S seconds fails (60)"
    )


def _unique(values: list[T] | None) -> tuple[T, ...] | None:
    """In their order; one that is given twice would make two equal clips."""
    return None if values is None else tuple(dict.fromkeys(values))


def _size(text: str) -> Size:
    height, _, width = text.lower().partition("x")
    size = int(height), int(width)
    if min(size) < 1:
        raise ValueError("sides are at least 1")
    return size


def _at_least_one(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _checked(parse: Callable[[str], T]) -> Callable[[str], T]:
    """`parse` with an error that shows the form."""
    form = "HxW, such as 544x992" if parse is _size else "K/N with K from 1 to N"

    def checked(text: str) -> T:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"must be {form}, got {text!r}") from error

    return checked
