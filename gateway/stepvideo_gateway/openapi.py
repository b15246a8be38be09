"""What the OpenAPI document says of bodies and answers, with examples."""

from typing import Any, Final

from stepvideo_client import MOVEMENTS

PROPERTIES: Final[dict[str, dict[str, Any]]] = {
    "prompt": {"type": "string", "description": "What happens in the video.", "example": "A cat stretches."},
    "input_reference": {
        "description": "The first image: a file (PNG, JPEG, WebP), or a base64 data URL.",
        "example": "data:image/png;base64,...",
    },
    "size": {"type": "string", "description": "WIDTHxHEIGHT, multiples of 16.", "example": "992x544"},
    "seconds": {"type": "string", "description": "Becomes the nearest multiple of 17 frames.", "example": "4"},
    "num_frames": {"type": "integer", "description": "In place of seconds: a multiple of 17.", "example": 102},
    "fps": {"type": "integer", "enum": [25]},
    "seed": {"type": "integer", "minimum": 0, "maximum": 2**32 - 1, "example": 7},
    "num_inference_steps": {"type": "integer", "minimum": 1, "example": 50},
    "guidance_scale": {"type": "number", "minimum": 0, "example": 9},
    "flow_shift": {"type": "number", "minimum": 0, "example": 7},
    "motion_score": {"type": "number", "minimum": 0, "example": 5},
    "negative_prompt": {"type": "string", "example": "blurred"},
    "camera": {"type": "string", "description": "A movement that is added to the prompt.", "enum": list(MOVEMENTS)},
    "quality": {"type": "string", "description": "A preset of the server.", "example": "balanced"},
    "priority": {"type": "string", "enum": ["high", "normal", "low"]},
    "preview_format": {"type": "string", "description": "Events have previews.", "enum": ["jpeg", "webp"]},
    "model": {"type": "string", "example": "step-video-ti2v"},
}
VIDEO: Final[dict[str, Any]] = {
    "id": "video_0123456789abcdef0123456789abcdef",
    "object": "video",
    "created_at": 1796000000,
    "completed_at": None,
    "expires_at": None,
    "status": "in_progress",
    "progress": 40,
    "model": "step-video-ti2v",
    "prompt": "A cat stretches.",
    "seconds": "4.08",
    "size": "992x544",
    "remixed_from_video_id": None,
    "error": None,
    "seed": 7,
    "queue_position": None,
    "start_in_s": None,
    "step": 20,
    "total_steps": 50,
    "elapsed_s": 24.5,
    "settings": {"num_frames": 102, "size": "992x544", "num_inference_steps": 50, "guidance_scale": 9},
    "took_s": None,
    "warnings": [],
}
ERROR: Final = {
    "error": {
        "message": "size must have sides that are multiples of 16, got 100x64: 96x64 is the nearest.",
        "type": "invalid_request_error",
        "param": "size",
        "code": "invalid_value",
    }
}
DELETED: Final = {"id": VIDEO["id"], "object": "video.deleted", "deleted": True}
QUOTE: Final = {
    "object": "quote",
    "seconds": 61.2,
    "wait_s": 122.4,
    "jobs_waiting": 2,
    "servers": {"127.0.0.1:8001": {"seconds": 61.2, "wait_s": 61.2, "report": {}}},
}
EVENTS: Final = 'event: video.progress\ndata: {"id": "video_...", "status": "in_progress", "step": 20, ...}\n\n'


def answers(example: Any, kind: str = "application/json") -> dict[int | str, dict[str, Any]]:
    """The answers of a route that gives `example`, and the form of its errors. FastAPI leaves out what is null in an
    example: `required` names it."""
    error = {"description": "What is wrong, in one sentence", "content": {"application/json": {"example": ERROR}}}
    shown = {"example": example}
    if isinstance(example, dict):
        shown["schema"] = {"type": "object", "required": list(example)}
    return {200: {"description": "As asked", "content": {kind: shown}}, "4XX": error, "5XX": error}


def body(required: tuple[str, ...], left_out: tuple[str, ...] = (), multipart: bool = True) -> dict[str, Any]:
    """The body of a route that takes fields of a video, all but those `left_out`."""
    properties = {name: about for name, about in PROPERTIES.items() if name not in left_out}
    schema = {"type": "object", "required": list(required), "properties": properties}
    shown = [name for name, about in properties.items() if "example" in about and name != "num_frames"]
    example = {name: properties[name]["example"] for name in shown}
    content: dict[str, Any] = {"application/json": {"schema": schema, "example": example}}
    if multipart:
        file = {"type": "string", "format": "binary", "description": PROPERTIES["input_reference"]["description"]}
        form = {**schema, "properties": {**properties, "input_reference": file}}
        content["multipart/form-data"] = {"schema": form}
    return {"requestBody": {"required": True, "content": content}}
