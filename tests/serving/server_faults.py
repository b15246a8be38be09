"""Faults in the ranks of a real server: struck at a moment of a request, and what became of the request.

python -m tests.serving.server_faults [FAULT ...]     the whole matrix, as a table
"""

import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

from stepvideo_serve.launch.leftovers import SHARED_MEMORY
from tests.parallel.failing import LOST_DEVICE, SIGNALS
from tests.parallel.faults import HEARTBEAT_S, IDLE, MOMENTS, REBUILD, STEP_SLACK_S, STEPS, Case, cases, rank_name
from tests.server_deaths import WatchServer
from tests.serving.calls import Answer, Outputs, Server, Stream, Values, cpu_s, report_of, until
from tests.serving.launch import Engines, serving, unwatched

PRESET, DECODING = "preset", "decoding"  # in the middle of a request that forecasts some of its steps; after the steps
ALONE = (IDLE, *MOMENTS, PRESET)
"""The moments of a rank alone: it decodes nothing, and is not rebuilt because of another one."""
PRESET_STEPS = 16  # below ten every step is evaluated
LAYOUTS = {1: "single", 2: "cfg2"}
BUSY_S = 0.03  # a rank that has used so much CPU time since it was idle has begun
SITE = Path(__file__).parent / "fault_site"

CONFIG = """
[model]
dir = "{model}"
engines_dir = "{engines}"

[denoiser]
layout = "{layout}"
threads = 1
heartbeat_s = {heartbeat_s}
step_slack_s = {step_slack_s}
max_resumes = 4

[presets.rough]
rule = "adaptive"
tolerance = 100.0
dense_start = 0.01
dense_end = 0.9
longest_streak = 3
"""


@dataclass(frozen=True)
class Outcome:
    """`lost_s`: from the fault until all processes of that generation had ended (None: they live on); `ended_s`: until
    the request had its final response; `ready_s`: until the next one had."""

    answer: Answer
    next_answer: Answer
    lost_s: float | None
    ended_s: float
    ready_s: float

    @property
    def step_seconds(self) -> list[float]:
        """Of both requests."""
        return [
            second for answer in (self.answer, self.next_answer) for second in report_of(answer.result)["step_seconds"]
        ]


@dataclass(frozen=True)
class FaultyServer:
    """A server of one or two ranks that can be made to fail, a request of one whole second or more, one that decodes,
    and one that forecasts steps."""

    server: Server
    size: int
    denoise: Values
    decode: Values
    forecast: Values

    def ranks(self) -> dict[int, psutil.Process]:
        """The living processes of the group by rank; while it is rebuilt, some are missing."""
        found = {}
        for child in psutil.Process(self.server.pid).children(recursive=True):
            try:
                command = child.cmdline()
            except psutil.Error:
                continue  # it has just ended
            if "stepvideo_serve.parallel.rank_process" in command:
                found[int(command[command.index("--rank") + 1])] = child
        return found

    def request(self, moment: str) -> Values:
        return {DECODING: self.decode, PRESET: self.forecast}.get(moment, self.denoise)

    def run(self, case: Case) -> Outcome:
        """One case on a group that is ready and idle."""
        before = self.ranks()
        assert len(before) == self.size == case.ranks
        target = before[case.rank]
        if case.moment == IDLE:
            watch = Watch(before)
            strike(target, case.how)
            answer = self.server.stream(self.denoise)
        else:
            with self.server.open(self.request(case.moment)) as stream:
                progress = wait_for(stream, case.moment, target)
                if case.moment == REBUILD:
                    strike(before[1 - case.rank], "SIGKILL")
                    until(lambda: self._reborn(case.rank, target), "the new rank")
                    target = self.ranks()[case.rank]
                    watch = Watch({case.rank: target})
                else:
                    watch = Watch(before)
                strike(target, case.how)
                answer = stream.collect()
                answer.progress[:0] = progress
        ended_s = time.monotonic() - watch.began_s
        next_answer = self.server.stream(self.denoise)
        ready_s = time.monotonic() - watch.began_s
        return Outcome(answer, next_answer, watch.lost_s(), ended_s, ready_s)

    def _reborn(self, rank: int, old: psutil.Process) -> bool:
        """Whether the rank's new process is far enough to fail: Python has begun to import its modules."""
        new = self.ranks().get(rank)
        try:
            return new is not None and new.pid != old.pid and cpu_s(new) > 0.3
        except psutil.Error:
            return False


class Watch:
    """When the last of some processes has ended, from now on."""

    def __init__(self, processes: dict[int, psutil.Process]) -> None:
        self.began_s = time.monotonic()
        self._processes = list(processes.values())
        self._lost_s: float | None = None
        self._thread = threading.Thread(target=self._wait, daemon=True)
        self._thread.start()

    def lost_s(self) -> float | None:
        """Seconds until all had ended; None if they have not."""
        self._thread.join(0.0 if any(process.is_running() for process in self._processes) else None)
        return self._lost_s

    def _wait(self) -> None:
        if not psutil.wait_procs(self._processes, timeout=600.0)[1]:
            self._lost_s = time.monotonic() - self.began_s


def strike(process: psutil.Process, how: str) -> None:
    process.send_signal(SIGNALS.get(how) or signal.Signals[how])


