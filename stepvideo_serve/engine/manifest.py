"""manifest.json: what an engine directory holds, from which checkpoint, made by what.

The server refuses a directory that does not match, so that a stale or half-copied engine never answers a request.
An engine runs only with the TensorRT version and on the architecture that it was built for, within the shapes of its
profile. All of that is compared before an engine is opened, so that a mismatch is one sentence instead of a crash.
"""

import hashlib
import json
import os
import re
import secrets
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from mmap import mmap
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Protocol, TypeVar

from stepvideo_serve.engine.spec import EngineSpec
from stepvideo_serve.errors import EngineError

FILE_NAME = "manifest.json"
FORMAT_VERSION = 1
Content = TypeVar("Content", bytes, mmap)


class Reads(Protocol):
    """Gives what `read` makes of an open file, all of it, and the SHA-256 of that in hex, computed or remembered."""

    def __call__(self, file: BinaryIO, read: Callable[[], Content]) -> tuple[Content, str]: ...


def read_and_hash(file: BinaryIO, read: Callable[[], Content]) -> tuple[Content, str]:
    """Remembers nothing."""
    del file
    content = read()
    return content, hashlib.sha256(content).hexdigest()


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

    def read(self, graph: str, directory: Path, reads: Reads = read_and_hash) -> bytes:
        """The file's bytes, read once and compared: a copy that stays what it is, whatever becomes of the file.
        EngineError, with the name of the `graph`, for a file that is absent or another one."""
        file = directory / self.path
        try:
            with file.open("rb") as opened:
                content, digest = reads(opened, opened.read)
        except OSError as error:
            raise EngineError(f"Graph {graph}: {file} must be readable, {error.strerror}: export it again.") from error
        if digest != self.sha256:
            raise EngineError(_exchanged(graph, file, self.sha256, digest))
        return content


