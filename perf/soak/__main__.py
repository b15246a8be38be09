"""Many callers at once who behave as callers do: right, wrong, late, impatient; and ranks that die under them.

    python -m perf.soak [--requests 1000] [--concurrency 32] [--seed 0] [--kill-every 100] [--honest 40] [--rounds 4]
                        [--config serve.toml | --url HOST:PORT]

First every kind of good request runs alone: its LATENTS are what must come back later, bit for bit. Then the callers
start. Last, honest callers alone and beside strangers who attack (honest.py). The verdict says what was violated;
docs/load.md has the rules. Exit code 1 if one was. With --url the server is somebody else's: no rank is killed and no
memory is looked at.
"""

import argparse
import json
import random
import re
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import psutil

from perf.soak import honest
from perf.soak.growth import Sampler, cpu_seconds, ranks_of
from perf.soak.plan import Planned, good_requests, plan
from perf.soak.report import Books, Ended, Soak, growing, summary, table, violations
from perf.soak.wire import OK, OWN_CONNECTION, Leave, Outcome, Values, exchange, exchange_unary
from stepvideo_serve.errors import SetupError, StepVideoError
from stepvideo_serve.launch.options import ServerOptions
from stepvideo_serve.launch.server import TritonServer
from stepvideo_serve.launch.stop_signals import heed_stop_signals

LIMIT_S = 600.0  # a request that takes longer is stuck
BACKOFF_S = (0.05, 2.0)  # first and longest wait after RESOURCE_EXHAUSTED
RECOVERY_S = 120.0
SETTLE_S = 30.0
FULL = "RESOURCE_EXHAUSTED"


def metric(url: str, name: str, labels: str = "") -> float:
    """The sum of a metric over all labels that hold the text `labels`; 0 before its first sample."""
    with urllib.request.urlopen(url, timeout=30) as page:
        text = page.read().decode()
    lines = re.findall(rf"^{name}(?:\{{(.*)\}})? (\S+)$", text, re.MULTILINE)
    return sum(float(value) for found, value in lines if labels in found)


def books(url: str) -> Books:
    """What the server's metrics say now."""
    return Books(
        answered=metric(url, "stepvideo_requests_total"),
        internal=metric(url, "stepvideo_requests_total", 'code="INTERNAL"'),
        unfinished=metric(url, "stepvideo_queue_length") + metric(url, "stepvideo_running"),
        step_s=metric(url, "stepvideo_step_seconds_sum"),
        denoise_s=metric(url, "stepvideo_stage_seconds_sum", 'stage="denoise"'),
        preemptions=metric(url, "stepvideo_preemptions_total"),
        resumes=metric(url, "stepvideo_resumes_total", 'after="rank_failure"'),
    )


class Killer:
    """Kills one rank whenever another `every` requests have ended (0: never), and waits for the next step."""

    def __init__(self, server: TritonServer | None, every: int, seed: int) -> None:
        self.kills = 0
        self.recovery_s: list[float] = []
        self._server, self._every, self._dice = server, every, random.Random(seed)
        self._due = threading.Semaphore(0)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def ended(self, requests: int) -> None:
        """Another request has ended, `requests` in all."""
        if self._every and self._server is not None and requests % self._every == 0:
            self._due.release()

    def __enter__(self) -> "Killer":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._due.release()
        self._thread.join()

    def _run(self) -> None:
        while self._due.acquire() and not self._ended.is_set():
            self._wait(lambda: bool(ranks_of(self._pid)))
            began_s = time.monotonic()
            self.kills += 1
            self._kill_and_recover()
            self.recovery_s.append(time.monotonic() - began_s)

    def _kill_and_recover(self) -> None:
        restarts = self._metric("stepvideo_rank_restarts_total")
        self._dice.choice(ranks_of(self._pid)).kill()
        self._wait(lambda: self._metric("stepvideo_rank_restarts_total") > restarts)
        steps = self._metric("stepvideo_steps_total")
        self._wait(lambda: self._metric("stepvideo_steps_total") > steps)

    def _metric(self, name: str) -> float:
        assert self._server is not None
        return metric(self._server.metrics_url, name)

    @property
    def _pid(self) -> int:
        assert self._server is not None
        return self._server.pid

    def _wait(self, condition: Callable[[], bool]) -> None:
        """At most RECOVERY_S, and not beyond the last request: the requests themselves tell what did not recover."""
        deadline_s = time.monotonic() + RECOVERY_S
        while not (self._ended.is_set() or condition()) and time.monotonic() < deadline_s:
            time.sleep(0.1)


