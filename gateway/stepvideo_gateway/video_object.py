"""What the API shows of a job: OpenAI's video object, and what this server adds."""

from typing import Any, Final

from stepvideo_gateway.database import Job
from stepvideo_gateway.fields import as_fields, seconds_of
from stepvideo_gateway.jobs import COMPLETED, FAILED

POLL_LEAST_MS, POLL_MOST_MS = 500, 10_000
POLLS_PER_VIDEO: Final = 20


def video_object(job: Job) -> dict[str, Any]:
    """The four statuses only; progress 0 to 99 until the video is there."""
    done = 100 if job.status == COMPLETED else _percent(job)
    return {
        "id": job.id,
        "object": "video",
        "created_at": int(job.created_at),
        "completed_at": None if job.completed_at is None or job.status == FAILED else int(job.completed_at),
        "expires_at": None if job.expires_at is None else int(job.expires_at),
        "status": job.status,
        "progress": done,
        "model": job.model,
        "prompt": job.prompt,
        "seconds": seconds_of(job.options["num_frames"]),
        "size": f"{job.options['width']}x{job.options['height']}",
        "remixed_from_video_id": job.remixed_from,
        "error": None if job.status != FAILED else {"code": job.error_code, "message": job.error_message},
        "seed": job.seed if job.seed is not None else job.options.get("seed"),
        "queue_position": job.queue_position if job.status == "queued" else None,
        "start_in_s": job.start_in_s if job.status == "queued" else None,
        "step": job.step,
        "total_steps": job.total_steps,
        "elapsed_s": job.elapsed_s,
        "settings": as_fields(job.options),
        "took_s": (job.report or {}).get("seconds", {}).get("total"),
        "warnings": [warning["message"] for warning in (job.report or {}).get("warnings", ())],
    }


def listed(jobs: list[dict[str, Any]], has_more: bool) -> dict[str, Any]:
    """A page of video objects."""
    ends = (jobs[0]["id"], jobs[-1]["id"]) if jobs else (None, None)
    return {"object": "list", "data": jobs, "first_id": ends[0], "last_id": ends[1], "has_more": has_more}


def poll_after_ms(job: Job) -> int:
    """When asking again is worth it: a twentieth of the time that is left."""
    left_s = job.start_in_s or 0.0
    if job.step:
        left_s = job.elapsed_s / job.step * (job.total_steps - job.step)
    return round(min(max(left_s * 1000 / POLLS_PER_VIDEO, POLL_LEAST_MS), POLL_MOST_MS))


def _percent(job: Job) -> int:
    return min(99, 100 * job.step // job.total_steps) if job.total_steps else 0
