"""FIELDS: every input of `ti2v`, `ti2v_unary` and `ti2v_quote`, one entry each.

From the table follow parsing and bounds, the settings that the ranks get, and, by `make fields`, the inputs of the
model repository, the client's options and the table in docs/requests.md. A new sampling input needs an entry here, an
attribute of the same name in GenerationRequest (parse.py), and the code in sampling/ or dit/ that uses its value.
"""

from typing import Final

from stepvideo_serve.geometry import FRAMES_PER_CHUNK, PIXELS_PER_LATENT
from stepvideo_serve.request.field import Default, Field, Need
from stepvideo_serve.request.presets import EXACT, MAX_MASK
from stepvideo_serve.request.rules import Choice, Identifier, ImageFile, Multiple, Noise, Quality, Range, Text

# The texts of the official script: the suffix joins the prompt, the negative prompt is the unconditional branch.
DEFAULT_POSITIVE_SUFFIX: Final = (
    "画面中的主体动作表现生动自然、画面流畅、生动细节、光线统一柔和、超真实动态捕捉、"
    "大师级运镜、整体不变形、超高清、画面稳定、逼真的细节、专业级构图、超细节、清晰。"
)
DEFAULT_NEGATIVE_PROMPT: Final = (
    "动画、模糊、变形、毁容、低质量、拼贴、粒状、标志、抽象、插图、计算机生成、扭曲、"
    "动作不流畅、面部有褶皱、表情僵硬、畸形手指"
)

PRIORITY_HIGH: Final = 1
PRIORITY_NORMAL: Final = 2
PRIORITY_LOW: Final = 3

OUTPUT_MP4: Final = "mp4"
OUTPUT_FRAMES: Final = "frames"
OUTPUT_LATENTS: Final = "latents"
OUTPUTS: Final = (OUTPUT_MP4, OUTPUT_FRAMES, OUTPUT_LATENTS)

PREVIEW_JPEG: Final = "jpeg"
PREVIEW_WEBP: Final = "webp"
PREVIEW_FORMATS: Final = (PREVIEW_JPEG, PREVIEW_WEBP)

MAX_SEED: Final = 2**32 - 1  # torch's CPU generator uses 32 bits: larger seeds would repeat videos
MAX_MESSAGE_BYTES: Final = 2**40  # more than any transport takes: as good as no bound
MIN_TEXT_TOKENS: Final = 2  # of any text: its beginning and its end
MAX_TEXT_TOKENS: Final = 320  # that Step-LLM takes

_OF_SEED: Final = "drawn from SEED, if not given"

