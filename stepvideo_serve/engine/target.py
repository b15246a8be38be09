"""What engines were built for, and whether that is what a server needs.

An engine runs only with the TensorRT version and on the architecture that it was built for, within the shapes of its
profile. All of that is compared before an engine is opened, so that a mismatch is one sentence instead of a crash.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stepvideo_serve.engine.manifest import GraphEntry, Manifest
from stepvideo_serve.errors import EngineError

KEY = "target"
GRAPH = "graph_key"
"""Key in `GraphEntry.extras` of an engine: the key of the graph that it was built from."""
LOOP = "loop_parity"
"""Key in `Manifest.extra` of the report on a short loop through all graphs (export/parity.py)."""


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


def require_parity(manifest: Manifest, names: Iterable[str]) -> None:
    """EngineError unless each graph has a parity report, and was within its limits in every row of it; or where the
    loop through all graphs was compared, and failed. Slices of a layout have no loop of their own to compare."""
    loop = manifest.extra.get(LOOP)
    if loop is not None and not loop["passed"]:
        raise EngineError(
            f"The engines must have a {loop['rule']} of at most {loop['allowed']:g}, their report has "
            f"{loop['value']:.3g}: keep more layers in bf16, and build them again."
        )
    for name in names:
        rows = manifest.graph(name).extras.get("parity")
        if not rows:
            raise EngineError(
                f"Engine {name} must have a parity report, found none: export its graph again with a comparison, "
                "and build the engine from that."
            )
        for row in rows:
            if not row["error"] <= row["allowed"]:
                raise EngineError(
                    f"Engine {name} must be within {row['allowed']:.1e} of the reference, its report has "
                    f"{row['error']:.1e} for {row.get('output', 'an output')}: do not serve it."
                )


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