def run(
    url: str, requests: list[Planned], concurrency: int, kill_every: int, server: TritonServer | None, seed: int
) -> Soak:
    """All requests, `concurrency` at a time. `server`: ours, whose ranks may die and whose memory is sampled."""
    soak, lock = Soak(), threading.Lock()
    before = books(server.metrics_url) if server else None
    killer = Killer(server, kill_every, seed)

    def send(planned: Planned) -> None:
        kills = killer.kills
        outcome, refusals = _until_accepted(url, planned, random.Random(f"{seed} {planned.number}"))
        with lock:
            soak.ended.append(Ended(planned, outcome, refusals, killer.kills - kills))
            count = len(soak.ended)
        killer.ended(count)
        if count % max(1, len(requests) // 20) == 0:
            print(f"{count} of {len(requests)} requests, {killer.kills} kills", file=sys.stderr, flush=True)

    began_s = time.monotonic()
    with killer, ThreadPoolExecutor(concurrency) as callers:
        try:
            if server is None:
                list(callers.map(send, requests))
            else:
                with Sampler(server.pid, server.shm_prefix, lambda: len(soak.ended)) as sampler:
                    list(callers.map(send, requests))
                soak.samples = sampler.samples
        except BaseException:  # Ctrl-C, too: do not send the rest
            callers.shutdown(cancel_futures=True)
            raise
        soak.wall_s = time.monotonic() - began_s
    soak.recovery_s = killer.recovery_s
    soak.kills = killer.kills
    if server and before:
        soak.books = _closed(server.metrics_url) - before
    return soak


def _closed(url: str) -> Books:
    """The books once nothing runs any more: who left is noticed at the next step. They say so if that does not come."""
    deadline_s = time.monotonic() + SETTLE_S
    while True:
        settled, time_left = books(url), time.monotonic() < deadline_s
        if not time_left or settled.unfinished == 0:
            return books(url)  # an answer is counted a moment after its run has left the ranks
        time.sleep(0.5)


def _until_accepted(url: str, planned: Planned, dice: random.Random) -> tuple[Outcome, int]:
    """Tries again while the queue is full, after 50 ms, 100 ms ... 2 s and some chance; the end, and the refusals."""
    refusals, began_s = 0, time.monotonic()
    while True:
        if planned.attack is not None:
            with grpc.insecure_channel(url, options=OWN_CONNECTION) as channel:
                outcome = planned.attack.send(channel, LIMIT_S)
        elif planned.action == "unary":
            outcome = exchange_unary(url, planned.values, LIMIT_S)
        else:
            leave: Leave = "close" if planned.action == "vanish" else "cancel"
            outcome = exchange(url, planned.values, LIMIT_S, planned.leave_after_s, leave)
        if outcome.code != FULL or time.monotonic() > began_s + LIMIT_S:
            return outcome, refusals
        time.sleep(dice.uniform(0.5, 1.0) * min(BACKOFF_S[0] * 2**refusals, BACKOFF_S[1]))
        refusals += 1


def quiet_run(url: str, good: list[Values]) -> list[bytes]:
    """The LATENTS of each kind, one after the other. Raises SetupError if one does not end well."""
    latents = []
    for kind, values in enumerate(good):
        outcome = exchange(url, values, LIMIT_S)
        if outcome.code != OK or outcome.latents is None:
            raise SetupError(f"Request {kind} must succeed on an idle server, got {outcome.code}: {outcome.text}")
        latents.append(outcome.latents)
    return latents


def soak_server(url: str, server: TritonServer | None, options: argparse.Namespace) -> dict[str, Any]:
    """The whole test on a server that is ready; its figures."""
    good = good_requests()
    print("every kind of good request alone ...", file=sys.stderr, flush=True)
    quiet = quiet_run(url, good)
    requests = plan(options.requests, options.seed, good)
    soak = run(url, requests, options.concurrency, options.kill_every, server, options.seed)
    wrong = list(violations(soak, quiet))
    compared = compare_honest(url, server, options) if options.honest else {}
    if server is not None and not psutil.pid_exists(server.pid):
        wrong.append("the server has ended")
    if quiet_run(url, good) != quiet:
        wrong.append("afterwards, alone again, the bits are others")
    figures = summary(soak, wrong)
    wrong += growing(figures)
    if compared:
        figures["honest"] = honest.figures(compared)
        wrong += honest.starved(figures["honest"], compared)
    return figures


def compare_honest(url: str, server: TritonServer | None, options: argparse.Namespace) -> dict[str, list[honest.Round]]:
    """Honest callers alone, and beside strangers who attack."""
    print("honest callers alone, and beside strangers who attack ...", file=sys.stderr, flush=True)
    meters = None
    if server is not None:
        steps_s = partial(metric, server.metrics_url, "stepvideo_step_seconds_sum")
        meters = honest.Meters(steps_s, partial(cpu_seconds, server.pid))
    return honest.compare(url, options.honest, options.rounds, options.seed, meters)


def main() -> int:
    options = _parser().parse_args()
    heed_stop_signals()
    try:
        if options.url:
            figures = soak_server(options.url, None, options)
        else:
            repository = Path(__file__).absolute().parents[2] / "model_repository"
            with TritonServer(ServerOptions(repository, options.config, log=options.log)) as server:
                server.wait_ready(300.0)
                figures = soak_server(server.grpc_url, server, options)
    except StepVideoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    print(table(figures))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(figures, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return 1 if figures["violations"] else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m perf.soak", description="Load, soak and dying ranks.")
    add = parser.add_argument
    add("--requests", type=int, default=1000)
    add("--concurrency", type=int, default=32)
    add("--seed", type=int, default=0, help="the same seed, the same requests; default: %(default)s")
    add("--kill-every", type=int, default=100, metavar="N", help="requests between two kills of a rank; 0: none")
    add("--honest", type=int, default=40, metavar="N", help="honest requests of a round alone or under attack; 0: none")
    add("--rounds", type=int, default=4, help="of each; default: %(default)s")
    add("--config", type=Path, default=Path("serve.toml"))
    add("--url", help="HOST:PORT of a server that runs already (gRPC)")
    add("--log", type=Path, default=Path("build/soak-server.log"), help="default: %(default)s")
    add("--out", type=Path, default=Path("build/soak.json"), help="the figures; default: %(default)s")
    return parser


if __name__ == "__main__":
    sys.exit(main())
