"""Previews on their way to the callers of a run: each has them as the file that it asked for."""

import threading
from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from stepvideo_serve.scheduling.idempotency import Answer
from stepvideo_serve.video.preview import encode_preview

Outputs = Mapping[str, NDArray[Any]]
Encode = Callable[[NDArray[np.uint8], str], bytes]

PREVIEW: Final = "PREVIEW"
"""On the way the latent frames as colours, uint8 [F, h, w, 3]; for the caller BYTES [1]."""


class PreviewFiles:
    """The files that were made of the last preview, so that callers who want the same share one. Any thread may ask."""

    def __init__(self, encode: Encode = encode_preview) -> None:
        self._encode, self._lock = encode, threading.Lock()
        self._frames: NDArray[np.uint8] | None = None
        self._made: dict[str, bytes] = {}

    def of(self, frames: NDArray[np.uint8], preview_format: str) -> bytes:
        """The file of uint8 [F, h, w, 3]."""
        with self._lock:
            if frames is not self._frames:
                self._frames, self._made = frames, {}
            if preview_format not in self._made:
                self._made[preview_format] = self._encode(frames, preview_format)
            return self._made[preview_format]


class PreviewAnswer:
    """The answer to one caller, who has previews as `shown` says (None: has none); all else goes through as it is."""

    def __init__(self, answer: Answer, shown: str | None, files: PreviewFiles) -> None:
        self._answer, self._shown, self._files = answer, shown, files
        self.finish, self.fail = answer.finish, answer.fail
        self.cancelled, self.dismiss_gone = answer.cancelled, answer.dismiss_gone

    def send(self, outputs: Outputs) -> None:
        """Sends progress, with its preview as a file."""
        sent = {name: value for name, value in outputs.items() if name != PREVIEW}
        if self._shown is not None and PREVIEW in outputs:
            sent[PREVIEW] = np.array([self._files.of(outputs[PREVIEW], self._shown)], np.object_)
        self._answer.send(sent)
