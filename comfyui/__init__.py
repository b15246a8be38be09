"""Step-Video-TI2V in ComfyUI: a picture and a prompt in, the server's video out. The nodes speak HTTP to its gateway.

host      what the nodes need of ComfyUI; no other file but nodes.py knows that there is one
errors    what a node shows when there is no video
address   where the gateway is, and with which key
request   the inputs of a node -> a request, and the key by which its result is found again
camera    the camera movements, as phrases of a prompt
gateway   the gateway's HTTP interface
job       one video from its request to the mp4: followed, cancelled, given up
preview   the frames of a preview, and which of them is due
report    what a node says: where a job is, what came out, what it would take
nodes     the nodes

ComfyUI loads this folder under a name made of its path, so its files name each other relatively.
"""

from typing import Any


async def comfy_entrypoint() -> Any:
    """The extension with all nodes; ComfyUI asks for it once, when it starts."""
    from .nodes import StepVideo

    return StepVideo()