FIELDS: Final[tuple[Field, ...]] = (
    Field(
        "PROMPT",
        "prompt",
        "BYTES",
        Default.REQUIRED,
        Text(lambda limits: limits.max_prompt_bytes),
        ("request", "client"),
        "what happens in the video, in Chinese or English; with POSITIVE_SUFFIX at most 320 tokens",
        metavar="TEXT",
    ),
    Field(
        "IMAGE",
        "image",
        "BYTES",
        Default.REQUIRED,
        ImageFile(lambda limits: limits.max_image_bytes),
        ("request", "client"),
        "the first frame: the bytes of a PNG, JPEG or WebP file, not base64; at most 64 megapixels and 16:1; "
        "transparency is flattened onto white, the orientation applied, colours converted from the profile to sRGB; "
        "CMYK and animations are refused, other metadata is ignored",
        metavar="FILE",
    ),
    Field(
        "NEGATIVE_PROMPT",
        "negative_prompt",
        "BYTES",
        DEFAULT_NEGATIVE_PROMPT,
        Text(lambda limits: limits.max_prompt_bytes),
        ("request", "client"),
        "what the video must not show; not computed at a CFG_SCALE of 1",
        metavar="TEXT",
    ),
    Field(
        "POSITIVE_SUFFIX",
        "positive_suffix",
        "BYTES",
        DEFAULT_POSITIVE_SUFFIX,
        Text(lambda limits: limits.max_prompt_bytes),
        ("request", "client"),
        "added to the prompt by the server",
        metavar="TEXT",
    ),
    Field(
        "NUM_FRAMES",
        "num_frames",
        "INT32",
        Default.CONFIGURED,
        Multiple(FRAMES_PER_CHUNK, lambda limits: limits.max_frames),
        ("request", "quote", "client"),
        "length of the video in frames",
    ),
    Field(
        "HEIGHT",
        "height",
        "INT32",
        Default.CONFIGURED,
        Multiple(PIXELS_PER_LATENT, lambda limits: limits.max_height),
        ("request", "quote", "client"),
        "height of the video in pixels",
        metavar="PX",
    ),
    Field(
        "WIDTH",
        "width",
        "INT32",
        Default.CONFIGURED,
        Multiple(PIXELS_PER_LATENT, lambda limits: limits.max_width),
        ("request", "quote", "client"),
        "width of the video in pixels",
        metavar="PX",
    ),
    Field(
        "STEPS",
        "steps",
        "INT32",
        Default.CONFIGURED,
        Range(lambda limits: (1, limits.max_steps)),
        ("request", "quote", "ranks", "client"),
        "denoising steps",
        flag="--infer-steps",
    ),
    Field(
        "CFG_SCALE",
        "cfg_scale",
        "FP32",
        Default.CONFIGURED,
        Range(lambda limits: limits.cfg_scale),
        ("request", "quote", "ranks", "client"),
        "classifier-free guidance; at 1 the prompt alone is followed, at half the cost",
        metavar="X",
    ),
    Field(
        "TIME_SHIFT",
        "time_shift",
        "FP32",
        Default.CONFIGURED,
        Range(lambda limits: limits.time_shift),
        ("request", "quote", "ranks", "client"),
        "shift of the schedule: the higher, the more of the steps are spent near the noise",
        metavar="X",
    ),
    Field(
        "MOTION_SCORE",
        "motion_score",
        "FP32",
        Default.CONFIGURED,
        Range(lambda limits: limits.motion_score),
        ("request", "ranks", "client"),
        "how much moves: 2 stable, 5 general, 10 to 20 intense",
        metavar="X",
    ),
    Field(
        "QUALITY",
        "quality",
        "BYTES",
        EXACT,
        Quality(lambda limits: min(limits.max_steps, MAX_MASK)),
        ("request", "quote", "ranks", "client"),
        "which steps evaluate the model, while the others forecast: a preset of the server (exact: all do), or mask: "
        "and a digit per step, as REPORT gives it",
        metavar="PRESET",
    ),
    Field(
        "SEED",
        "seed",
        "INT64",
        Default.RANDOM,
        Range(lambda _: (0, MAX_SEED), remedy="choose a value in that range, or leave it out for a random one"),
        ("request", "client"),
        "decides everything random, and is returned: same seed, same video",
    ),
    Field(
        "LATENTS",
        "latents",
        "FP32",
        None,
        Noise(first_only=False),
        ("request",),
        f"the noise that denoising starts from, for exact reproduction; {_OF_SEED}",
    ),
    Field(
        "ENCODE_NOISE",
        "encode_noise",
        "FP32",
        None,
        Noise(first_only=True),
        ("request",),
        f"the noise of the encoded image, for exact reproduction; {_OF_SEED}",
    ),
    Field(
        "OUTPUT",
        "output",
        "BYTES",
        OUTPUT_MP4,
        Choice(OUTPUTS),
        ("request", "quote", "client"),
        "what the result holds; the command line saves frames and latents as .npy",
    ),
    Field(
        "PREVIEW_EVERY",
        "preview_every",
        "INT32",
        0,
        Range(lambda limits: (0, limits.max_steps)),
        ("request", "ranks", "client"),
        "a preview comes with every N-th step; 0: none. No effect in ti2v_unary",
    ),
    Field(
        "PREVIEW_FORMAT",
        "preview_format",
        "BYTES",
        PREVIEW_JPEG,
        Choice(PREVIEW_FORMATS),
        ("request", "client"),
        "what a preview is: jpeg, the first, the middle and the last latent frame side by side; webp, all of them as a "
        "small picture that moves",
    ),
    Field(
        "TIMEOUT_S",
        "timeout_s",
        "FP32",
        None,
        Range(
            lambda limits: (0, limits.max_timeout_s),
            above_low=True,
            unit="seconds",
            remedy="choose a value in that range, or leave it out for no deadline",
        ),
        ("request", "client"),
        "the server gives up after S seconds: at once when the queue and the pace of the ranks do not allow them, else "
        "at a step",
        flag="--timeout",
        metavar="S",
    ),
    Field(
        "REQUEST_PRIORITY",
        "priority",
        "INT32",
        PRIORITY_NORMAL,
        Range(lambda _: (PRIORITY_HIGH, PRIORITY_LOW)),
        ("request", "quote", "client"),
        "who goes first: 1 high, 2 normal, 3 low",
    ),
    Field(
        "REQUEST_ID",
        "request_id",
        "BYTES",
        None,
        Identifier(most=128),
        ("request", "client"),
        "a name of the caller's choosing; sent again with the same inputs, it gets the first one's run or result",
        metavar="ID",
    ),
    Field(
        "KEEP_S",
        "keep_s",
        "FP32",
        0.0,
        Range(lambda limits: (0, limits.max_keep_s), unit="seconds"),
        ("request", "client"),
        "so long a run with a REQUEST_ID goes on when nobody waits for it any more, and its result is kept; only "
        "ti2v_cancel ends it before",
        flag="--keep",
        metavar="S",
    ),
    Field(
        "MAX_RESPONSE_BYTES",
        "max_response_bytes",
        "INT64",
        None,
        Range(
            lambda _: (1, MAX_MESSAGE_BYTES),
            unit="bytes",
            remedy="choose a value in that range, or leave it out for no bound",
        ),
        ("request", "client"),
        "the largest message that the caller can receive; a larger result is refused, before the work where its size "
        "is known",
        metavar="BYTES",
    ),
    Field(
        "PROMPT_TOKENS",
        "prompt_tokens",
        "INT32",
        MAX_TEXT_TOKENS,
        Range(lambda _: (MIN_TEXT_TOKENS, MAX_TEXT_TOKENS)),
        ("quote", "client"),
        "tokens of a prompt with its suffix that is new to the server",
    ),
    Field(
        "NEGATIVE_TOKENS",
        "negative_tokens",
        "INT32",
        None,
        Range(lambda _: (MIN_TEXT_TOKENS, MAX_TEXT_TOKENS)),
        ("quote", "client"),
        "tokens of a negative prompt that is new to the server; not given, it is the usual one",
    ),
)


def fields_for(need: Need) -> tuple[Field, ...]:
    """The fields that somebody needs, in the order of the table."""
    return tuple(field for field in FIELDS if need in field.needs)


INPUT_NAMES: Final = tuple(field.name for field in fields_for("request"))
