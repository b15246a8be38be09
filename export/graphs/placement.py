"""Which graphs an export makes, and which folder each goes to."""

from pathlib import Path

from stepvideo_serve.assembly.checkpoint import Checkpoint
from stepvideo_serve.assembly.graphs import (
    Component,
    components,
    core_component,
    llm_part_components,
    part_components,
    sharded_graph_names,
)
from stepvideo_serve.errors import ConfigError
from stepvideo_serve.parallel.layout import Layout, part_folder
from stepvideo_serve.weights.cuts import TensorPart


def export_plan(
    checkpoint: Checkpoint, out: Path, precision: str, layout: Layout, split_llm: bool
) -> dict[Path, dict[str, Component]]:
    """Which graphs go to which folder, `out` first."""
    config = checkpoint.dit_config
    layout.check(config.num_heads, llm_groups=checkpoint.llm_config.num_groups if split_llm else None)
    if split_llm and layout.tp == 1:
        raise ConfigError(
            f"--split-llm needs a layout with tensor parallelism, got {layout}: add tp2, or leave it out."
        )
    whole = components(checkpoint, precision)
    if layout.tp == layout.sp == 1:
        return {out: whole}
    common, _ = sharded_graph_names(config, layout.tp, layout.sp)
    shared = {name: part for name, part in whole.items() if not name.startswith("dit_") or name in common}
    if layout.sp > 1:
        core = core_component(precision, config.num_heads // (layout.tp * layout.sp))
        shared[core.name] = core
    parts = {
        out / part_folder(layout, index): part_components(
            checkpoint, precision, TensorPart(index, layout.tp), sequence=layout.sp > 1
        )
        for index in range(layout.tp)
    }
    if split_llm:
        del shared["step_llm"]
        for index, table in enumerate(parts.values()):
            table |= llm_part_components(checkpoint, precision, TensorPart(index, layout.tp))
    return {out: shared, **parts}
