"""The nodes."""

import asyncio
import os
from typing import Any

from . import camera, report, request
from .address import DEFAULT_URL, KEY_VARIABLE, URL_VARIABLE, Address, address_of
from .errors import Interrupted
from .gateway import connected
from .host import AtNode, ComfyExtension, io, stopped, ui, video_of
from .job import make, unless_interrupted

CATEGORY = "Step-Video"
ServerType = io.Custom("STEPVIDEO_SERVER")


class StepVideoServer(io.ComfyNode):
    """URL and key -> where the other nodes send their requests."""

    @classmethod
    def define_schema(cls) -> Any:
        """A gateway's address."""
        return io.Schema(
            node_id="StepVideoServer",
            display_name="Step-Video server",
            category=CATEGORY,
            description="The gateway of a stepvideo-serve server.",
            inputs=[
                io.String.Input(
                    "url",
                    default="",
                    placeholder=DEFAULT_URL,
                    tooltip=f"The gateway's address. Empty: {URL_VARIABLE} of ComfyUI's environment, or {DEFAULT_URL}.",
                ),
                io.String.Input(
                    "api_key",
                    default="",
                    placeholder="none",
                    tooltip="The key of the gateway's API, where it asks for one. What stands here is saved with the "
                    f"workflow and in every saved video. Empty: {KEY_VARIABLE} of ComfyUI's environment, which is sent "
                    f"to the address in {URL_VARIABLE} only.",
                ),
                io.Float.Input(
                    "idle_timeout_s",
                    default=60.0,
                    min=5.0,
                    max=3600.0,
                    step=1.0,
                    tooltip="So long the gateway may give no sign of life, or have no server, before a node gives up.",
                ),
            ],
            outputs=[ServerType.Output(display_name="server")],
        )

    @classmethod
    def execute(cls, url: str, api_key: str, idle_timeout_s: float) -> Any:
        """The address."""
        return io.NodeOutput(address_of(url, api_key, idle_timeout_s, os.environ))


