"""The folder that a batch writes: begun once, gone on with by the same arguments only, never by two at a time."""

import fcntl
import json
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Final, Self

from stepvideo_client.errors import InvalidInput
from stepvideo_client.evaluation.plan import Shard
from stepvideo_client.evaluation.results import BATCH, LATENTS, NAMES, VIDEOS

FORMAT: Final = "stepvideo-client batch"
VERSION: Final = 1
_PARTIAL: Final = ".partial"
_SPAN: Final = 1 << 40  # bytes of batch.json that are locked; a lock may lie beyond the file's end


@dataclass
class BatchFolder:
    """A context: while it is entered, no other process writes the clips of this shard there."""

    path: Path
    shard: Shard
    _lock: BinaryIO | None = field(default=None, init=False)

    def stored(self) -> dict[str, Any] | None:
        """What batch.json says, None where there is none yet. Raises InvalidInput for a folder of something else."""
        if not self.path.exists():
            return None
        if not self.path.is_dir():
            raise InvalidInput(f"--out must be a folder, and {str(self.path)!r} is a file.")
        if not (self.path / BATCH).exists():
            if any(name != _PARTIAL for name in os.listdir(self.path)):
                raise InvalidInput(f"--out {str(self.path)!r} holds other files and no {BATCH}: name a new folder.")
            return None
        try:
            values = json.loads((self.path / BATCH).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InvalidInput(f"{str(self.path / BATCH)!r} cannot be read: {error}.") from error
        if not isinstance(values, dict) or (values.get("format"), values.get("version")) != (FORMAT, VERSION):
            raise InvalidInput(f"{str(self.path / BATCH)!r} must say {FORMAT!r}, version {VERSION}, and does not.")
        return values

    def begin(self, about: Mapping[str, Any], unfit: Mapping[str, str]) -> None:
        """Makes the folder, or goes on with one that was begun with the same `about`. unfit: names.json. Raises
        InvalidInput for other arguments, and where another process writes there."""
        if self.stored() is None:
            self.path.mkdir(parents=True, exist_ok=True)
            self._create(about)
        check_same(self.stored() or {}, about)
        self._hold()
        self._clear()
        for part in (VIDEOS, LATENTS) if about["settings"]["latents"] else (VIDEOS,):
            (self.path / part).mkdir(exist_ok=True)
        self.write(NAMES, lambda file: file.write((json.dumps(unfit, indent=2, ensure_ascii=False) + "\n").encode()))

    def write(self, name: str, write: Callable[[BinaryIO], object]) -> int:
        """A file of the folder, on disk and whole when its name appears. Returns its size in bytes. Raises OSError."""
        new = self._partial(name)
        try:
            size = _write(new, write)
            new.replace(self.path / name)
        finally:
            new.unlink(missing_ok=True)
        _sync((self.path / name).parent)
        return size

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock is not None:
            with suppress(OSError):  # unless another shard is at work
                fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB, _SPAN)
                (self.path / _PARTIAL).rmdir()
            self._lock.close()

    def _create(self, about: Mapping[str, Any]) -> None:
        """batch.json, unless another shard has made one meanwhile."""
        content = json.dumps({"format": FORMAT, "version": VERSION, **about}, indent=2, ensure_ascii=False) + "\n"
        new = self._partial(BATCH)
        _write(new, lambda file: file.write(content.encode()))
        with suppress(FileExistsError):
            os.link(new, self.path / BATCH)  # unlike a rename, never over one that is there
        new.unlink()

    def _partial(self, name: str) -> Path:
        """A short name: that of a clip may be as long as names can be."""
        mark = f"{self.shard.number}-of-{self.shard.count}"
        return self.path / _PARTIAL / f"{mark}.{os.getpid()}.{abs(hash(name)):x}"

    def _hold(self) -> None:
        """Each shard locks its part of the file. The system frees that when the process ends, and also when the process
        closes the file anywhere: nobody may open it from now on."""
        self._lock = (self.path / BATCH).open("r+b")
        start = (self.shard.number - 1) * _SPAN // self.shard.count
        length = self.shard.number * _SPAN // self.shard.count - start
        try:
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB, length, start)
        except OSError as error:
            raise InvalidInput(
                f"Another process makes these clips in {str(self.path)!r}: wait for its end, or give each its --shard."
            ) from error

    def _clear(self) -> None:
        """Removes what a killed process of this shard left."""
        for left in (self.path / _PARTIAL).glob(f"{self.shard.number}-of-{self.shard.count}.*"):
            left.unlink(missing_ok=True)


def check_same(stored: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    """Raises InvalidInput, which names what differs, unless a folder was begun with the same arguments."""
    known, asked = (_flat({name: values.get(name) for name in ("set", "settings")}) for values in (stored, about))
    other = [f"{name}: {known.get(name)} there, {asked.get(name)} here" for name in _differing(known, asked)]
    if other:
        raise InvalidInput(
            f"The folder was begun with other arguments ({'; '.join(other)}): repeat those, or name another --out."
        )


def _differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> Iterable[str]:
    return (name for name in sorted({*one, *other}) if one.get(name) != other.get(name))


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        f"{part} {name}": value
        for part, inner in values.items()
        for name, value in (inner or {}).items()
        if name != "input"  # the set may lie elsewhere today
    }


def _write(path: Path, write: Callable[[BinaryIO], object]) -> int:
    path.parent.mkdir(exist_ok=True)
    with path.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
        return file.tell()


def _sync(folder: Path) -> None:
    """The renames in it, on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
