"""An mp4 -> its frames, one at a time, through the ffmpeg of imageio-ffmpeg.

ffmpeg writes portable pixmaps, which say their own size, so nothing has to be known of the file beforehand.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Final

import imageio_ffmpeg
import numpy as np
from numpy.typing import NDArray

from stepvideo_client.errors import InvalidInput

LEAST_SIDE_PX: Final = 16  # of what the server makes; optical flow and SSIM need no more

Frame = NDArray[np.uint8]
"""[H, W, 3], RGB."""

_SPEAKER: Final = re.compile(r"^\[[^\]]*\] ")  # the part of ffmpeg that says something, with an address


def read_frames(path: Path) -> Iterator[Frame]:
    """The frames in order, each uint8 [H, W, 3] of the same size. The colours are converted as the file is tagged.

    ffmpeg ends with the iterator. Raises InvalidInput, in one sentence that names the file, for one that is absent,
    is no video, is cut off or damaged; what was whole before the damage has been yielded by then.
    """
    if not path.is_file():
        raise InvalidInput(f"The video {str(path)!r} must be a file, and is not there: make it again with batch.")
    count, size = 0, None
    with tempfile.TemporaryFile() as log:
        with _ffmpeg(path, log) as process:
            assert process.stdout is not None
            while (frame := _next_frame(process.stdout, path)) is not None:
                if size not in (None, frame.shape):
                    raise _damaged(path, "its frames change their size")
                count, size = count + 1, frame.shape
                yield frame
            code = process.wait()
        if code != 0 or count == 0:
            log.seek(0)
            lines = log.read().decode(errors="replace").strip().splitlines()
            raise _damaged(path, _SPEAKER.sub("", lines[0]) if lines else "it has no frames")


@contextmanager
def _ffmpeg(path: Path, log: IO[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """Decodes into its standard output; killed on the way out if it still runs."""
    strict = ["-xerror", "-err_detect", "explode", "-i", f"file:{path}", "-map", "0:v:0", "-fps_mode", "passthrough"]
    try:
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-nostdin", "-loglevel", "error", *strict]
        process = subprocess.Popen(
            [*command, "-f", "image2pipe", "-c:v", "ppm", "-"],
            stdout=subprocess.PIPE,
            stderr=log,
            start_new_session=True,  # Ctrl-C is for this program
        )
    except (OSError, RuntimeError) as error:
        raise InvalidInput(
            f"ffmpeg must be runnable, got {error}: install stepvideo-client[evaluation] anew."
        ) from error
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def _next_frame(pipe: IO[bytes], path: Path) -> Frame | None:
    """None at the end of the stream. A pixmap begins with "P6", its width and height, and 255, on three lines."""
    if not (kind := pipe.readline()):
        return None
    sides, most = pipe.readline().split(), pipe.readline()
    if kind != b"P6\n" or most != b"255\n" or len(sides) != 2:
        raise _damaged(path, "its frames are no pictures of 8 bits")
    width, height = (int(side) for side in sides)
    if min(width, height) < LEAST_SIDE_PX:
        raise _damaged(
            path, f"its frames are {width}x{height}, and must be at least {LEAST_SIDE_PX} pixels on each side"
        )
    pixels: NDArray[Any] = np.frombuffer(pipe.read(3 * width * height), np.uint8)
    if pixels.size != 3 * width * height:
        raise _damaged(path, "its last frame is cut off")
    return pixels.reshape(height, width, 3)


def _damaged(path: Path, why: str) -> InvalidInput:
    return InvalidInput(f"The video {str(path)!r} must decode without an error, got: {why[:200].rstrip('.')}.")
