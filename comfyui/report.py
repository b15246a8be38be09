"""What a node says: where a job is, what came out, what a request would take."""

from collections.abc import Mapping
from typing import Any

# Fields of a request -> how a report calls them.
SETTINGS = {
    "num_inference_steps": "steps",
    "guidance_scale": "guidance",
    "flow_shift": "shift",
    "motion_score": "motion score",
    "quality": "quality",
}


def state_of(video: Mapping[str, Any], left_s: float | None = None) -> str:
    """Where a job is. `left_s`: the seconds that its steps still take, where that is known."""
    if video["status"] == "queued":
        place, soon = video.get("queue_position"), video.get("start_in_s")
        if place is None:
            return "Waits for a server"
        return f"Waits at place {place}" + ("" if soon is None else f", begins in about {span(soon)}")
    step, steps = video.get("step") or 0, video.get("total_steps") or 0
    if not step:
        return "Begins"
    if step >= steps:
        return f"All {steps} steps done, the frames are decoded"
    return f"Step {step} of {steps}" + ("" if left_s is None else f", about {span(left_s)} left")


def report_of(video: Mapping[str, Any], fields: Mapping[str, str], url: str, repeated: bool) -> str:
    """What came out, how it was asked for, and where it is."""
    settings = ", ".join(f"{name} {fields[field]}" for field, name in SETTINGS.items() if field in fields)
    took = "it was there already" if repeated else f"took {span(took_s(video))} with its wait"
    return "\n".join(
        (
            f"{video['size']}, {fields['num_frames']} frames, {video['seconds']} s, seed {video['seed']}",
            settings,
            f"{video['id']} at {url}, {took}",
        )
    )


def quote_of(quote: Mapping[str, Any]) -> str:
    """What a video would take."""
    waiting = quote.get("jobs_waiting") or 0
    others = "nobody waits" if not waiting else f"{waiting} wait"
    return f"{span(quote['seconds'])} of work, begins in about {span(quote['wait_s'])} ({others})"


def took_s(video: Mapping[str, Any]) -> float:
    """Seconds between a job's creation and its end."""
    return float(max((video.get("completed_at") or video["created_at"]) - video["created_at"], 0))


def span(seconds: float) -> str:
    """A time in the largest unit that leaves a whole number above one: 40 s, 12 min, 3 h."""
    for unit, length_s in (("h", 3600), ("min", 60)):
        if seconds >= 2 * length_s:
            return f"{round(seconds / length_s)} {unit}"
    return f"{max(round(seconds), 1)} s"
