"""Reading an mp4 back with ffmpeg itself."""

import re
import subprocess
import tempfile

import imageio_ffmpeg
import numpy as np
from numpy.typing import NDArray


def decode_mp4(data: bytes) -> tuple[NDArray[np.uint8], str]:
    """The frames uint8 [F, H, W, 3] and ffmpeg's description of the stream. (imageio's readers leave pipes open.)"""
    with tempfile.NamedTemporaryFile(suffix=".mp4") as file:
        file.write(data)
        file.flush()
        source = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-nostdin", "-i", file.name]
        run = subprocess.run([*source, "-f", "rawvideo", "-pix_fmt", "rgb24", "-"], capture_output=True, check=True)
    stream = next(line for line in run.stderr.decode().splitlines() if "Video:" in line)
    size = re.search(r" (\d+)x(\d+),", stream)
    assert size is not None
    pixels: NDArray[np.uint8] = np.frombuffer(run.stdout, np.uint8)
    return pixels.reshape(-1, int(size[2]), int(size[1]), 3), stream
