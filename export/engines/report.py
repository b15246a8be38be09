"""The summary of a build as text."""

import re
from pathlib import Path

from export.engines.engines import Report
from stepvideo_serve.engine.manifest import GraphEntry, Manifest

MIB, GIB = 2**20, 2**30
_NUMBERED = re.compile(r"(.+)_\d\d$")


def table(manifest: Manifest) -> str:
    """A row per engine of a directory: size, seconds and memory to build it, and what its plan holds."""
    columns = f"{'engine':<20} {'MiB':>8} {'seconds':>8} {'peak GiB':>9} {'activation GiB':>15}"
    rows = [f"{columns} {'GEMMs':>6} {'FP8':>4} {'FP4':>4} {'attention':>10}"]
    for name, entry in manifest.graphs.items():
        plan, extras = entry.extras["plan"], entry.extras
        rows.append(
            f"{name:<20} {_size(entry) / MIB:>8.1f} {extras['seconds']:>8.1f} {extras['peak_bytes'] / GIB:>9.2f} "
            f"{plan['activation_bytes'] / GIB:>15.3f} {plan['gemms']:>6} {plan['fp8_gemms']:>4} {plan['fp4_gemms']:>4} "
            f"{plan['fused_attentions']:>10}"
        )
    return "\n".join([*rows, *_totals(manifest)])


def outcome(report: Report, out: Path) -> str:
    """What was built, what was there, and every warning and failure."""
    lines = [f"{name}: warning: {sentence}" for name, found in report.warned.items() for sentence in found]
    lines += [f"{name}: {reason}" for name, reason in report.failed.items()]
    counts = f"{len(report.built)} built, {len(report.current)} up to date, {len(report.failed)} failed"
    return "\n".join([*lines, f"{counts}; engines in {out}"])


def _totals(manifest: Manifest) -> list[str]:
    """For engines of which there is one per layer: all layers together, computed from those that are there."""
    layers = manifest.extra.get("dit_config", {}).get("num_layers")
    groups: dict[str, list[GraphEntry]] = {}
    for name, entry in manifest.graphs.items():
        if match := _NUMBERED.match(name):
            groups.setdefault(match[1], []).append(entry)
    lines = []
    for kind, entries in groups.items():
        count = layers if kind.startswith("dit_") and layers else len(entries)
        scale = count / len(entries)
        size, seconds = sum(map(_size, entries)) * scale, sum(entry.extras["seconds"] for entry in entries) * scale
        peak = max(entry.extras["peak_bytes"] for entry in entries)
        activations = max(entry.extras["plan"]["activation_bytes"] for entry in entries)
        lines.append(
            f"{kind}, {len(entries)} of {count}: all {count} take {size / GIB:.2f} GiB and {seconds:.0f} s to build "
            f"with a peak of {peak / GIB:.2f} GiB; they share {activations / GIB:.2f} GiB of activations"
        )
    return lines


def _size(entry: GraphEntry) -> int:
    return entry.files[0].size_bytes
