"""What was built, as a table for people (table.md) and for programs (table.json)."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from stepvideo_kernels.compile.binaries import Binary
from stepvideo_kernels.hardware import roofline
from stepvideo_kernels.kernel_spec import KernelBuild, Work

TABLE = "table.json"

_HEAD = """# Kernels built ahead of time

Registers, spills and instructions are read from the machine code. Blocks per multiprocessor and occupancy follow from
them and the architecture's limits. **Times are predictions, not measurements**: the least that a GPU's data-sheet peaks
allow at the full-size shape (memory, arithmetic or exponentials, whichever takes longest; the limit is in brackets).
A row in bold is the configuration that production uses; the others are candidates for `kernels/bench.py`.
Spills: instructions on local memory. Per program: FLOP and bytes to and from device memory.
"""
_COLUMNS = (
    "kernel",
    "SM",
    "tile",
    "registers",
    "spills",
    "shared KiB",
    "blocks/SM",
    "occupancy",
    "tensor-core instructions",
    "MFLOP/program",
    "KB/program",
    "shape",
    "least time (limit)",
)


def write_table(out: Path, built: Sequence[tuple[KernelBuild, Binary]]) -> None:
    """Writes both files; rows are in the order given."""
    rows = [_row(build, binary) for build, binary in built]
    (out / TABLE).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    (out / "table.md").write_text("\n".join([_HEAD, *_markdown(rows)]) + "\n", encoding="utf-8")


def _row(build: KernelBuild, binary: Binary) -> dict[str, Any]:
    return {
        "name": build.name,
        "op": build.op,
        "variant": build.variant,
        "sm": build.sm,
        "tile": build.tile.label,
        "chosen": build.chosen,
        "shared_bytes": binary.shared_bytes,
        **binary.report,
        "tile_work": asdict(build.tile_work),
        "full_work": asdict(build.full_work),
        "shape": build.shape,
        "roofline": [asdict(prediction) for prediction in roofline(build.full_work, build.sm)],
    }


def _markdown(rows: list[dict[str, Any]]) -> Iterator[str]:
    yield "| " + " | ".join(_COLUMNS) + " |"
    yield "|" + " --- |" * len(_COLUMNS)
    for row in rows:
        cells = [f"{row['op']}.{row['variant']}", str(row["sm"]), row["tile"], *_code_cells(row), *_work_cells(row)]
        yield (
            "| "
            + " | ".join(f"**{cell}**" if row["chosen"] and index < 3 else cell for index, cell in enumerate(cells))
            + " |"
        )


def _code_cells(row: dict[str, Any]) -> list[str]:
    families: dict[str, int] = {}
    for opcode, count in row["tensor_core"].items():
        family = opcode.split(".")[0] + (" E4M3" if "E4M3" in opcode else "")
        families[family] = families.get(family, 0) + count
    return [
        str(row["registers"]),
        str(row["spill_instructions"]),
        f"{row['shared_bytes'] / 1024:.1f}",
        str(row["blocks_per_sm"]),
        f"{row['occupancy']:.0%}",
        ", ".join(f"{count} {family}" for family, count in families.items()) or "none",
    ]


def _work_cells(row: dict[str, Any]) -> list[str]:
    tile = Work(**row["tile_work"])
    times = [f"{one['gpu']} {one['milliseconds']:.3g} ms ({one['limit']})" for one in row["roofline"]]
    return [f"{tile.flops / 1e6:.3g}", f"{tile.bytes / 1e3:.3g}", row["shape"], ", ".join(times)]
