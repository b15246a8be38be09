"""What strangers who attack take away from honest callers: the same load alone, and while they do.

Rounds of the same honest requests follow each other on one server: alone, beside attackers whose requests are refused,
beside others whose requests are served; then in the opposite order, and so on.
"""

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from perf.soak.attacks import FULL, REFUSED, SERVED
from perf.soak.plan import good_requests
from perf.soak.strangers import NICE, Strangers
from perf.soak.wire import OK, Outcome, Values, exchange

LEAST_RATIO = 0.9
CALLERS = 3
STRANGERS = 4
QUIET = "alone"
ORDER = (QUIET, REFUSED, SERVED)
LIMIT_S = 600.0
FULL_PAUSE_S = 0.05
SIZE = {"NUM_FRAMES": 34, "HEIGHT": 160, "WIDTH": 160, "STEPS": 4}


@dataclass(frozen=True)
class Meters:
    """Of a server of our own, so far. steps_s: seconds of all steps that the ranks have evaluated, for whomever; cpu_s:
    seconds of CPU of the server and all its processes."""

    steps_s: Callable[[], float]
    cpu_s: Callable[[], float]


@dataclass
class Round:
    """So many honest requests ended well. `step_s`: seconds of their steps; `ranks_s`: of all steps meanwhile, and
    `server_cpu_s` of CPU of the server, None without meters. `refusals`: by a full queue. `attackers_s`: seconds until
    the last attack had ended, `attackers_cpu_s` of CPU of their process."""

    requests: int = 0
    refusals: int = 0
    wall_s: float = 0.0
    step_s: float = 0.0
    ranks_s: float | None = None
    server_cpu_s: float | None = None
    attacks: dict[str, Counter[str]] = field(default_factory=dict)
    attackers_s: float = 0.0
    attackers_cpu_s: float = 0.0
    wrong: list[str] = field(default_factory=list)


def honest_requests() -> list[Values]:
    """Those of the soak, at a size whose steps take longer than what is around them."""
    size = {name: np.array([value], np.int32) for name, value in SIZE.items()}
    return [{**values, **size} for values in good_requests()]


def compare(
    url: str, count: int, rounds: int, seed: int, meters: Meters | None, order: Sequence[str] = ORDER, nice: int = NICE
) -> dict[str, list[Round]]:
    """`rounds` rounds of `count` requests for each of `order`, after every kind alone. `nice`: of the attackers."""
    load = Load(url, honest_requests(), count)
    found: dict[str, list[Round]] = {group: [] for group in order}
    for number in range(rounds):
        for group in order if number % 2 == 0 else reversed(order):
            strangers = None if group == QUIET else Strangers(url, group, STRANGERS, seed + number, nice)
            found[group].append(load.round(strangers, meters))
    return found


class Load:
    """`count` honest requests, of all kinds in turn, CALLERS at a time; each must have the bits that it has alone."""

    def __init__(self, url: str, kinds: list[Values], count: int) -> None:
        self._url, self._kinds, self._count = url, kinds, count
        self._alone = [self._accepted(kind)[0].latents for kind in range(len(kinds))]

    def round(self, strangers: Strangers | None, meters: Meters | None) -> Round:
        """Once, beside the strangers."""
        seen, before = Round(), None if meters is None else (meters.steps_s(), meters.cpu_s())
        with strangers or nullcontext():
            began_s = time.monotonic()
            with ThreadPoolExecutor(CALLERS) as callers:
                ended = list(callers.map(lambda number: self._accepted(number % len(self._kinds)), range(self._count)))
            seen.wall_s = time.monotonic() - began_s
        if meters is not None and before is not None:
            seen.ranks_s, seen.server_cpu_s = meters.steps_s() - before[0], meters.cpu_s() - before[1]
        if strangers is not None:
            seen.attacks = {name: Counter(codes) for name, codes in strangers.seen["ends"].items()}
            seen.attackers_s, seen.attackers_cpu_s = strangers.seen["seconds"], strangers.seen["cpu_s"]
            seen.wrong = list(strangers.seen["wrong"])
        for number, (outcome, refusals) in enumerate(ended):
            seen.refusals += refusals
            if outcome.code != OK or outcome.latents != self._alone[number % len(self._kinds)]:
                beside = "alone" if strangers is None else f"beside attacks that are {strangers.group}"
                seen.wrong.append(f"an honest request {beside} ended with {outcome.code} {outcome.text}".rstrip())
                continue
            seen.requests += 1
            seen.step_s += sum((outcome.report or {})["step_seconds"])
        return seen

    def _accepted(self, kind: int) -> tuple[Outcome, int]:
        """The end of a request that is sent again while the queue is full, and how often it was."""
        refusals, deadline_s = 0, time.monotonic() + LIMIT_S
        while True:
            outcome = exchange(self._url, self._kinds[kind], LIMIT_S)
            if outcome.code != FULL or time.monotonic() > deadline_s:
                return outcome, refusals
            time.sleep(FULL_PAUSE_S)
            refusals += 1


