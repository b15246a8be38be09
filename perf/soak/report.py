"""What perf.soak saw, what of it was not as it must be, and the figures."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

from perf.soak.growth import MIB, Sample, slope
from perf.soak.plan import ACTIONS, Planned, good_requests
from perf.soak.wire import CANCELLED, OK, REFUSED_BY_TRITON, Outcome


@dataclass(frozen=True)
class Ended:
    """What became of a planned request, after `refusals` by a full queue. `kills`: ranks killed meanwhile."""

    planned: Planned
    outcome: Outcome
    refusals: int
    kills: int


@dataclass(frozen=True)
class Books:
    """The server's own metrics: requests answered, those with INTERNAL, runs on the ranks or before them; seconds of
    all steps, and of denoising of the requests that ended well; turns that gave way; runs that survived their ranks."""

    answered: float
    internal: float
    unfinished: float
    step_s: float
    denoise_s: float
    preemptions: float
    resumes: float

    def __sub__(self, before: "Books") -> "Books":
        """What has come since; `unfinished` is of now."""
        names = [each.name for each in fields(self) if each.name != "unfinished"]
        return replace(self, **{name: getattr(self, name) - getattr(before, name) for name in names})


@dataclass
class Soak:
    """All that was seen. `wall_s`: from the first request to the end of the last; `recovery_s`: from each kill until
    the next step of any run; `books` and `samples` of our own server only."""

    ended: list[Ended] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    kills: int = 0
    recovery_s: list[float] = field(default_factory=list)
    wall_s: float = 0.0
    books: Books | None = None


def violations(soak: Soak, quiet: list[bytes]) -> Iterable[str]:
    """One sentence for each request that did not end as it may. `quiet`: the LATENTS of each kind, run alone."""
    for ended in soak.ended:
        planned, outcome = ended.planned, ended.outcome
        name = planned.action if planned.attack is None else f"attack: {planned.attack.name}"
        who = f"request {planned.number} ({name}, {ended.kills} kills)"
        allowed = ACTIONS[planned.action][1] if planned.attack is None else planned.attack.ends
        if outcome.code not in allowed:
            yield f"{who} ended with {outcome.code}: {outcome.text}"
        elif outcome.ends != 1 and not (outcome.ends == 0 and outcome.code == CANCELLED):
            yield f"{who} ended {outcome.ends} times"
        elif outcome.code == OK and outcome.latents != quiet[planned.kind]:
            yield f"{who} has other bits than when it ran alone"
    if soak.books is not None:
        yield from _unbalanced(soak.ended, soak.books)


def _unbalanced(ended: list[Ended], books: Books) -> Iterable[str]:
    """Where the server has counted other ends than the callers have seen. Who leaves may do so before the server has
    the request; what is sent to internal models is no request."""
    public = [each for each in ended if each.planned.attack is None or each.planned.attack.public]
    sent = sum(each.refusals + (each.outcome.code != REFUSED_BY_TRITON) for each in public)
    left = sum(each.outcome.code == CANCELLED for each in public)
    if not sent - left <= books.answered <= sent:
        yield f"the server counts {books.answered:g} ends for {sent} requests, {left} of which were left"
    if books.internal:
        yield f"the server counts {books.internal:g} requests with INTERNAL"
    if books.unfinished:
        yield f"{books.unfinished:g} runs are left on the server"


def summary(soak: Soak, wrong: list[str]) -> dict[str, Any]:
    """All figures, as JSON takes them. Memory: MiB per 100 requests over the second half, and whether that is flat."""
    counts: dict[str, Counter[str]] = {action: Counter() for action in ACTIONS}
    for ended in soak.ended:
        counts[ended.planned.action][ended.outcome.code] += 1
    seconds = [ended.outcome.seconds for ended in soak.ended if ended.outcome.code == OK]
    up_s = soak.wall_s - sum(soak.recovery_s)
    requests = [sample.requests for sample in soak.samples]
    parts = {part: [getattr(sample, part) for sample in soak.samples] for part in ("server", "ranks", "shm")}
    return {
        "requests": len(soak.ended),
        "ends": {action: dict(codes) for action, codes in counts.items()},
        "queue_full": sum(ended.refusals for ended in soak.ended),
        "kills": soak.kills,
        "recovery_s": [round(second, 1) for second in soak.recovery_s],
        "wall_s": round(soak.wall_s, 1),
        "seconds_p50_p95_max": [round(float(np.quantile(seconds, q)), 2) for q in (0.5, 0.95, 1)] if seconds else [],
        "saturation": _saturation(soak.books, up_s),
        **({} if soak.books is None else {name: getattr(soak.books, name) for name in ("preemptions", "resumes")}),
        "mib_last": {part: round(values[-1] / MIB, 1) for part, values in parts.items() if values},
        "mib_per_100_requests": {part: round(slope(requests, values), 3) for part, values in parts.items() if values},
        "flat_below": round(flat_below_mib(), 3),
        "violations": wrong,
    }


def _saturation(books: Books | None, up_s: float) -> dict[str, float]:
    """Share of the time without recoveries that the ranks spent in steps of any request, and in denoising for requests
    that ended well (which includes what comes before their first step)."""
    if books is None:
        return {}
    return {"steps": round(books.step_s / up_s, 3), "denoise": round(books.denoise_s / up_s, 3)}


def flat_below_mib() -> float:
    """MiB per 100 requests: what it comes to if one request in ten leaves its picture behind, and nothing else."""
    image = good_requests()[0]["IMAGE"]
    assert isinstance(image, bytes)
    return len(image) / 10 * 100 / MIB


def growing(figures: Mapping[str, Any]) -> Iterable[str]:
    """Memory that is not flat. That of the ranks, which are started anew, is shown and not judged."""
    for part in ("server", "shm"):
        rate = figures["mib_per_100_requests"].get(part, 0.0)
        if rate >= figures["flat_below"]:
            yield f"memory ({part}) grows by {rate} MiB per 100 requests, must be below {figures['flat_below']}"


def table(figures: Mapping[str, Any]) -> str:
    """For people."""
    lines = [f"{'action':<20} ends"]
    for action, codes in figures["ends"].items():
        lines.append(f"{action:<20} " + ", ".join(f"{code} {count}" for code, count in sorted(codes.items())))
    apart = ("ends", "violations", "honest")
    lines += [f"{name:<20} {value}" for name, value in figures.items() if name not in apart]
    for group, told in figures.get("honest", {}).items():
        lines.append(f"{f'honest, {group}':<20} " + ", ".join(f"{name} {value}" for name, value in told.items()))
    lines += [f"VIOLATED: {sentence}" for sentence in figures["violations"]] or ["nothing was violated"]
    return "\n".join(lines)
