"""Faults in real ranks that sum over gloo: what is done, how soon it is noticed, how the request ends.

python -m tests.parallel.faults     the whole matrix, as a table
"""

import contextlib
import gc
import os
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from stepvideo_serve.parallel.group import RankGroup
from stepvideo_serve.parallel.job import ResultEvent
from stepvideo_serve.scheduling.progress import ResumableDenoise
from stepvideo_serve.scheduling.resume import run_on
from stepvideo_serve.scheduling.run_queue import QueuedRun, RunTerms, Waiting
from tests.parallel.failing import LOST_DEVICE, SIGNALS

FAULTS = ("SIGKILL", "SIGSEGV", "SIGSTOP", "exception", "out of memory", "late heartbeat", *LOST_DEVICE)
STEPS = 6
MOMENTS = {"first step": 0, "middle step": STEPS // 2, "last step": STEPS - 1}
IDLE, REBUILD = "idle", "rebuild"
STUCK, MUTE = "stuck", "no heartbeat"  # for more than an hour
HEARTBEAT_S = 0.5
FIRST_STEP_S = 8.0
STEP_SLACK_S = 2.0
PATIENCE_S = 300.0  # the machine may be busy

LATENTS = np.random.default_rng(1).standard_normal((3, 4, 5, 6)).astype(np.float32)
HERE = Path(__file__)


class Case(NamedTuple):
    """A fault in a rank at a moment; `ranks` is the size of its group."""

    how: str
    rank: int
    moment: str
    ranks: int = 2


@dataclass(frozen=True)
class Outcome:
    """`noticed_s`: from the fault until the group gave the ranks up (None: it did not); `ready_s`: until all are ready
    again; `steps`: as they were reported."""

    steps: list[int]
    latents: NDArray[np.float32]
    noticed_s: float | None
    ready_s: float


class NoAnswer:
    """Where the responses of a run go, which nobody reads."""

    def send(self, outputs: dict[str, NDArray[Any]]) -> None: ...
    def waiting(self, waiting: Waiting) -> None: ...
    def fail(self, error: BaseException) -> None: ...
    def close(self) -> None: ...


@dataclass
class Bench:
    """A group of gloo ranks, and the traces of all its processes. `when`: (rank, generation, "start") of a fault."""

    size: int = 2
    how: str = ""
    when: tuple[tuple[int, int, str], ...] = ()
    marker: str = field(default_factory=lambda: uuid.uuid4().hex)

    def __post_init__(self) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="stepvideo-faults-")
        self.log = Path(self.folder.name, "fault")
        self._scratch = Path(self.folder.name, "scratch")
        self._scratch.mkdir()
        gc.collect()  # what earlier tests left in cycles is not to be closed meanwhile
        self._files = _open_files()
        self.group = RankGroup(
            "gloo_ranks:gloo",
            {"fault": {"how": self.how, "when": self.when, "log": str(self.log)}},
            size=self.size,
            start_timeout_s=PATIENCE_S,
            heartbeat_s=HEARTBEAT_S,
            first_step_timeout_s=FIRST_STEP_S,
            step_slack_s=STEP_SLACK_S,
            arena_bytes=1 << 20,
            threads_per_rank=1,
            env={
                "PYTHONPATH": os.pathsep.join((str(HERE.parents[2]), str(HERE.parent))),
                "TMPDIR": str(self._scratch),
                "FAULT_BENCH": self.marker,
            },
        )

    def queued(self, timeout_s: float | None = None, **params: Any) -> QueuedRun:
        job = ResumableDenoise({"steps": STEPS, **params}, {"latents": LATENTS}, STEPS)
        return QueuedRun("run", RunTerms(job, timeout_s=timeout_s), NoAnswer())

    def run(self, max_resumes: int = 2, **params: Any) -> tuple[list[int], NDArray[np.float32]]:
        """A request: the steps that were reported, and the result."""
        run = self.queued(**params)
        *steps, result = run_on(self.group, run, max_resumes)
        assert isinstance(result, ResultEvent)
        return [step.params["step"] for step in steps], result.tensors["latents"]

    def fault(self, how: str, rank: int, *steps: int, generations: int = 1) -> dict[str, Any]:
        """The parameter of a run that makes a rank fail at the beginning of these steps (from 0)."""
        first = self.group.generation
        when = [(rank, generation, step) for generation in range(first, first + generations) for step in steps]
        return {"how": how, "when": when, "log": str(self.log)}

    def fail_while_idle(self, how: str, rank: int) -> float:
        """Make a rank fail between two requests; when that was (time.monotonic())."""
        number = SIGNALS.get(how) or signal.Signals[how]
        at_s = time.monotonic()
        os.kill(self.group.pids[rank], number)
        return at_s

    def until_lost(self, generation: int) -> None:
        """Wait until the group has noticed that this generation is lost."""
        deadline_s = time.monotonic() + PATIENCE_S
        while self.group.last_loss is None or self.group.last_loss.generation < generation:
            assert time.monotonic() < deadline_s, f"nobody noticed the loss of generation {generation}"
            time.sleep(0.005)

    def processes(self) -> set[int]:
        """All processes of this bench that there are, whoever their parent is."""
        return {pid for pid, environment in _environments() if self.marker.encode() in environment}

    def check_nothing_is_left(self) -> None:
        """Besides the ranks that are ready; after `close`, nothing at all."""
        assert self.processes() == set(self.group.pids)
        assert not list(self._scratch.iterdir())
        for pid in self.group.pids:  # other programs use this folder, too: what ours never open they cannot leave
            assert "/dev/shm/" not in Path(f"/proc/{pid}/maps").read_text()

    def close(self) -> None:
        self.group.close()
        self.check_nothing_is_left()
        now = _open_files()
        assert len(now) == len(self._files), (self._files, now)
        self.folder.cleanup()

    def __enter__(self) -> "Bench":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def run_case(bench: Bench, case: Case) -> Outcome:
    """One case on a group that is ready, whose bench was made for it in case of REBUILD."""
    group = bench.group
    group.start()
    generation = group.generation
    bench.log.unlink(missing_ok=True)
    if case.moment == IDLE:
        at_s = bench.fail_while_idle(case.how, case.rank)
        if case.how not in ("late heartbeat", *LOST_DEVICE):  # a lost GPU shows when it is used
            bench.until_lost(generation)
        loss = group.last_loss
        steps, latents = bench.run()
        loss = group.last_loss if case.how in LOST_DEVICE else loss
    else:
        fault = bench.fault(case.how, case.rank, MOMENTS.get(case.moment, 0))
        if case.moment == REBUILD:
            fault = bench.fault("SIGKILL", 1 - case.rank, MOMENTS["middle step"])
        steps, latents = bench.run(fault=fault)
        at_s = float(bench.log.read_text())
        loss = group.last_loss
    group.start()
    noticed_s = loss.noticed_s - at_s if loss is not None and loss.noticed_s > at_s else None
    return Outcome(steps, latents, noticed_s, time.monotonic() - at_s)


