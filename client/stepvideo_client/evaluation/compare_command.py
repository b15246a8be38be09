"""Set two folders of clips against each other, the same requests made twice: comparison.json and comparison.html.

A and B are what `stepvideo batch` wrote, or folders of mp4 files of the same names. With --price-file, A being exact
and B a preset of quality, also the price file that the server's [pricing] names. Exits with 5 when a threshold is not
kept.

With --set, A and B are made first, by `stepvideo batch`, in FOLDER/a and FOLDER/b: the same command goes on with them.
"""

import argparse
import sys
from pathlib import Path
from typing import Final

from stepvideo_client.errors import InvalidInput
from stepvideo_client.evaluation.compare_page import REPEATED, compare_page
from stepvideo_client.evaluation.comparison import FIGURES, Comparison, compare_pairs, pairs_of
from stepvideo_client.evaluation.folder_measures import entries_of
from stepvideo_client.evaluation.metrics_page import estimate_text
from stepvideo_client.evaluation.price_file import LEAST_CLIPS, price_file
from stepvideo_client.evaluation.thresholds import add_limits, check_numbers, verdicts
from stepvideo_client.evaluation.twice import FORM, make_side, side_of
from stepvideo_client.evaluation.workers import JOBS
from stepvideo_client.exit_codes import EXIT_OK, EXIT_SERVER_ERROR, EXIT_THRESHOLD
from stepvideo_client.output import check_target, save_bytes, save_json

SHOWN: Final = 60


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `stepvideo compare`."""
    add = parser.add_argument
    add("folders", nargs="*", type=Path, metavar="A B", help="the reference, and what is compared with it")
    add("--out", type=Path, default=Path("comparison"), metavar="FOLDER", help="where the files go (comparison)")
    add("--jobs", type=int, default=JOBS, metavar="N", help=f"pairs at a time ({JOBS})")
    add("--shown", type=int, default=SHOWN, metavar="N", help=f"pairs that the page shows with pictures ({SHOWN})")
    made = parser.add_argument_group("made by this command")
    made.add_argument("--set", type=Path, help="the evaluation set, as batch takes it, instead of A and B")
    for side in ("--a", "--b"):
        made.add_argument(
            side, metavar=FORM, help=f"servers of {side[2:].upper()}, and options of batch: quality=exact"
        )
    made.add_argument("--with", nargs="+", dest="both", default=[], metavar="NAME=VALUE", help="options of either side")
    made.add_argument("--latents", action="store_true", help="keep latents: twice the time (implied where needed)")
    prices = parser.add_argument_group("prices")
    prices.add_argument("--price-file", type=Path, metavar="FILE", help="write what B costs, for [pricing] files")
    prices.add_argument("--checkpoint", metavar="ID", help="the checkpoint's identity, where REPORT does not tell it")
    prices.add_argument("--name", help="what B is called in the price file, where it is no preset (what differs)")
    add_limits(parser)


def run(args: argparse.Namespace) -> int:
    """Compares, writes the files and prints the summary. Raises ClientError, OSError."""
    _check(args)
    if args.set is not None:
        args.folders = [args.out / "a", args.out / "b"]
        # Both are looked at before the first is made, which may take weeks.
        sides = [
            side_of(args.set, out, side, args.both, _wants_latents(args))
            for out, side in zip(args.folders, (args.a, args.b), strict=True)
        ]
        for side in sides:
            if code := make_side(side):
                return code
    return _compare(args)


def _compare(args: argparse.Namespace) -> int:
    a, b = args.folders
    pairs, alone = pairs_of(entries_of(a), entries_of(b))
    args.out.mkdir(parents=True, exist_ok=True)
    rows = compare_pairs(pairs, (a, b), args.jobs, lambda done: _say(done, len(pairs)))
    found = Comparison(a, b, rows, alone)
    save_json(args.out / "comparison.json", found.as_json())
    said = verdicts(found, args)
    save_bytes(args.out / "comparison.html", compare_page(found, args.out, args.shown, said).encode())
    _print(found, args.out, said)
    if args.price_file is not None:
        _save_prices(found, args)
    if not all(kept for _, kept in said):
        return EXIT_THRESHOLD
    return EXIT_SERVER_ERROR if len(found.measured) < len(rows) else EXIT_OK


def _check(args: argparse.Namespace) -> None:
    for name, value, least in (("--jobs", args.jobs, 1), ("--shown", args.shown, 0)):
        if value < least:
            raise InvalidInput(f"{name} must be at least {least}, got {value}.")
    check_numbers(args)
    if args.set is None:
        if len(args.folders) != 2:
            raise InvalidInput(f"compare takes the folders A and B, or --set, got {len(args.folders)} folders.")
        if args.a or args.b or args.both or args.latents:
            raise InvalidInput("--a, --b, --with and --latents say how a --set is made: give --set too.")
    elif args.folders or not args.a or not args.b:
        raise InvalidInput("--set needs --a and --b, and no folders: both sides are made in --out.")
    if args.out.exists() and not args.out.is_dir():
        raise InvalidInput(f"--out must be a folder, {str(args.out)!r} is a file.")
    if args.price_file is not None:
        if args.out.exists() or args.price_file.parent != args.out:  # compare makes --out
            check_target(args.price_file, "--price-file")
    elif args.checkpoint is not None or args.name is not None:
        raise InvalidInput("--checkpoint and --name are of the price file: give --price-file too.")


def _wants_latents(args: argparse.Namespace) -> bool:
    return bool(args.latents or args.price_file is not None or args.max_latent_error is not None)


def _save_prices(found: Comparison, args: argparse.Namespace) -> None:
    values = price_file(found.rows, args.checkpoint, args.name)
    save_json(args.price_file, values)
    print(f"{args.price_file}: {len(values['prices'])} prices, {len(values['comparisons'])} comparisons")
    fewest = min(entry["measures"]["clips"] for entry in (*values["prices"], *values["comparisons"]))
    if fewest < LEAST_CLIPS:
        print(f"stepvideo: a price of {fewest} clips says little: take {LEAST_CLIPS} or more.", file=sys.stderr)


def _say(done: int, of: int) -> None:
    if done == of or sys.stderr.isatty():
        print(f"compared {done} of {of} pairs", end="\n" if done == of else "\r", file=sys.stderr, flush=True)


def _print(found: Comparison, out: Path, said: list[tuple[str, bool]]) -> None:
    for name, title in FIGURES.items():
        mean, interval, extremes = estimate_text(found.summary[name])
        print(f"{title:<35} {mean:>8}  ({interval})  {extremes}")
    if found.motion_rank is not None:
        print(f"{'rank correlation of motion':<35} {found.motion_rank:>8.3f}")
    for row in found.rows:
        if row.fault is not None:
            print(f"stepvideo: {row.pair.name}: {row.fault}", file=sys.stderr)
    for side, names in zip("AB", found.alone, strict=True):
        if names:
            print(f"stepvideo: only {side} has {len(names)} clips, {names[0]!r} the first.", file=sys.stderr)
    if found.repeated:
        print(f"stepvideo: {REPEATED.format(found.repeated)}", file=sys.stderr)
    for sentence, kept in said:
        if not kept:
            print(f"stepvideo: not kept: {sentence}.", file=sys.stderr)
    equal = sum(one.equal for one in found.measured)
    print(f"{out / 'comparison.html'}: {len(found.measured)} pairs, {equal} equal in every pixel")
