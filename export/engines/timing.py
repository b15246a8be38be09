"""Where TensorRT keeps how long its tactics took: one file for a version and a kind of GPU, beside the engines.

Polygraphy's loaders read it before a build and add to it afterwards, under a lock, so that each build begins with what
all that ended before have timed. One that is cut off in the middle of writing costs no more than its contents: TensorRT
says that it does not use it, and the next build writes it anew.
"""

import re
from pathlib import Path

FOLDER = "timing"
SUFFIX = ".cache"


def timing_cache(out: Path, version: str, gpu: str) -> Path:
    """The file for a version of TensorRT and a kind of GPU such as "NVIDIA H100 80GB HBM3". Those of other versions,
    which nothing reads any more, are deleted; those of other GPUs stay."""
    folder = out / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    mine = f"tensorrt-{version}."
    for old in folder.iterdir():
        if not old.name.startswith(mine):
            old.unlink()
    kind = re.sub(r"[^A-Za-z0-9]+", "-", gpu).strip("-")
    return folder / f"{mine}{kind}{SUFFIX}"