def figures(found: Mapping[str, list[Round]]) -> dict[str, Any]:
    """By group: requests per second, their ratio to the same requests alone (of all rounds together, and of each round
    to the one alone beside it), the share of the ranks' step time that honest requests had, attacks per second, the CPU
    time that one costs the server, and the CPUs that the attackers' own process took."""
    quiet = _per_s(found[QUIET])
    result: dict[str, Any] = {}
    for group, rounds in found.items():
        attackers_s = sum(each.attackers_s for each in rounds)
        ranks_s = [each.ranks_s for each in rounds if each.ranks_s is not None]
        told: dict[str, Any] = {"requests": sum(each.requests for each in rounds), "per_s": round(_per_s(rounds), 3)}
        if ranks_s:
            told["share_of_steps"] = round(sum(each.step_s for each in rounds) / max(sum(ranks_s), 1e-9), 3)
        if group != QUIET:
            pairs = [_per_s([each]) / _per_s([alone]) for each, alone in zip(rounds, found[QUIET], strict=True)]
            counts: Counter[str] = Counter()
            for each in rounds:
                for codes in each.attacks.values():
                    counts.update(codes)
            told |= {
                "ratio": round(_per_s(rounds) / quiet, 3),
                "ratio_median_of_rounds": round(statistics.median(pairs), 3),
                "attacks_per_s": round(counts.total() / max(attackers_s, 1e-9), 1),
                "attacks": dict(counts),
                "attackers_cpus": round(sum(each.attackers_cpu_s for each in rounds) / max(attackers_s, 1e-9), 2),
                "queue_full": sum(each.refusals for each in rounds),
            }
            if (cost_s := _cpu_s_per_attack(rounds, found[QUIET], counts.total())) is not None:
                told["server_cpu_ms_per_attack"] = round(1000 * cost_s, 2)
        result[group] = told
    return result


def _cpu_s_per_attack(rounds: list[Round], quiet: list[Round], attacks: int) -> float | None:
    """What the server took in these rounds beyond what it takes for the honest requests alone."""
    taken, alone = ([each.server_cpu_s for each in some if each.server_cpu_s is not None] for some in (rounds, quiet))
    if not taken or not alone or not attacks:
        return None
    own_s = sum(alone) / sum(each.requests for each in quiet) * sum(each.requests for each in rounds)
    return (sum(taken) - own_s) / attacks


def _per_s(rounds: list[Round]) -> float:
    return sum(each.requests for each in rounds) / max(sum(each.wall_s for each in rounds), 1e-9)


def starved(told: Mapping[str, Any], found: Mapping[str, list[Round]]) -> Iterable[str]:
    """What must not be: an attack or an honest request that did not end as it may, and honest callers with less than
    LEAST_RATIO of their throughput, or of the ranks' steps, beside attacks that are refused."""
    for rounds in found.values():
        for each in rounds:
            yield from each.wrong
    beside = told[REFUSED]
    if beside["ratio"] < LEAST_RATIO:
        yield f"honest callers had {beside['ratio']:.2f} of their throughput under attack, the least is {LEAST_RATIO}"
    if beside.get("share_of_steps", 1.0) < LEAST_RATIO:
        yield f"honest requests had {beside['share_of_steps']:.2f} of the steps under attacks that are refused"
