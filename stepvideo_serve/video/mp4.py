"""Decoded video -> uint8 frames -> mp4 bytes.

F = frames, H and W = height and width in pixels. Frames arrive in chunks, so a whole clip is never held here.
Source of the pixel rules, the crop, the filter, 25 fps and CRF 25: the official `VideoProcessor` (CRF 25 is what its
writer uses by default). Unlike there, colours are converted by BT.709 and tagged, so that every player shows the same.
"""

import contextlib
import os
import subprocess
from collections.abc import Iterable
from types import TracebackType
from typing import Any, Final, Self

import imageio_ffmpeg
import numpy as np
import torch
from numpy.typing import NDArray

from stepvideo_serve.errors import StepVideoError

FPS: Final = 25
DEFAULT_CRF: Final = 25
DEFAULT_THREADS: Final = 4

# Model size -> the standard size that its centre is cropped to, (height, width).
_STANDARD_CROPS: Final = {(544, 992): (540, 960), (992, 544): (960, 540)}

_FILTERS: Final = (
    "scale=out_color_matrix=bt709:out_range=tv:flags=bicubic+accurate_rnd+full_chroma_int,"
    "format=yuv420p,atadenoise=0a=0.1:0b=0.1:1a=0.1:1b=0.1,"
    "setparams=colorspace=bt709:color_primaries=bt709:color_trc=bt709:range=tv"
)
_FINISH_TIMEOUT_S: Final = 300.0


def to_uint8(video: torch.Tensor) -> NDArray[np.uint8]:
    """Decoder output [F, 3, H, W], nominally in [-1, 1] -> uint8 [F, H, W, 3], (clamp(x) + 1) * 127.5 truncated.

    Raises StepVideoError for NaN or infinite values, which would otherwise become arbitrary colours.
    """
    if not torch.isfinite(video).all():
        raise StepVideoError(
            "The decoded video must be finite, got NaN or infinite values: check the engines with export.verify."
        )
    scaled = (video.to(torch.float32).clamp(-1, 1) + 1) * 127.5
    return scaled.to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()


def standard_size(height: int, width: int) -> tuple[int, int]:
    """Height and width that `crop_to_standard` leaves."""
    return _STANDARD_CROPS.get((height, width), (height, width))


