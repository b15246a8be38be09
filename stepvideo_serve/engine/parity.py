"""The parity reports that engines must have, and pass, before they serve."""

from collections.abc import Iterable, Mapping
from typing import Any

from stepvideo_serve.engine.manifest import LOOP, Manifest, split_layer
from stepvideo_serve.errors import EngineError

WEIGHTS = "weights"
"""Key in a row of the report of a graph that takes its weights as inputs: those that it was compared with. Key in the
report on a loop through such graphs: the same by graph."""


def loops_of(manifest: Manifest) -> list[Mapping[str, Any]]:
    """The reports on loops: none, one, or where graphs take their weights as inputs one for all weights together."""
    found = manifest.extra.get(LOOP, [])
    return list(found) if isinstance(found, list) else [found]


def is_of_several(manifest: Manifest) -> bool:
    """Whether graphs that take their weights as inputs were compared with those of several checkpoints or calibrations:
    then the manifest's own checkpoint is the last of them."""
    reports = [entry.extras.get("parity", ()) for entry in manifest.graphs.values() if entry.spec.weights]
    return any(len({row.get(WEIGHTS) for row in rows}) > 1 for rows in reports)


def require_parity(manifest: Manifest, names: Iterable[str], weights: Mapping[str, str] | None = None) -> None:
    """EngineError unless each graph has a parity report, and was within its limits in every row of it; or where the
    loop through all graphs was compared, with these weights, and failed. Slices of a layout have no loop of their own
    to compare. `weights`: by graph, which weights its report must be of, as far as that is known."""
    _require_loop(manifest, weights or {})
    for name in names:
        rows = _rows_of(manifest, name, (weights or {}).get(name))
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


def _require_loop(manifest: Manifest, weights: Mapping[str, str]) -> None:
    """Of loops whose weights are these as far as they are known, one must have passed: each process of a server knows
    those of its own part of the model."""
    found = [loop for loop in loops_of(manifest) if _is_with(loop, manifest, weights)]
    if found and not any(loop["passed"] for loop in found):
        loop = found[-1]
        raise EngineError(
            f"The engines must have a {loop['rule']} of at most {loop['allowed']:g}, their report has "
            f"{loop['value']:.3g}: keep more layers in bf16, and build them again."
        )


def _is_with(loop: Mapping[str, Any], manifest: Manifest, weights: Mapping[str, str]) -> bool:
    own = loop.get(WEIGHTS)
    if own is None:
        return True
    return bool(weights) and all(own.get(manifest.graph(name).spec.name) == found for name, found in weights.items())


def _rows_of(manifest: Manifest, name: str, weights: str | None) -> list[Mapping[str, Any]]:
    """The rows of a parity report for one layer and these weights. EngineError where all are for other weights."""
    layer = split_layer(name)[1]
    rows = [row for row in manifest.graph(name).extras.get("parity", ()) if row.get("layer", layer) == layer]
    found = [row for row in rows if weights is None or row.get(WEIGHTS, weights) == weights]
    if rows and not found:
        others = sorted({row[WEIGHTS] for row in rows})
        raise EngineError(
            f"Engine {name} must have a parity report for the weights {weights}, found one for {', '.join(others)}: "
            "they are of another checkpoint or calibration; export with these weights, and build the engine from that."
        )
    return found
