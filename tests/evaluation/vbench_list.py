"""A list as VBench-I2V's, with prompts that are hard to name files after."""

import json
from pathlib import Path

from tests.evaluation.conftest import write_picture

PROMPTS = [
    *(f"a plain prompt, number {number}" for number in range(14)),
    'a sign that says "stop"',
    "it's a cat's life",
    "quotes `of` “every” «kind»",
    "and/or",
    "/begins with a slash",
    "a \\ backslash and a : colon, a * star? <yes> | no",
    " spaces around ",
    "two  spaces, a\ttab",
    "-begins with a dash",
    ".hidden",
    "l" * 200,
    "长" * 84,  # 252 bytes: too long with its number and suffix
    "a very long prompt " * 15,
    "the same words",
    "the same words",
    "0017",  # the id of the entry with "and/or"
]
UNFIT = {17: "/", 18: "/", 25: "bytes", 26: "bytes", 27: "0028", 28: "0027", 29: "id of another"}
"""Number -> a word of the reason."""


def write_vbench(folder: Path, ratio: str = "8-5") -> Path:
    """vbench2_i2v_full_info.json in `folder`, and its pictures in data/crop/RATIO beside it. Returns its path."""
    entries = []
    for number, prompt in enumerate(PROMPTS):
        name = f"picture {number % 29}.jpg"
        entries.append({"prompt_en": prompt, "dimension": ["i2v_subject" if number % 2 else "i2v_background"]})
        entries[-1] |= {"image_type": "other", "image_name": name}
        write_picture(folder / "data" / "crop" / ratio / name, 40, 64, seed=number)
    path = folder / "vbench2_i2v_full_info.json"
    path.write_text(json.dumps(entries), encoding="utf-8")
    return path
