"""The camera movements that the model was trained to follow; it reads them as Chinese phrases in the prompt."""

from collections.abc import Mapping
from types import MappingProxyType

NONE = "none"
MOVEMENTS: Mapping[str, str] = MappingProxyType(
    {
        "fixed": "固定镜头",
        "pan-up": "镜头上移",
        "pan-down": "镜头下移",
        "pan-left": "镜头左移",
        "pan-right": "镜头右移",
        "tilt-up": "镜头上摇",
        "tilt-down": "镜头下摇",
        "tilt-left": "镜头左摇",
        "tilt-right": "镜头右摇",
        "zoom-in": "镜头放大",
        "zoom-out": "镜头缩小",
        "dolly-in": "镜头推进",
        "dolly-out": "镜头拉远",
        "rotate": "镜头旋转",
        "tracking": "镜头跟随",
        "orbit": "镜头环绕",
        "rack-focus": "焦点转移",
    }
)

_CHINESE_PUNCTUATION = "，。！？；：、…"
_ASCII_PUNCTUATION = ",.!?;:"


def with_camera(prompt: str, movement: str) -> str:
    """`prompt` with the phrase of `movement`, a key of MOVEMENTS or NONE, as its last clause."""
    if movement == NONE:
        return prompt
    text = prompt.rstrip()
    if not text or text[-1] in _CHINESE_PUNCTUATION:
        separator = ""
    elif text[-1] in _ASCII_PUNCTUATION:
        separator = " "
    else:
        separator = "，"
    return f"{text}{separator}{MOVEMENTS[movement]}。"
