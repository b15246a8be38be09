"""Make every clip of an evaluation set, on one server or several: resumable, and sharable between machines.

What is whole in --out is not made again. The first Ctrl-C lets the clips under way end, the second cancels them. Of a
gateway, the API key is read from STEPVIDEO_API_KEY.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from functools import partial
from typing import Any, Final

from stepvideo_client.errors import ClientError, InvalidInput, InvalidRequest, ServiceUnavailable
from stepvideo_client.evaluation.batch_options import add_batch_arguments, given_settings
from stepvideo_client.evaluation.batch_progress import BatchProgress
from stepvideo_client.evaluation.endpoint import Endpoint
from stepvideo_client.evaluation.endpoints import Endpoints, refuse_undeliverable
from stepvideo_client.evaluation.estimate import Estimate, estimate, kinds_of, together
from stepvideo_client.evaluation.folder import BatchFolder, check_same
from stepvideo_client.evaluation.interrupts import Interrupts
from stepvideo_client.evaluation.lane import Lane
from stepvideo_client.evaluation.names import Names, names_for
from stepvideo_client.evaluation.plan import PlannedClip, Settings, plan
from stepvideo_client.evaluation.results import is_whole, read_clips
from stepvideo_client.evaluation.runner import Runner, Terms, check_lanes
from stepvideo_client.evaluation.sources import EvaluationSet, nearest_ratio, read_set
from stepvideo_client.exit_codes import EXIT_CANCELLED, EXIT_OK, EXIT_SERVER_ERROR

VBENCH_SEEDS = (0, 1, 2, 3, 4)
Connect = Callable[[str], Endpoint]
STATED: Final = {
    "num_frames": "--num-frames",
    "steps": "--infer-steps",
    "cfg_scale": "--cfg-scale",
    "time_shift": "--time-shift",
    "landscape": "--landscape",
    "motions": "--motion-score",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add_batch_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Makes what is to be made, and returns the exit code. Raises ClientError, OSError."""
    check_lanes(args.url)
    refuse_undeliverable(args.url, args.latents, args.negative_prompt, args.positive_suffix)
    connect: Connect = Endpoints(args).open
    with BatchFolder(args.out, args.shard) as folder:
        stored = folder.stored()
        settings = _settings(args, stored, connect)
        refuse_undeliverable(args.url, settings.latents, settings.negative_prompt, settings.positive_suffix)
        whole_set = _read(args, settings)
        names = names_for(whole_set.entries, settings.clips_each)
        about = _about(args, whole_set, settings)
        if stored is not None:
            check_same(stored, about)
        chosen = args.shard.part(whole_set.select(args.only, args.dimension, args.limit))
        clips = plan(chosen, settings, names)
        left = _left(args, clips)
        if not args.quiet:
            _tell(whole_set, clips, left, names)
        if args.dry_run:
            return _quote(args, left, settings, connect)
        _refuse_early(args, left, settings, connect)
        folder.begin(about, _unfit(whole_set, names))
        # Asked again: another process may have made some until it let the folder go.
        return _make(args, folder, settings, clips, _left(args, clips), connect)


def _settings(args: argparse.Namespace, stored: Mapping[str, Any] | None, connect: Connect) -> Settings:
    """What the command line states, else what the folder was begun with, else the server's defaults."""
    given = given_settings(args)
    if stored is not None:
        try:
            return Settings.parse({**stored["settings"], **given})
        except (KeyError, TypeError) as error:
            raise InvalidInput(
                f"batch.json in {str(args.out)!r} lacks settings ({error}): name another --out."
            ) from error
    seeds = VBENCH_SEEDS if args.set.suffix.lower() == ".json" else VBENCH_SEEDS[:1]
    failure: ClientError | None = None
    for url in args.url:
        try:
            with closing(connect(url)) as endpoint:
                return Settings.resolve(given, {**endpoint.defaults(), "seeds": seeds})
        except (InvalidInput, InvalidRequest):
            raise
        except ServiceUnavailable as error:  # the server is there, and takes clips
            if STATED.keys() <= given.keys():
                return Settings.resolve(given, {"seeds": seeds})
            failure = failure or ServiceUnavailable(f"{error} Or state {', '.join(STATED.values())}.")
        except ClientError as error:
            failure = failure or error
    assert failure is not None, "there is at least one url"
    raise failure


