"""The inputs of the server's models: written by `make fields` from stepvideo_serve/request/fields.py.

What a caller does not give (or gives as None) is not sent, and the server decides: `Client.defaults` asks how.
"""

from dataclasses import dataclass
from typing import Final, Literal, TypedDict

import numpy as np
from numpy.typing import NDArray

Command = Literal["generate", "quote"]


@dataclass(frozen=True, kw_only=True)
class Input:
    """One input: its name and datatype on the wire, and how many dimensions it has; the commands that take it; on the
    command line its flag (none without), what stands for its value, the words to choose from, and its help."""

    name: str
    datatype: str
    dimensions: int
    commands: tuple[Command, ...]
    flag: str
    metavar: str
    choices: tuple[str, ...] = ()
    required: bool = False
    help: str


class Options(TypedDict, total=False):
    """Keyword arguments of Client.generate.

    negative_prompt: what the video must not show; not computed at a CFG_SCALE of 1 (the official text)
    positive_suffix: added to the prompt by the server (the official text)
    num_frames: length of the video in frames, a multiple of 17 (the server's default)
    height: height of the video in pixels, a multiple of 16 (the server's default)
    width: width of the video in pixels, a multiple of 16 (the server's default)
    steps: denoising steps (the server's default)
    cfg_scale: classifier-free guidance; at 1 the prompt alone is followed, at half the cost (the server's default)
    time_shift: shift of the schedule: the higher, the more of the steps are spent near the noise (the server's
        default)
    motion_score: how much moves: 2 stable, 5 general, 10 to 20 intense (the server's default)
    quality: which steps evaluate the model, while the others forecast: a preset of the server (exact: all do), or
        mask: and a digit per step, as REPORT gives it (exact)
    seed: decides everything random, and is returned: same seed, same video (random)
    latents: float32 [latent frames, C, h, w], h = HEIGHT / 16, w = WIDTH / 16, within +-1000; the noise that
        denoising starts from, for exact reproduction; drawn from SEED, if not given
    encode_noise: float32 [1, C, h, w], h = HEIGHT / 16, w = WIDTH / 16, within +-1000; the noise of the encoded
        image, for exact reproduction; drawn from SEED, if not given
    output: what the result holds; the command line saves frames and latents as .npy (mp4)
    preview_every: a preview comes with every N-th step; 0: none. No effect in ti2v_unary (0)
    preview_format: what a preview is: jpeg, the first, the middle and the last latent frame side by side; webp, all
        of them as a small picture that moves (jpeg)
    timeout_s: the server gives up after S seconds: at once when the queue and the pace of the ranks do not allow
        them, else at a step
    priority: who goes first: 1 high, 2 normal, 3 low (2)
    request_id: a name of the caller's choosing; sent again with the same inputs, it gets the first one's run or
        result
    keep_s: so long a run with a REQUEST_ID goes on when nobody waits for it any more, and its result is kept; only
        ti2v_cancel ends it before (0)
    max_response_bytes: the largest message that the caller can receive; a larger result is refused, before the work
        where its size is known
    """

    negative_prompt: str | None
    positive_suffix: str | None
    num_frames: int | None
    height: int | None
    width: int | None
    steps: int | None
    cfg_scale: float | None
    time_shift: float | None
    motion_score: float | None
    quality: str | None
    seed: int | None
    latents: NDArray[np.float32] | None
    encode_noise: NDArray[np.float32] | None
    output: str | None
    preview_every: int | None
    preview_format: str | None
    timeout_s: float | None
    priority: int | None
    request_id: str | None
    keep_s: float | None
    max_response_bytes: int | None


