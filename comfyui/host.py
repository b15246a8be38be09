"""What the nodes need of ComfyUI: V3 types, progress and text at a node, interrupts, videos.

The oldest ComfyUI that this was tried with is 0.3.64. Its API 0.0.2 is used where it is there, else the latest one.
"""

import io as bytes_io
from typing import Any

try:
    from comfy_api.v0_0_2 import ComfyAPI, ComfyExtension, io, ui
except ImportError:
    from comfy_api.latest import ComfyAPI, ComfyExtension, io, ui

__all__ = ["AtNode", "ComfyExtension", "io", "stopped", "ui", "video_of"]


class AtNode:
    """The node that is executing, in ComfyUI's page: the Host of its job."""

    def __init__(self, node_id: str | None) -> None:
        api = ComfyAPI()
        # ComfyUI 0.3.64 declares `execution`, and sets it in the synchronous form of the API alone.
        self._execution = api.execution if hasattr(api, "execution") else api.Execution()
        self._node_id, self._said = node_id, ""

    def interrupted(self) -> bool:
        """Whether the user has stopped the workflow; the flag stays, for other nodes that wait."""
        from comfy.model_management import processing_interrupted

        return bool(processing_interrupted())

    async def progress(self, value: float, most: float, picture: Any | None) -> None:
        """Moves the bar, and shows a picture in the node."""
        await self._execution.set_progress(value, most, preview_image=picture)

    def say(self, text: str) -> None:
        """Shows a text in the node, to whoever started the workflow."""
        from server import PromptServer

        if text != self._said and self._node_id is not None:
            self._said = text
            server = PromptServer.instance
            server.send_progress_text(text, self._node_id, sid=server.client_id)


def stopped() -> Exception:
    """What ComfyUI wants raised after an interrupt."""
    from comfy.model_management import InterruptProcessingException

    return InterruptProcessingException()  # type: ignore[no-any-return]


def video_of(mp4: bytes) -> Any:
    """ComfyUI's VIDEO of these very bytes."""
    from comfy_api.input_impl import VideoFromFile

    return VideoFromFile(bytes_io.BytesIO(mp4))