def cases(moments: Iterable[str], alone: Iterable[str]) -> Iterator[Case]:
    """Each fault in either of two ranks at each of `moments`; the loss of a GPU also in a rank alone, at `alone`."""
    yield from (Case(how, rank, moment) for how in FAULTS for rank in (0, 1) for moment in moments)
    yield from (Case(how, 0, moment, ranks=1) for how in LOST_DEVICE for moment in alone)


def matrix() -> Iterator[Case]:
    yield from cases((IDLE, *MOMENTS, REBUILD), (IDLE, *MOMENTS))
    for rank in (0, 1):  # that a rank may be mute or busy for long while it starts is no fault
        yield from (Case(MUTE, rank, moment) for moment in (IDLE, *MOMENTS))
        yield from (Case(STUCK, rank, moment) for moment in MOMENTS)


def bench_for(case: Case) -> Bench:
    if case.moment == REBUILD:
        return Bench(how=case.how, when=((case.rank, 2, "start"),))
    return Bench(case.ranks)


def verify(bench: Bench, outcome: Outcome, expected: NDArray[np.float32]) -> None:
    """The request ended right, the next one does, and nothing else is there."""
    assert outcome.steps == list(range(1, STEPS + 1))
    assert outcome.latents.tobytes() == expected.tobytes()
    assert bench.run()[1].tobytes() == expected.tobytes()
    bench.check_nothing_is_left()


def rank_name(rank: int, ranks: int) -> str:
    """What a rank is to the others, for tables."""
    return "only" if ranks == 1 else "leader" if rank == 0 else "other"


def row(case: Case, outcome: Outcome) -> str:
    rank = rank_name(case.rank, case.ranks)
    noticed, request = "-", "went on"
    if outcome.noticed_s is not None:
        noticed, request = f"{outcome.noticed_s:.2f} s", "resumed"
    if case.moment == IDLE:
        request = "the next one"
    elif case.moment == REBUILD:
        request = "resumed"
    return f"| {case.how} | {rank} | {case.moment} | {noticed} | {outcome.ready_s:.1f} s | {request}: same bits |"


HEADER = "| fault | rank | moment | noticed after | ready again after | request |\n|---|---|---|---|---|---|"


def undisturbed(ranks: int = 2) -> NDArray[np.float32]:
    """The result that every request must have."""
    with Bench(ranks) as bench:
        return bench.run()[1]


def main() -> None:
    expected = {ranks: undisturbed(ranks) for ranks in (1, 2)}
    print(HEADER)
    for case in matrix():
        if sys.argv[1:] and case.how not in sys.argv[1:]:
            continue
        with bench_for(case) as bench:
            outcome = run_case(bench, case)
            verify(bench, outcome, expected[case.ranks])
        print(row(case, outcome), flush=True)


def _environments() -> Iterator[tuple[int, bytes]]:
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                yield int(name), Path("/proc", name, "environ").read_bytes()
            except OSError:
                continue  # it has ended


if __name__ == "__main__":
    main()


def _open_files() -> list[str]:
    """What this process has open, by where each leads."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the listing itself
            found.append(os.readlink(f"/proc/self/fd/{name}"))
    return sorted(found)
