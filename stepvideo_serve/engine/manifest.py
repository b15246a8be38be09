"""manifest.json: what an engine directory holds, from which checkpoint, made by what.

The server refuses a directory that does not match, so that a stale or half-copied engine never answers a request.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from stepvideo_serve.engine.spec import EngineSpec
from stepvideo_serve.errors import EngineError

FILE_NAME = "manifest.json"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class GraphFile:
    """One file of a graph; `path` is relative to the engine directory, with forward slashes."""

    path: str
    size_bytes: int
    sha256: str

    def __post_init__(self) -> None:
        path = PurePosixPath(self.path)
        if not self.path or path.is_absolute() or ".." in path.parts:
            raise EngineError(f"A graph file must lie inside the engine directory, got {self.path!r}.")

    @classmethod
    def of(cls, directory: Path, path: str) -> "GraphFile":
        """The record of an existing file; reads all of it for the hash."""
        file = directory / path
        return cls(path, _size_bytes(file), hash_file(file))


@dataclass(frozen=True)
class GraphEntry:
    """One graph of the directory.

    files   the first is the one to open, the others (external data) lie where the first expects them
    key     hash of everything that determined the graph (see content_key): equal keys need no rebuild
    spec    its signature
    extras  whatever the builder records about it, for instance its parity report; JSON values
    """

    files: tuple[GraphFile, ...]
    key: str
    spec: EngineSpec
    extras: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.files:
            raise EngineError(f"Graph {self.spec.name} needs at least one file, got none.")

    @property
    def file(self) -> str:
        """The file to open, relative to the engine directory."""
        return self.files[0].path


@dataclass(frozen=True)
class Manifest:
    """The contents of an engine directory.

    checkpoint  identity of the weights that the graphs were made from
    precision   "fp32", "bf16", "fp16", "fp8" or "nvfp4"
    tools       versions of what made the graphs, by package
    graphs      by name
    extra       what serving needs besides the graphs (model configuration, preview projection); JSON values
    """

    checkpoint: str
    precision: str
    tools: Mapping[str, str]
    graphs: Mapping[str, GraphEntry]
    extra: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, directory: Path) -> "Manifest":
        """The manifest of `directory`; EngineError if it is missing, malformed or of another format version."""
        path = directory / FILE_NAME
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise EngineError(f"An engine directory needs {path}, {error.strerror}: export the graphs.") from error
        except ValueError as error:
            raise EngineError(f"{path} must be JSON in UTF-8, found: {error}; export the graphs again.") from error
        version = data.get("format_version") if isinstance(data, dict) else None
        if version != FORMAT_VERSION:
            raise EngineError(
                f"{path} must have format_version {FORMAT_VERSION}, found {version!r}: export the graphs again."
            )
        try:
            return _from_json(data)
        except (KeyError, TypeError, ValueError, AttributeError, EngineError) as error:
            raise EngineError(
                f"{path} must have the form of a manifest, found {type(error).__name__}: {error}; "
                "export the graphs again."
            ) from error

    def save(self, directory: Path) -> None:
        """Writes the manifest in one step: a reader sees the old file or the new one. The directory must exist."""
        try:
            text = json.dumps(_to_json(self), indent=1, ensure_ascii=False, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise EngineError(f"A manifest must hold finite JSON values only, got: {error}; convert them.") from error
        path = directory / FILE_NAME
        temporary = path.with_name(f".{FILE_NAME}.{os.getpid()}")
        try:
            with temporary.open("w", encoding="utf-8") as file:
                file.write(text + "\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def graph(self, name: str) -> GraphEntry:
        """The entry of one graph; EngineError if the directory has none of that name."""
        if name not in self.graphs:
            raise EngineError(f"The engine directory needs the graph {name}, found {sorted(self.graphs)}: export it.")
        return self.graphs[name]

    def require(self, *, precision: str, checkpoint: str | None = None) -> None:
        """EngineError unless the graphs have this precision and, if given, were made from this checkpoint."""
        for what, expected, found in (
            ("precision", precision, self.precision),
            ("checkpoint", checkpoint or self.checkpoint, self.checkpoint),
        ):
            if expected != found:
                raise EngineError(
                    f"The engine directory must have {what} {expected}, found {found}: export the graphs again, "
                    "or correct the configuration."
                )

    def verify(self, directory: Path, names: Iterable[str] | None = None, *, hashes: bool = False) -> None:
        """EngineError unless the files of the named graphs (all of them by default) are there in full size.

        `hashes` also reads every byte and compares the SHA-256.
        """
        for name in self.graphs if names is None else names:
            for record in self.graph(name).files:
                file = directory / record.path
                size = _size_bytes(file)
                if size != record.size_bytes:
                    raise EngineError(
                        f"Graph {name}: {file} must have {record.size_bytes} bytes, found {size}: export it again."
                    )
                if hashes and (digest := hash_file(file)) != record.sha256:
                    raise EngineError(
                        f"Graph {name}: {file} must have SHA-256 {record.sha256}, found {digest}: export it again."
                    )


def hash_file(path: Path) -> str:
    """SHA-256 of a file in hex, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_key(**parts: Any) -> str:
    """SHA-256 of JSON values by name, whatever their order: GraphEntry.key."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _size_bytes(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError as error:
        raise EngineError(f"The graph file {file} must exist, {error.strerror}: export it again.") from error


def _to_json(manifest: Manifest) -> dict[str, Any]:
    return {
        "format_version": FORMAT_VERSION,
        "checkpoint": manifest.checkpoint,
        "precision": manifest.precision,
        "tools": dict(manifest.tools),
        "graphs": {
            name: {
                "files": [vars(file) for file in entry.files],
                "key": entry.key,
                "spec": entry.spec.to_json(),
                "extras": dict(entry.extras),
            }
            for name, entry in manifest.graphs.items()
        },
        "extra": dict(manifest.extra),
    }


def _from_json(data: Mapping[str, Any]) -> Manifest:
    return Manifest(
        checkpoint=_typed(data, "checkpoint", str),
        precision=_typed(data, "precision", str),
        tools=_typed(data, "tools", dict),
        graphs={name: _entry_from_json(entry) for name, entry in _typed(data, "graphs", dict).items()},
        extra=_typed(data, "extra", dict),
    )


def _entry_from_json(data: Mapping[str, Any]) -> GraphEntry:
    return GraphEntry(
        files=tuple(
            GraphFile(_typed(file, "path", str), _typed(file, "size_bytes", int), _typed(file, "sha256", str))
            for file in data["files"]
        ),
        key=_typed(data, "key", str),
        spec=EngineSpec.from_json(_typed(data, "spec", dict)),
        extras=_typed(data, "extras", dict),
    )


def _typed(data: Mapping[str, Any], key: str, kind: type) -> Any:
    value = data[key]
    if type(value) is not kind:
        raise TypeError(f"{key} must be {kind.__name__}, not {type(value).__name__}")
    return value