class QuoteOptions(TypedDict, total=False):
    """Keyword arguments of Client.quote.

    num_frames: length of the video in frames, a multiple of 17 (the server's default)
    height: height of the video in pixels, a multiple of 16 (the server's default)
    width: width of the video in pixels, a multiple of 16 (the server's default)
    steps: denoising steps (the server's default)
    cfg_scale: classifier-free guidance; at 1 the prompt alone is followed, at half the cost (the server's default)
    time_shift: shift of the schedule: the higher, the more of the steps are spent near the noise (the server's
        default)
    quality: which steps evaluate the model, while the others forecast: a preset of the server (exact: all do), or
        mask: and a digit per step, as REPORT gives it (exact)
    output: what the result holds; the command line saves frames and latents as .npy (mp4)
    priority: who goes first: 1 high, 2 normal, 3 low (2)
    prompt_tokens: tokens of a prompt with its suffix that is new to the server (320)
    negative_tokens: tokens of a negative prompt that is new to the server; not given, it is the usual one
    """

    num_frames: int | None
    height: int | None
    width: int | None
    steps: int | None
    cfg_scale: float | None
    time_shift: float | None
    quality: str | None
    output: str | None
    priority: int | None
    prompt_tokens: int | None
    negative_tokens: int | None


INPUTS: Final[dict[str, Input]] = {
    "prompt": Input(
        name="PROMPT",
        datatype="BYTES",
        dimensions=1,
        commands=("generate",),
        flag="--prompt",
        metavar="TEXT",
        required=True,
        help="what happens in the video, in Chinese or English; with POSITIVE_SUFFIX at most 320 tokens",
    ),
    "image": Input(
        name="IMAGE",
        datatype="BYTES",
        dimensions=1,
        commands=("generate",),
        flag="--image",
        metavar="FILE",
        required=True,
        help=(
            "the first frame: the bytes of a PNG, JPEG or WebP file, not base64; at most 64 megapixels and 16:1; "
            "transparency is flattened onto white, the orientation applied, colours converted from the profile to"
            " sRGB; CMYK and animations are refused, other metadata is ignored"
        ),
    ),
    "negative_prompt": Input(
        name="NEGATIVE_PROMPT",
        datatype="BYTES",
        dimensions=1,
        commands=("generate",),
        flag="--negative-prompt",
        metavar="TEXT",
        help="what the video must not show; not computed at a CFG_SCALE of 1 (the official text)",
    ),
    "positive_suffix": Input(
        name="POSITIVE_SUFFIX",
        datatype="BYTES",
        dimensions=1,
        commands=("generate",),
        flag="--positive-suffix",
        metavar="TEXT",
        help="added to the prompt by the server (the official text)",
    ),
    "num_frames": Input(
        name="NUM_FRAMES",
        datatype="INT32",
        dimensions=1,
        commands=("generate", "quote"),
        flag="--num-frames",
        metavar="N",
        help="length of the video in frames, a multiple of 17 (the server's default)",
    ),
    "height": Input(
        name="HEIGHT",
        datatype="INT32",
        dimensions=1,
        commands=("generate", "quote"),
        flag="--height",
        metavar="PX",
        help="height of the video in pixels, a multiple of 16 (the server's default)",
    ),
    "width": Input(
        name="WIDTH",
        datatype="INT32",
        dimensions=1,
        commands=("generate", "quote"),
        flag="--width",
        metavar="PX",
        help="width of the video in pixels, a multiple of 16 (the server's default)",
    ),
    "steps": Input(
        name="STEPS",
        datatype="INT32",
        dimensions=1,
        commands=("generate", "quote"),
        flag="--infer-steps",
        metavar="N",
        help="denoising steps (the server's default)",
    ),
    "cfg_scale": Input(
        name="CFG_SCALE",
        datatype="FP32",
        dimensions=1,
        commands=("generate", "quote"),
        flag="--cfg-scale",
        metavar="X",
        help="classifier-free guidance; at 1 the prompt alone is followed, at half the cost (the server's default)",
    ),
    "time_shift": Input(
        name="TIME_SHIFT",
        datatype="FP32",
        dimensions=1,
        commands=("generate", "quote"),
        flag="--time-shift",
        metavar="X",
        help="shift of the schedule: the higher, the more of the steps are spent near the noise (the server's default)",
    ),
    "motion_score": Input(
        name="MOTION_SCORE",
        datatype="FP32",
        dimensions=1,
        commands=("generate",),
        flag="--motion-score",
        metavar="X",
        help="how much moves: 2 stable, 5 general, 10 to 20 intense (the server's default)",
    ),
    "quality": Input(
        name="QUALITY",
        datatype="BYTES",
        dimensions=1,
        commands=("generate", "quote"),
        flag="--quality",
        metavar="PRESET",
        help=(
            "which steps evaluate the model, while the others forecast: a preset of the server (exact: all do), "
            "or mask: and a digit per step, as REPORT gives it (exact)"
        ),
    ),
    "seed": Input(
        name="SEED",
        datatype="INT64",
        dimensions=1,
        commands=("generate",),
        flag="--seed",
        metavar="N",
        help="decides everything random, and is returned: same seed, same video (random)",
    ),
    "latents": Input(
        name="LATENTS",
        datatype="FP32",
        dimensions=4,
        commands=("generate",),
        flag="",
        metavar="N",
        help="the noise that denoising starts from, for exact reproduction; drawn from SEED, if not given",
    ),
    "encode_noise": Input(
        name="ENCODE_NOISE",
        datatype="FP32",
        dimensions=4,
        commands=("generate",),
        flag="",
        metavar="N",
        help="the noise of the encoded image, for exact reproduction; drawn from SEED, if not given",
    ),
    "output": Input(
        name="OUTPUT",
        datatype="BYTES",
        dimensions=1,
        commands=("generate", "quote"),
        flag="--output",
        metavar="N",
        choices=("mp4", "frames", "latents"),
        help="what the result holds; the command line saves frames and latents as .npy (mp4)",
    ),
    "preview_every": Input(
        name="PREVIEW_EVERY",
        datatype="INT32",
        dimensions=1,
        commands=("generate",),
        flag="--preview-every",
        metavar="N",
        help="a preview comes with every N-th step; 0: none. No effect in ti2v_unary (0)",
    ),
    "preview_format": Input(
        name="PREVIEW_FORMAT",
        datatype="BYTES",
        dimensions=1,
        commands=("generate",),
        flag="--preview-format",
        metavar="N",
        choices=("jpeg", "webp"),
        help=(
            "what a preview is: jpeg, the first, the middle and the last latent frame side by side; webp, all of "
            "them as a small picture that moves (jpeg)"
        ),
    ),
    "timeout_s": Input(
        name="TIMEOUT_S",
        datatype="FP32",
        dimensions=1,
        commands=("generate",),
        flag="--timeout",
        metavar="S",
        help=(
            "the server gives up after S seconds: at once when the queue and the pace of the ranks do not allow "
            "them, else at a step"
        ),
    ),
    "priority": Input(
        name="REQUEST_PRIORITY",
        datatype="INT32",
        dimensions=1,
        commands=("generate", "quote"),
        flag="--priority",
        metavar="N",
        help="who goes first: 1 high, 2 normal, 3 low (2)",
    ),
    "request_id": Input(
        name="REQUEST_ID",
        datatype="BYTES",
        dimensions=1,
        commands=("generate",),
        flag="--request-id",
        metavar="ID",
        help="a name of the caller's choosing; sent again with the same inputs, it gets the first one's run or result",
    ),
    "keep_s": Input(
        name="KEEP_S",
        datatype="FP32",
        dimensions=1,
        commands=("generate",),
        flag="--keep",
        metavar="S",
        help=(
            "so long a run with a REQUEST_ID goes on when nobody waits for it any more, and its result is kept; "
            "only ti2v_cancel ends it before (0)"
        ),
    ),
    "max_response_bytes": Input(
        name="MAX_RESPONSE_BYTES",
        datatype="INT64",
        dimensions=1,
        commands=("generate",),
        flag="--max-response-bytes",
        metavar="BYTES",
        help=(
            "the largest message that the caller can receive; a larger result is refused, before the work where "
            "its size is known"
        ),
    ),
    "prompt_tokens": Input(
        name="PROMPT_TOKENS",
        datatype="INT32",
        dimensions=1,
        commands=("quote",),
        flag="--prompt-tokens",
        metavar="N",
        help="tokens of a prompt with its suffix that is new to the server (320)",
    ),
    "negative_tokens": Input(
        name="NEGATIVE_TOKENS",
        datatype="INT32",
        dimensions=1,
        commands=("quote",),
        flag="--negative-tokens",
        metavar="N",
        help="tokens of a negative prompt that is new to the server; not given, it is the usual one",
    ),
}
