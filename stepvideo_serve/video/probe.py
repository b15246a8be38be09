"""mp4 bytes -> what a player would find in them: the file is decoded, every frame of it."""

import re
import subprocess
from dataclasses import dataclass
from fractions import Fraction
from typing import Final

import imageio_ffmpeg

from stepvideo_serve.errors import StepVideoError

DEFAULT_THREADS: Final = 4
TIMEOUT_S: Final = 300.0

# The text of ffmpeg's framecrc: headers, then a line per frame: stream, dts, pts, duration, bytes, checksum.
_TIME_BASE: Final = re.compile(r"^#tb 0: (\d+)/(\d+)$", re.MULTILINE)
_DIMENSIONS: Final = re.compile(r"^#dimensions 0: (\d+)x(\d+)$", re.MULTILINE)
_FRAME: Final = re.compile(r"^0, *-?\d+, *(-?\d+), *(\d+), *\d+, *0x[0-9a-f]+", re.MULTILINE)


@dataclass(frozen=True)
class Mp4Facts:
    """Frames that can be decoded, height and width in pixels, frames per second; `fps` is 0 for uneven times."""

    frames: int
    height: int
    width: int
    fps: float


def probe_mp4(data: bytes, threads: int = DEFAULT_THREADS) -> Mp4Facts:
    """Decodes the first video stream, from a pipe, as a browser would while it loads.

    threads: of the decoder. Raises StepVideoError when the file is damaged, has no video, or
    ffmpeg cannot be run.
    """
    strict = ["-xerror", "-err_detect", "explode", "-threads", str(threads)]
    output = ["-map", "0:v:0", "-fps_mode", "passthrough", "-f", "framecrc", "-"]
    quiet = ["-hide_banner", "-nostdin", "-loglevel", "error"]
    try:
        command = [imageio_ffmpeg.get_ffmpeg_exe(), *quiet, *strict, "-i", "pipe:0", *output]
        # Own session: Ctrl-C is for the server.
        run = subprocess.run(command, input=data, capture_output=True, timeout=TIMEOUT_S, start_new_session=True)
    except (OSError, RuntimeError) as error:
        raise StepVideoError(f"ffmpeg must be runnable, got {error}: reinstall imageio-ffmpeg.") from error
    except subprocess.TimeoutExpired as error:
        raise StepVideoError(f"The mp4 must be decoded within {TIMEOUT_S:g} s, it is not: check the load.") from error
    if run.returncode != 0:
        lines = run.stderr.decode(errors="replace").strip().splitlines()
        raise StepVideoError(
            f"The mp4 must decode without an error, got {lines[0] if lines else run.returncode!r} "
            f"from {len(data)} bytes: check the ffmpeg of imageio-ffmpeg and the disk."
        )
    return _facts(run.stdout.decode())


def _facts(text: str) -> Mp4Facts:
    base, size = _TIME_BASE.search(text), _DIMENSIONS.search(text)
    frames = [(int(pts), int(duration)) for pts, duration in _FRAME.findall(text)]
    if base is None or size is None or not frames:
        raise StepVideoError("The mp4 must hold frames, none were decoded: check the ffmpeg of imageio-ffmpeg.")
    duration = frames[0][1]
    even = duration > 0 and frames == [(index * duration, duration) for index in range(len(frames))]
    fps = Fraction(int(base[2]), int(base[1]) * duration) if even else Fraction(0)
    return Mp4Facts(len(frames), height=int(size[2]), width=int(size[1]), fps=float(fps))
