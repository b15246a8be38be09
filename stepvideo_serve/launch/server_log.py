"""The server's log on its way to a file or to standard error: appended, reopened when the file is moved away, and read
for the reason of a failed start.

The server writes into a pipe, so that nothing it does depends on the file: a full disk loses lines, not requests.
"""

import contextlib
import os
import re
import stat
import sys
import threading
from pathlib import Path
from typing import BinaryIO

from stepvideo_serve.errors import SetupError

CHUNK_BYTES = 1 << 16
PRIVATE = 0o600  # what models and ranks log is their user's alone
LONGEST_LINE = 1 << 20
LAST_WORDS_S = 2.0  # for what is still in the pipe when the server has exited
LOADING = re.compile(r"\"loading: (\w+):\d+\"")
LOADED = re.compile(r"\"successfully loaded '(\w+)'")
DOCTOR = "python -m stepvideo_serve doctor"
FAILED = re.compile(r"failed to load '(\w+)' version \d+: [\w ]+: (.*)")
REFUSED = "Failed to initialize Python stub"  # said by a model's process, which then ends
OURS = "TritonModelException: "
SERVER_ERROR = re.compile(r"^(?:error: |E\d{4} \S+ \d+ \S+\] )(.+)$")
SECOND_HAND = re.compile(r"\brank \d+ exited\b")  # a clause about a process whose own words are in the log
OWN_WORDS = re.compile(r"^(\w*(?:Error|Exception)|stepvideo_serve\.errors\.\w+): (.+)$")  # the end of a traceback


class ServerLog:
    """Copies what is written to `write_end` into the file, or to standard error where `path` is None, on a thread of
    its own, until every process that has the pipe is gone. Raises SetupError for a file that cannot be opened."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.model_refused = False
        """Whether a model has said that it cannot be loaded: the server will end by itself."""
        self._file = None if path is None else _open(path)
        self._loading: list[str] = []
        self._failures: dict[str, str] = {}  # by model
        self._last_error = self._own_words = ""
        self._rest = b""
        read_end, self.write_end = os.pipe()
        self._thread = threading.Thread(target=self._copy, args=(read_end,), name="server-log", daemon=True)
        self._thread.start()

    def started(self) -> None:
        """The server has the pipe: this process lets go of its end."""
        if self.write_end >= 0:
            os.close(self.write_end)
            self.write_end = -1

    def close(self) -> None:
        """Once the server has ended: what it wrote is in the file."""
        self.started()
        self._thread.join(LAST_WORDS_S)

    def reason(self) -> str:
        """Why the server did not start, in a sentence: what a model said that could not be loaded, else Triton."""
        self._thread.join(LAST_WORDS_S)
        told = list(self._failures.items())
        for _, words in told:
            if words.startswith(OURS) and not SECOND_HAND.search(words):
                return words.removeprefix(OURS)
        if told:
            direct = next((entry for entry in told if not SECOND_HAND.search(entry[1])), None)
            model, words = direct or (told[0][0], self._own_words or told[0][1].removeprefix(OURS))
            said = words.removesuffix(".")
            return f"The model {model} must load, but {said}: put that right, or ask {DOCTOR}{self._where()}."
        if self._last_error:
            error = self._last_error.removesuffix(".")
            return f"Triton must start, but {error}: put that right, or ask {DOCTOR}{self._where()}."
        return f"Triton must start, but has ended without a reason: ask {DOCTOR}{self._where()}."

    def still_loading(self) -> str:
        """The models that have begun to load and are not done, and where to look."""
        names = ", ".join(self._loading) or "none"
        return f"{names} of its models still loading{self._where()}"

    def _where(self) -> str:
        return " (see the log above)" if self.path is None else f" (see {self.path})"

    def _copy(self, read_end: int) -> None:
        try:
            with os.fdopen(read_end, "rb", buffering=0) as pipe:
                while chunk := pipe.read(CHUNK_BYTES):
                    with contextlib.suppress(OSError):  # the server must not wait for a disk that is full
                        self._write(chunk)
                    *lines, rest = (self._rest + chunk).split(b"\n")
                    self._rest = rest[-LONGEST_LINE:]
                    for line in lines:
                        self._read(line.decode(errors="replace"))
        finally:
            if self._file is not None:
                self._file.close()

    def _write(self, chunk: bytes) -> None:
        if self._file is None or self.path is None:
            sys.stderr.buffer.write(chunk)
            sys.stderr.buffer.flush()
            return
        if _moved(self.path, self._file):
            with contextlib.suppress(SetupError):  # the old file will do
                fresh = _open(self.path)
                self._file.close()
                self._file = fresh
        self._file.write(chunk)

    def _read(self, line: str) -> None:
        if (found := LOADING.search(line)) is not None:
            self._loading.append(found[1])
        elif (found := LOADED.search(line)) is not None and found[1] in self._loading:
            self._loading.remove(found[1])
        elif (found := FAILED.search(line)) is not None:
            self._failures.setdefault(found[1], _first_line(found[2]))
        elif REFUSED in line:
            self.model_refused = True
        elif (found := OWN_WORDS.match(line)) is not None:
            self._own_words = found[2] if found[1].startswith("stepvideo_serve.") else found[0]
        elif (found := SERVER_ERROR.match(line)) is not None:
            self._last_error = _first_line(found[1])


def _first_line(words: str) -> str:
    """Triton quotes the whole; a line's end and a quotation mark in the text have a backslash before them."""
    line = words.strip().removeprefix('"').partition("\\n")[0]
    return line.removesuffix('"').replace('\\"', '"').rstrip()


def _open(path: Path) -> BinaryIO:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, PRIVATE)
        if stat.S_ISREG(os.fstat(fd).st_mode):  # the file may have been there, for all to read
            os.fchmod(fd, PRIVATE)
        return os.fdopen(fd, "ab", buffering=0)
    except OSError as error:
        raise SetupError(f"The log must be a file that can be written to, {path} is not: {error.strerror}.") from None


def _moved(path: Path, file: BinaryIO) -> bool:
    """Whether the file is not the one of that name any more."""
    try:
        there, ours = path.stat(), os.fstat(file.fileno())
    except FileNotFoundError:
        return True
    return (there.st_dev, there.st_ino) != (ours.st_dev, ours.st_ino)