@dataclass(frozen=True)
class GraphEntry:
    """One graph of the directory.

    files   the first is the one to open, the others (external data) lie where the first expects them
    key     hash of everything that determined the graph (see content_key): equal keys need no rebuild
    spec    its signature
    extras  whatever the builder records about it, for instance its parity report, and under LAYERS the numbers of the
            layers that share it; JSON values
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

    def read(self, directory: Path, reads: Reads = read_and_hash) -> dict[str, bytes]:
        """The bytes of all files by their names in the folder of the first, the first first: compared with the hashes,
        and private, so that nobody changes them any more. EngineError for a file that is absent or another one."""
        folder = PurePosixPath(self.file).parent
        return {
            str(PurePosixPath(record.path).relative_to(folder)): record.read(self.spec.name, directory, reads)
            for record in self.files
        }


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
    def load(cls, directory: Path, accepted: Collection[str] = ()) -> "Manifest":
        """The manifest of `directory`; EngineError if it is missing, malformed or of another format version, or where
        `accepted` names manifests by the SHA-256 of their bytes, and not this one."""
        path = directory / FILE_NAME
        try:
            content = path.read_bytes()
            if accepted and (digest := hashlib.sha256(content).hexdigest()) not in accepted:
                raise EngineError(
                    f"{path} must be a manifest that [model] manifests names, found one with SHA-256 {digest}: restore "
                    "the file, or add its hash if the graphs were made anew."
                )
            data = json.loads(content.decode("utf-8"))
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
        temporary = path.with_name(f".{FILE_NAME}.{secrets.token_hex(8)}")
        try:
            with temporary.open("x", encoding="utf-8") as file:
                file.write(text + "\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def graph(self, name: str) -> GraphEntry:
        """The entry of one graph, or of the one that this layer shares with others ("dit_block_07" is layer 7 of
        "dit_block", or of a variant "dit_block.2"); EngineError if the directory has none."""
        kind, layer = split_layer(name)
        shared = (
            entry
            for graph, entry in self.graphs.items()
            if graph.partition(".")[0] == kind and layer in entry.extras.get(LAYERS, ())
        )
        found = self.graphs.get(name) or next(shared, None)
        if found is None:
            raise EngineError(f"The engine directory needs the graph {name}, found {sorted(self.graphs)}: export it.")
        return found

    @property
    def takes_weights(self) -> bool:
        """Whether weights are inputs of graphs here, and come from the checkpoint or a weight set."""
        return any(entry.spec.weights for entry in self.graphs.values())

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
                    raise EngineError(_exchanged(name, file, record.sha256, digest))


def split_layer(name: str) -> tuple[str, int | None]:
    """ "dit_block_07" -> ("dit_block", 7); "dit_embed" -> ("dit_embed", None)."""
    match = re.fullmatch(r"(.+)_(\d{2,})", name)
    return (match[1], int(match[2])) if match else (name, None)


def hash_file(path: Path) -> str:
    """SHA-256 of a file in hex, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_key(**parts: Any) -> str:
    """SHA-256 of JSON values by name, whatever their order: GraphEntry.key."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _exchanged(graph: str, file: Path, expected: str, found: str) -> str:
    return f"Graph {graph}: {file} must have SHA-256 {expected}, found {found}: export it again."


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


KEY = "target"
LAYERS = "layers"
"""Key in `GraphEntry.extras` of a graph with its weights as inputs: the layers that share it."""
GRAPH = "graph_key"
"""Key in `GraphEntry.extras` of an engine: the key of the graph that it was built from."""
LOOP = "loop_parity"
"""Key in `Manifest.extra` of the report on a short loop through all graphs (export/parity.py); where these take their
weights as inputs, of a list of them, one for all weights that were compared together (engine/parity.py)."""
KERNELS = "kernels"
"""Key in `Manifest.extra` of engines with plugins: file name -> SHA-256 of each kernel's description. A description has
the hash of its machine code, so that the manifest alone decides what code the plugins run."""


@dataclass(frozen=True)
class EngineTarget:
    """What all engines of a directory were built for.

    backend  "tensorrt" or "tensorrt_rtx"
    version  of that library
    sm       compute capability, such as 89 for 8.9
    layout   how ranks share the DiT ("single", "tp2", "tp2.sp2"); guidance branches (cfg) do not matter to engines
    part     the folder of a tensor-parallel rank's engines ("tp0of2"), empty for what all ranks share
    """

    backend: str
    version: str
    sm: int
    layout: str
    part: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, manifest: Manifest, directory: Path) -> "EngineTarget":
        """What the engines of a directory were built for. Raises EngineError where it holds none."""
        try:
            return cls(**manifest.extra[KEY])
        except (KeyError, TypeError) as error:
            raise EngineError(
                f"{directory} must hold TensorRT engines, its manifest names no target ({error}): build the engines "
                "(make engines), or correct [model] engines_dir."
            ) from None


def require_target(manifest: Manifest, directory: Path, expected: EngineTarget) -> None:
    """EngineError, saying what was expected and found, unless the engines were built for `expected`."""
    found = EngineTarget.of(manifest, directory)
    for what, wanted in expected.to_json().items():
        if (actual := getattr(found, what)) != wanted:
            raise EngineError(
                f"The engines in {directory} must be built for {what} {wanted!r}, found {actual!r}: "
                "build them again for this machine, or correct the configuration."
            )


def require_kernels_named(manifest: Manifest, directory: Path, engine: str) -> dict[str, str]:
    """What the manifest has under KERNELS. EngineError, with the name of an `engine` that needs them, for none."""
    found = manifest.extra.get(KERNELS)
    if not isinstance(found, dict) or not found or not all(isinstance(value, str) for value in found.values()):
        raise EngineError(
            f"The engine {engine} has plugins, and the manifest of {directory} must name their kernels by hash, found "
            "none: run export.build_engine again with --kernels build/kernels."
        )
    return found


def require_profile(entries: Mapping[str, GraphEntry], largest: Mapping[str, int]) -> None:
    """EngineError unless each engine takes the `largest` size that requests may ask of each symbolic dimension."""
    for name, entry in entries.items():
        for symbol, size in largest.items():
            dim = entry.spec.dims.get(symbol)
            if dim is not None and not dim.min <= size <= dim.max:
                raise EngineError(
                    f"Engine {name} must take {symbol} up to {size}, which [limits] allow, found a profile of "
                    f"{dim.min}..{dim.max}: build it for larger shapes, or lower the limits."
                )
