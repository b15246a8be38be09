"""Attackers, as many as wanted, in a process of their own, which may get only the CPU time that nobody else wants.

    python -m perf.soak.strangers --url HOST:PORT --group refused|served [--threads 4] [--seed 0] [--nice 19]

Says "ready" once all that they will send is made, begins with the next line of standard input, and ends when standard
input does; then prints one JSON object: `ends`, {attack: {code: count}}, `seconds` that this took, `cpu_s` that
the process has used meanwhile, and `wrong`, a sentence for each attack (at most MOST_WRONG) that did not end as it may.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import grpc

from perf.soak.attacks import GROUPS, REFUSED, Attack, refused, served
from perf.soak.plan import good_requests
from perf.soak.wire import OWN_CONNECTION

NICE = 19
LIMIT_S = 120.0
FULL_PAUSE_S = 0.02
MOST_WRONG = 20
ROOT = Path(__file__).absolute().parents[2]


def attack(url: str, attacks: Sequence[Attack], threads: int, seed: int, over: threading.Event) -> dict[str, Any]:
    """Until `over`: each thread on a connection of its own, one attack after the other in an order of its own."""
    ends: dict[str, Counter[str]] = defaultdict(Counter)
    wrong: list[str] = []
    lock = threading.Lock()

    def stranger(number: int) -> None:
        dice = random.Random(f"{seed} {number}")
        with grpc.insecure_channel(url, options=OWN_CONNECTION) as channel:
            while not over.is_set():
                chosen = dice.choice(attacks)
                outcome = chosen.send(channel, LIMIT_S)
                with lock:
                    ends[chosen.name][outcome.code] += 1
                    if outcome.code not in chosen.ends and len(wrong) < MOST_WRONG:
                        wrong.append(f"attack {chosen.name!r} ended with {outcome.code}: {outcome.text[:200]}")
                if outcome.code == "RESOURCE_EXHAUSTED":
                    over.wait(FULL_PAUSE_S)

    began_s, began_cpu_s = time.monotonic(), time.process_time()
    workers = [threading.Thread(target=stranger, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    seconds, cpu_s = time.monotonic() - began_s, time.process_time() - began_cpu_s
    return {"ends": ends, "seconds": round(seconds, 2), "cpu_s": round(cpu_s, 2), "wrong": wrong}


class Strangers:
    """The process, as a context manager around the time in which it attacks; `seen` has its figures afterwards."""

    def __init__(self, url: str, group: str, threads: int, seed: int, nice: int = NICE) -> None:
        self.group = group
        self.seen: dict[str, Any] = {}
        self._command = [sys.executable, "-m", "perf.soak.strangers", "--url", url, "--group", group]
        self._command += ["--threads", str(threads), "--seed", str(seed), "--nice", str(nice)]

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            self._command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdout.readline()
        self._process.stdin.write("begin\n")
        self._process.stdin.flush()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._process.kill()
        said = self._process.communicate()[0]
        if kind is None:
            self.seen = json.loads(said)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m perf.soak.strangers", description="Attackers of a server.")
    parser.add_argument("--url", required=True)
    parser.add_argument("--group", choices=GROUPS, required=True)
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--nice", type=int, default=NICE, help="added to that of who starts it; default: %(default)s")
    options = parser.parse_args()
    attacks = (refused if options.group == REFUSED else served)(good_requests()[0])
    print("ready", flush=True)
    if not sys.stdin.readline():
        return 0
    os.nice(options.nice)
    over = threading.Event()

    def wait_for_the_end() -> None:
        sys.stdin.read()
        over.set()

    threading.Thread(target=wait_for_the_end, daemon=True).start()
    print(json.dumps(attack(options.url, attacks, options.threads, options.seed, over)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
