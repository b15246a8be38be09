"""The folder of clips that `stepvideo batch` writes and the other commands read.

videos/<name>.mp4     <name> is what VBench looks for, `<prompt>-<index>`, or `<id>-<index>` where that is no name
latents/<name>.npy    float32 [latent frames, C, h, w], where latents were asked for
results.jsonl         a Clip per line, in the order in which they were finished
names.json            id -> prompt, of the entries whose clips VBench cannot find by name
batch.json            what the clips were asked for with
"""

import fcntl
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from stepvideo_client.errors import InvalidInput

RESULTS = "results.jsonl"
NAMES = "names.json"
BATCH = "batch.json"
VIDEOS = "videos"
LATENTS = "latents"


@dataclass(frozen=True)
class Clip:
    """A finished clip: one line of results.jsonl.

    id, index: the entry of the set, and the clip's number among its own (0, 1, ...). video: its path in the folder.
    image: the first image as it was given. motion, seed, preset: MOTION_SCORE, SEED and QUALITY. request: every option
    that decides the result, by its name in `Client.generate`. report: the server's REPORT; over a gateway, which does
    not hand that out, `gateway` with the id and the times of the job. evaluations_mask: 1 for each step that was
    evaluated and 0 for each that was forecast (None: nobody tells). server: its url, or the gateway's.
    latents: path in the folder, or None. seconds: from sending to receiving. bytes: size of the video,
    None where nobody counted.
    """

    id: str
    index: int
    video: str
    image: str
    prompt: str
    motion: float
    seed: int
    preset: str
    request: Mapping[str, Any]
    report: Mapping[str, Any]
    evaluations_mask: Sequence[int] | None
    latents: str | None
    server: str
    seconds: float
    bytes: int | None = None

    @property
    def key(self) -> tuple[str, int]:
        """What a clip is known by in its folder."""
        return self.id, self.index

    @classmethod
    def parse(cls, line: str) -> "Clip":
        """Raises ValueError with the reason."""
        values = json.loads(line)
        known = [field.name for field in fields(cls)]
        needed = [field.name for field in fields(cls) if field.default is MISSING]
        if not isinstance(values, dict) or any(name not in values for name in needed):
            raise ValueError(f"expected an object with {', '.join(needed)}")
        return cls(**{name: values[name] for name in known if name in values})

    def line(self) -> str:
        """JSON without line breaks, and a line's end."""
        return json.dumps(asdict(self), ensure_ascii=False, sort_keys=True) + "\n"


def read_clips(folder: Path) -> dict[tuple[str, int], Clip]:
    """The clips of results.jsonl by (id, index), in the file's order; none where the file is absent. A last line that
    was cut off does not count, and of two lines for a clip the later does. Raises InvalidInput."""
    path = folder / RESULTS
    try:
        text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    except OSError as error:
        raise InvalidInput(f"{str(path)!r} cannot be read: {error.strerror}.") from error
    clips: dict[tuple[str, int], Clip] = {}
    for number, line in enumerate(text.split("\n")[:-1], 1):
        try:
            clip = Clip.parse(line)
        except ValueError as error:
            wrong = f"Line {number} of {str(path)!r} is no clip ({error}): mend the line, or remove it."
            raise InvalidInput(wrong) from error
        clips[clip.key] = clip
    return clips


def is_whole(folder: Path, clip: Clip) -> bool:
    """Whether the files of a clip are there, the video with all of its bytes."""
    video = folder / clip.video
    has_video = video.is_file() and clip.bytes in (None, video.stat().st_size)
    return has_video and (clip.latents is None or (folder / clip.latents).is_file())


def append(folder: Path, clip: Clip) -> None:
    """Adds a line, on disk when this returns. Other processes may do the same; what one of them left of a line when it
    was killed is cut away. Raises OSError."""
    with (folder / RESULTS).open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        _cut_torn_line(file.fileno())
        file.write(clip.line().encode())
        file.flush()
        os.fsync(file.fileno())


def _cut_torn_line(descriptor: int) -> None:
    """Cuts the file off behind its last line break."""
    end = size = os.fstat(descriptor).st_size
    while end > 0:
        start = max(end - 4096, 0)
        at = os.pread(descriptor, end - start, start).rfind(b"\n")
        if at >= 0:
            end = start + at + 1
            break
        end = start
    if end < size:
        os.ftruncate(descriptor, end)