def crop_to_standard(frames: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The centre 540x960 of 544x992 frames and 960x540 of 992x544; other sizes as they are. [F, H, W, 3], a view."""
    height, width = frames.shape[1:3]
    new_height, new_width = standard_size(height, width)
    top, left = (height - new_height) // 2, (width - new_width) // 2
    return frames[:, top : top + new_height, left : left + new_width]


def encode_mp4(chunks: Iterable[NDArray[np.uint8]], threads: int = DEFAULT_THREADS) -> bytes:
    """One mp4 of all the chunks, each uint8 [F, H, W, 3] of the same H and W. Errors as Mp4Encoder."""
    iterator = iter(chunks)
    first = next(iterator, None)
    if first is None:
        raise StepVideoError("A video must have at least one frame, got none: check that the decoder sent its chunks.")
    _check_chunk(first)
    with Mp4Encoder(first.shape[1], first.shape[2], threads=threads) as encoder:
        encoder.write(first)
        for chunk in iterator:
            encoder.write(chunk)
        return encoder.finish()


class Mp4Encoder:
    """H.264 (yuv420p, faststart) through ffmpeg: write() chunks inside a `with`, then finish() for the file's bytes.

    The same frames with the same number of threads give the same bytes. The file is written in memory: no disk can be
    full, and nothing is left of a process that is killed. Leaving the `with` early stops ffmpeg. Raises StepVideoError
    for frames of an odd or another size, or when ffmpeg fails.
    """

    def __init__(
        self, height: int, width: int, fps: int = FPS, crf: int = DEFAULT_CRF, threads: int = DEFAULT_THREADS
    ) -> None:
        """height and width in pixels, even; crf 0 (lossless) .. 51; threads: of the filter and of the encoder each."""
        if height < 2 or width < 2 or height % 2 or width % 2:
            raise StepVideoError(f"An mp4 needs an even height and width, got {height}x{width}: crop the frames first.")
        self._size = (height, width)
        self._options = {"fps": fps, "crf": crf, "threads": threads}

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as files:
            self._target, self._log = (os.memfd_create(f"stepvideo-{name}") for name in ("mp4", "ffmpeg-log"))
            files.callback(os.close, self._target)
            files.callback(os.close, self._log)
            try:
                # Unbuffered: nothing is left to flush when ffmpeg has died. Own session: Ctrl-C is for the server.
                self._process = subprocess.Popen(
                    self._command(),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.DEVNULL,
                    stderr=self._log,
                    bufsize=0,
                    start_new_session=True,
                    pass_fds=(self._target,),
                )
            except (OSError, RuntimeError) as error:
                raise StepVideoError(f"ffmpeg must be runnable, got {error}: reinstall imageio-ffmpeg.") from error
            self._files = files.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._process.stdin is not None:
                self._process.stdin.close()
            self._process.kill()  # of no effect when finish() has waited for its end
            self._process.wait()
        finally:
            self._files.close()

    def write(self, frames: NDArray[np.uint8]) -> None:
        """Append uint8 [F, H, W, 3]; blocks while ffmpeg is behind."""
        _check_chunk(frames)
        if frames.shape[1:3] != self._size:
            raise StepVideoError(
                f"All frames must be {self._size[0]}x{self._size[1]} as the first ones, "
                f"got {frames.shape[1]}x{frames.shape[2]}: decode all chunks at one size."
            )
        for frame in frames:
            self._feed(frame.tobytes())

    def finish(self) -> bytes:
        """Wait for ffmpeg and return the file."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            code = self._process.wait(timeout=_FINISH_TIMEOUT_S)
        except subprocess.TimeoutExpired as error:
            raise StepVideoError(
                f"ffmpeg must finish within {_FINISH_TIMEOUT_S:g} s of the last frame, it has not: check the load."
            ) from error
        if code != 0:
            raise self._failure(code)
        return _content(self._target)

    def _feed(self, pixels: bytes) -> None:
        if self._process.stdin is None or self._process.stdin.closed:
            raise StepVideoError("An mp4 takes frames before finish(), got some after it: start a new encoder.")
        descriptor = self._process.stdin.fileno()
        rest = memoryview(pixels)
        try:
            while rest:
                rest = rest[os.write(descriptor, rest) :]
        except BrokenPipeError as error:
            raise self._failure(self._process.wait()) from error

    def _failure(self, code: int) -> StepVideoError:
        lines = _content(self._log).decode(errors="replace").strip().splitlines()
        last = lines[-1] if lines else "no message"
        return StepVideoError(f"ffmpeg must end with code 0, got {code} ({last}): check the ffmpeg of imageio-ffmpeg.")

    def _command(self) -> list[str]:
        height, width = self._size
        fps, crf, threads = (str(self._options[name]) for name in ("fps", "crf", "threads"))
        source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", fps, "-i", "pipe:0"]
        codec = ["-c:v", "libx264", "-pix_fmt", "yuv420p", "-crf", crf, "-threads", threads]
        exact = ["-fflags", "+bitexact", "-flags:v", "+bitexact", "-map_metadata", "-1"]
        filters = ["-filter_threads", threads, "-vf", _FILTERS]
        quiet = ["-hide_banner", "-nostdin", "-loglevel", "error", "-y"]
        # By name, not as a pipe: ffmpeg opens the file twice to move the index to the front.
        target = ["-movflags", "+faststart", "-f", "mp4", f"/proc/self/fd/{self._target}"]
        ffmpeg = imageio_ffmpeg.get_ffmpeg_exe()
        return [ffmpeg, *quiet, *source, "-an", *filters, *codec, *exact, *target]


def _content(file: int) -> bytes:
    """All of a file in memory."""
    return os.pread(file, os.fstat(file).st_size, 0)


def _check_chunk(frames: NDArray[Any]) -> None:
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3:
        raise StepVideoError(
            f"Frames must be uint8 [F, H, W, 3], got {frames.dtype} {list(frames.shape)}: convert them with to_uint8."
        )
