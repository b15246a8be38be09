"""What a generation would take on a server, told from what it has measured."""

import json
from dataclasses import dataclass
from typing import Any

from tritonclient.grpc import InferResult

from stepvideo_client.errors import MalformedResponse

QUOTE_MODEL = "ti2v_quote"


@dataclass(frozen=True)
class Quote:
    """seconds: of the generation itself; gpu_seconds: of all GPUs together; peak_memory_mib: of the fullest GPU,
    predicted; queue_wait_s: until it would begin, if it were sent now. report: the parts (text, vae_encode, denoise,
    vae_decode, mp4), seconds per step, tokens, layout, the server's defaults."""

    seconds: float
    gpu_seconds: float
    peak_memory_mib: float
    queue_wait_s: float
    report: dict[str, Any]


def read_quote(response: Any) -> Quote:
    """The quote in a ModelInferResponse. Raises MalformedResponse."""
    outputs = InferResult(response)
    try:
        seconds, gpu_seconds, memory, wait_s = (
            float(outputs.as_numpy(name)[0]) for name in ("SECONDS", "GPU_SECONDS", "PEAK_MEMORY_MIB", "QUEUE_WAIT_S")
        )
        return Quote(seconds, gpu_seconds, memory, wait_s, json.loads(outputs.as_numpy("REPORT")[0]))
    except (TypeError, ValueError, IndexError) as error:
        raise MalformedResponse(f"The quote cannot be read: {error}.") from error


def read_offer(response: Any) -> dict[str, Any]:
    """defaults, limits and presets in the answer to a probe, a ModelInferResponse. Raises MalformedResponse."""
    try:
        report = json.loads(InferResult(response).as_numpy("REPORT")[0])
        return {name: report[name] for name in ("defaults", "limits", "presets")}
    except (TypeError, ValueError, IndexError, KeyError) as error:
        raise MalformedResponse(f"What the server accepts cannot be read: {error!r}; is the server older?") from error


def read_defaults(response: Any) -> dict[str, Any]:
    """The defaults in the answer to a probe, a ModelInferResponse. Raises MalformedResponse."""
    try:
        report = json.loads(InferResult(response).as_numpy("REPORT")[0])
        return dict(report["defaults"])
    except (TypeError, ValueError, IndexError, KeyError) as error:
        raise MalformedResponse(f"The server's defaults cannot be read: {error!r}; is the server older?") from error