def _read(args: argparse.Namespace, settings: Settings) -> EvaluationSet:
    return read_set(args.set, args.images, args.ratio or nearest_ratio(*settings.landscape))


def _left(args: argparse.Namespace, clips: Sequence[PlannedClip]) -> list[PlannedClip]:
    """The clips that the folder does not have whole."""
    there = read_clips(args.out)
    return [clip for clip in clips if clip.key not in there or not is_whole(args.out, there[clip.key])]


def _about(args: argparse.Namespace, whole_set: EvaluationSet, settings: Settings) -> dict[str, Any]:
    """What batch.json says."""
    what = {
        "input": str(args.set),
        "kind": whole_set.kind,
        "entries": len(whole_set.entries),
        "digest": whole_set.digest,
    }
    return {"set": what, "settings": settings.json()}


def _unfit(whole_set: EvaluationSet, names: Names) -> dict[str, str]:
    return {entry.id: entry.prompt for entry in whole_set.entries if entry.id in names.unfit}


def _tell(whole_set: EvaluationSet, clips: Sequence[PlannedClip], left: Sequence[PlannedClip], names: Names) -> None:
    """Prints what the folder has, before a clip is made."""
    sizes = Counter(clip.size for clip in clips)
    shown = ", ".join(f"{count} of {height}x{width}" for (height, width), count in sizes.most_common())
    say = partial(print, file=sys.stderr)
    say(f"{len(whole_set.entries)} entries in the set; {len(clips)} clips here ({shown}), {len(left)} to make")
    for entry_id, reason in names.unfit.items():
        say(f"not to be found by VBench: {entry_id}-*.mp4, because {reason}")


def _quote(args: argparse.Namespace, left: Sequence[PlannedClip], settings: Settings, connect: Connect) -> int:
    """Prints what the clips take; 0 where every server could tell."""
    if not left:
        print("nothing is left to make")
        return EXIT_OK
    estimates, failed = [], False
    for url in args.url:
        try:
            with closing(connect(url)) as endpoint:
                estimates.append(estimate(endpoint, kinds_of(left), settings))
            print(f"{url}: {_hours(estimates[-1])}")
        except (InvalidInput, InvalidRequest):
            raise
        except ClientError as error:
            failed = True
            print(f"stepvideo: {url} cannot tell: {error.code}: {error}", file=sys.stderr)
    if len(estimates) > 1:
        print(f"together: {_hours(together(estimates))}")
    return EXIT_SERVER_ERROR if failed else EXIT_OK


def _hours(found: Estimate) -> str:
    hours, gpu_hours = (
        f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
        for value in (found.seconds / 3600, found.gpu_seconds / 3600)
    )
    return f"{hours} hours, {gpu_hours} GPU-hours"


def _refuse_early(args: argparse.Namespace, left: Sequence[PlannedClip], settings: Settings, connect: Connect) -> None:
    """Raises InvalidRequest for presets and sizes that a server does not have, before the first clip. A server that
    cannot tell yet, or is not there, is asked by the clips themselves."""
    for url in args.url:
        try:
            with closing(connect(url)) as endpoint:
                estimate(endpoint, kinds_of(left), settings)
        except (InvalidInput, InvalidRequest):
            raise
        except ClientError:
            continue


def _make(
    args: argparse.Namespace,
    folder: BatchFolder,
    settings: Settings,
    clips: Sequence[PlannedClip],
    left: Sequence[PlannedClip],
    connect: Connect,
) -> int:
    lanes = [Lane(url, connect, args.waiting) for url in args.url]
    progress = BatchProgress(sys.stderr, len(clips), len(clips) - len(left), args.quiet)
    with Interrupts() as interrupts:
        terms = Terms(args.priority, args.attempts, args.patience)
        runner = Runner(folder, settings, lanes, terms, progress, interrupts)
        runner.run(left)
    if not args.quiet:
        there = len(clips) - len(left) + progress.made_now
        print(f"{args.out}: {there} of {len(clips)} clips, {progress.made_now} made now, {len(runner.failed)} given up")
    if interrupts.finish:
        print("stepvideo: stopped; the same command goes on.", file=sys.stderr)
        return EXIT_CANCELLED
    return EXIT_SERVER_ERROR if runner.failed else EXIT_OK