class StepVideoImageToVideo(io.ComfyNode):
    """Image and prompt -> the server's video."""

    @classmethod
    def define_schema(cls) -> Any:
        """All that a video is asked with."""
        return io.Schema(
            node_id="StepVideoImageToVideo",
            display_name="Step-Video image to video",
            category=CATEGORY,
            description="Makes a video that begins with the image. The same inputs give the same video, which is not "
            "computed twice.",
            inputs=[ServerType.Input("server"), *_content_inputs(), *_cost_inputs(), _seed_input()],
            outputs=[
                io.Video.Output(display_name="video", tooltip="The server's mp4, as it is."),
                io.Image.Output(display_name="frames"),
                io.String.Output(display_name="report"),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    async def execute(
        cls,
        server: Address,
        image: Any,
        prompt: str,
        negative_prompt: str,
        camera_movement: str,
        motion_score: float,
        seed: int,
        **cost: Any,
    ) -> Any:
        """The video, its frames, and what is to be said about both."""
        text = camera.with_camera(prompt, camera_movement)
        fields = request.video_fields(request.fields_of(**cost), text, negative_prompt, motion_score, seed)
        asked = request.Request(fields, await asyncio.to_thread(request.png_of, image))
        host = AtNode(cls.hidden.unique_id)
        try:
            async with connected(server) as gateway:
                made = await make(gateway, asked, host)
        except Interrupted:
            raise stopped() from None
        said = report.report_of(made.video, fields, server.url, made.repeated)
        host.say(said)
        video = video_of(made.mp4)
        parts = await asyncio.to_thread(video.get_components)
        return io.NodeOutput(video, parts.images, said)


class StepVideoQuote(io.ComfyNode):
    """What a video would take; asked anew with each run of the workflow."""

    @classmethod
    def define_schema(cls) -> Any:
        """What the cost of a video depends on."""
        return io.Schema(
            node_id="StepVideoQuote",
            display_name="Step-Video quote",
            category=CATEGORY,
            description="What a video of these settings would take, and how long it would wait. The server must have "
            "made a video before.",
            inputs=[ServerType.Input("server"), *_cost_inputs()],
            outputs=[
                io.Float.Output(display_name="seconds"),
                io.Float.Output(display_name="wait_s"),
                io.String.Output(display_name="quote"),
            ],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, **_: Any) -> float:
        """A new one that equals no other, since the queue changes; `math.nan` is always the same object."""
        return float("nan")

    @classmethod
    async def execute(cls, server: Address, **cost: Any) -> Any:
        """Seconds of work, seconds of waiting, and both as text, which the node shows."""
        fields = {**request.fields_of(**cost), "prompt": "quote"}
        try:
            async with connected(server) as gateway:
                asking = gateway.quote(fields, request.blank_png())
                quote = await unless_interrupted(asking, AtNode(None))
        except Interrupted:
            raise stopped() from None
        said = report.quote_of(quote)
        return io.NodeOutput(float(quote["seconds"]), float(quote["wait_s"]), said, ui=ui.PreviewText(said))


class StepVideoCamera(io.ComfyNode):
    """A prompt with a camera movement, as the model was trained to read it."""

    @classmethod
    def define_schema(cls) -> Any:
        """A prompt and a movement."""
        return io.Schema(
            node_id="StepVideoCamera",
            display_name="Step-Video camera movement",
            category=CATEGORY,
            description="Adds a camera movement to a prompt, in the words that the model was trained with.",
            inputs=[
                io.String.Input("prompt", multiline=True, default="", tooltip="What happens in the video."),
                io.Combo.Input("movement", options=[*camera.MOVEMENTS], default="fixed"),
            ],
            outputs=[io.String.Output(display_name="prompt_with_camera")],
        )

    @classmethod
    def execute(cls, prompt: str, movement: str) -> Any:
        """The longer prompt."""
        return io.NodeOutput(camera.with_camera(prompt, movement))


class StepVideo(ComfyExtension):
    """What the pack brings."""

    async def get_node_list(self) -> list[Any]:
        """The classes of the nodes."""
        return [StepVideoServer, StepVideoImageToVideo, StepVideoQuote, StepVideoCamera]


def _content_inputs() -> list[Any]:
    """What decides what is to be seen, but for the seed."""
    return [
        io.Image.Input("image", tooltip="The first frame; of a batch, the first picture."),
        io.String.Input("prompt", multiline=True, default="", tooltip="What happens, in Chinese or English."),
        io.String.Input(
            "negative_prompt",
            multiline=True,
            default="",
            placeholder="what must not be seen",
            tooltip="What the video must not show. Empty: the official text.",
        ),
        io.Combo.Input(
            "camera_movement",
            options=[camera.NONE, *camera.MOVEMENTS],
            default=camera.NONE,
            tooltip="Added to the prompt in the words that the model was trained with.",
        ),
        io.Float.Input(
            "motion_score",
            default=5.0,
            min=0.0,
            max=100.0,
            step=0.5,
            tooltip="How much moves: 2 stable, 5 general, 10 to 20 intense.",
        ),
    ]


def _cost_inputs() -> list[Any]:
    """What decides what a video costs: size, length, steps, guidance, quality, and whose turn it is."""
    grid, unit = request.PIXELS_PER_UNIT, request.FRAMES_PER_UNIT
    return [
        io.Int.Input("width", default=992, min=grid, max=8192, step=grid, tooltip="Pixels, in steps of 16."),
        io.Int.Input("height", default=544, min=grid, max=8192, step=grid, tooltip="Pixels, in steps of 16."),
        io.Int.Input(
            "num_frames", default=102, min=unit, max=100 * unit, step=unit, tooltip="In steps of 17; 25 a second."
        ),
        io.Int.Input("steps", default=50, min=1, max=1000, tooltip="Denoising steps."),
        io.Float.Input(
            "guidance",
            default=9.0,
            min=1.0,
            max=30.0,
            step=0.1,
            tooltip="How closely the prompt is followed; at 1 it is followed alone, at half the cost.",
        ),
        io.Float.Input(
            "shift", default=7.0, min=0.1, max=100.0, step=0.1, tooltip="Higher: more steps near the noise."
        ),
        io.Combo.Input(
            "quality",
            options=[*request.QUALITIES],
            default=request.DEFAULT_QUALITY,
            tooltip="The preset: exact evaluates the model at every step, balanced and fast forecast some of them.",
        ),
        io.String.Input(
            "other_preset",
            default="",
            placeholder="as above",
            tooltip="A preset that the server has under another name; it goes before quality.",
        ),
        io.Combo.Input("priority", options=[*request.PRIORITIES], default="normal", tooltip="Whose turn comes first."),
    ]


def _seed_input() -> Any:
    return io.Int.Input(
        "seed",
        default=0,
        min=0,
        max=request.MAX_SEED,
        control_after_generate=True,
        tooltip="Decides everything random: the same seed and inputs give the same video.",
    )