def wait_for(stream: Stream, moment: str, rank: psutil.Process) -> list[Outputs]:
    """Returns when the moment has come; the progress responses until then."""
    idle_s = cpu_s(rank)
    wanted = {**MOMENTS, REBUILD: MOMENTS["middle step"], PRESET: PRESET_STEPS // 2}.get(moment, STEPS)
    progress: list[Outputs] = []
    while len(progress) < wanted:
        outputs, final = stream.next()
        assert not final
        if outputs.get("STEP", [0])[0] > len(progress):
            progress.append(outputs)
    if wanted == STEPS:
        idle_s = cpu_s(rank)
    if wanted in (0, STEPS):
        until(lambda: cpu_s(rank) > idle_s + BUSY_S, f"the {moment} to begin")
    return progress


def steps_of(moment: str) -> int:
    """Of the request that is struck at this moment."""
    return PRESET_STEPS if moment == PRESET else STEPS


def matrix() -> Iterator[Case]:
    yield from cases((IDLE, *MOMENTS, DECODING, REBUILD, PRESET), ALONE)


@contextmanager
def faulty_server(
    root: Path, folder: Path, engines: Engines, picture: bytes, watch: WatchServer = unwatched, ranks: int = 2
) -> Iterator[FaultyServer]:
    """One thread for each rank; `folder` gets its configuration and log."""
    config = CONFIG.format(
        model=engines.model_dir,
        engines=engines.graphs_dir,
        layout=LAYOUTS[ranks],
        heartbeat_s=HEARTBEAT_S,
        step_slack_s=STEP_SLACK_S,
    )
    old = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(SITE) + (f"{os.pathsep}{old}" if old else "")
    try:
        with serving(root, folder, config, watch) as running:
            server = Server(running.grpc_url, running.http_url, running.pid)
            yield FaultyServer(server, ranks, *requests(picture))
    finally:
        if old is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = old


def requests(picture: bytes) -> tuple[Values, Values, Values]:
    """One that spends its time in steps and returns latents, one that decodes four chunks, one that forecasts steps."""
    common: Values = {
        "PROMPT": "一只猫".encode(),
        "IMAGE": picture,
        "SEED": np.array([7], np.int64),
        "STEPS": np.array([STEPS], np.int32),
    }

    def sized(frames: int, height: int, width: int, output: bytes) -> Values:
        size = {"NUM_FRAMES": frames, "HEIGHT": height, "WIDTH": width}
        return {**common, "OUTPUT": output, **{name: np.array([value], np.int32) for name, value in size.items()}}

    denoise = sized(34, 256, 256, b"latents")
    forecast: Values = {**denoise, "STEPS": np.array([PRESET_STEPS], np.int32), "QUALITY": b"rough"}
    return denoise, sized(68, 32, 48, b"frames"), forecast


def verify(
    faulty: FaultyServer, case: Case, outcome: Outcome, expected: dict[str, Outputs], at_start: set[str]
) -> None:
    """The request ended right, the next one did, and nothing is left of the ranks that were lost."""
    steps = [int(step["STEP"][0]) for step in outcome.answer.progress]  # repeated whenever nothing new comes for 15 s
    assert [step for step in dict.fromkeys(steps) if step > 0] == list(range(1, steps_of(case.moment) + 1))
    for answer, request in ((outcome.answer, case.moment), (outcome.next_answer, IDLE)):
        for name, value in expected[request if request in expected else IDLE].items():
            np.testing.assert_array_equal(answer.result[name], value)
    assert len(faulty.ranks()) == faulty.size
    assert shared_memory() <= at_start


def shared_memory() -> set[str]:
    """Names in /dev/shm that belong to servers of this process."""
    return {path.name for path in SHARED_MEMORY.glob(f"stepvideo_{os.getpid()}_*")}


def expected_results(faulty: FaultyServer) -> dict[str, Outputs]:
    """What every request must return, and the processes' warm-up."""
    results = {
        IDLE: faulty.server.stream_result(faulty.denoise),
        DECODING: faulty.server.stream_result(faulty.decode),
        PRESET: faulty.server.stream_result(faulty.forecast),
    }
    evaluations = report_of(results[PRESET])["quality"]["evaluations"]
    assert evaluations < PRESET_STEPS, "no step was forecast: the rows of the preset would show nothing"
    return {
        moment: {name: result[name] for name in ("LATENTS", "FRAMES") if name in result}
        for moment, result in results.items()
    }


HEADER = (
    "| fault | rank | moment | its ranks ended after | request ended after | next one after | outcome |\n"
    "|---|---|---|---|---|---|---|"
)


def row(case: Case, outcome: Outcome) -> str:
    lost = "not lost" if outcome.lost_s is None else f"{outcome.lost_s:.1f} s"
    request = "undisturbed" if outcome.lost_s is None else "resumed"
    if case.moment == IDLE and outcome.lost_s is not None and case.how not in LOST_DEVICE:
        request = "waited"
    rank = rank_name(case.rank, case.ranks)
    return (
        f"| {case.how} | {rank} | {case.moment} | {lost} | {outcome.ended_s:.1f} s | {outcome.ready_s:.1f} s "
        f"| {request}, same bits |"
    )


def main() -> None:
    root = Path(__file__).parents[2]
    picture = (root / "client/examples/first_frame.png").read_bytes()
    engines = Engines(root / "build/tiny", root / "build/onnx")
    print(HEADER)
    for ranks in (2, 1):
        with (
            tempfile.TemporaryDirectory() as name,
            faulty_server(root, Path(name), engines, picture, ranks=ranks) as faulty,
        ):
            expected = expected_results(faulty)
            at_start = shared_memory()
            for case in matrix():
                if case.ranks == ranks and (not sys.argv[1:] or case.how in sys.argv[1:]):
                    outcome = faulty.run(case)
                    print(row(case, outcome), flush=True)
                    verify(faulty, case, outcome, expected, at_start)


if __name__ == "__main__":
    main()
