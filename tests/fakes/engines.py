"""Engine directories for the stub: what `make engines` leaves behind, with engines that name their ONNX graph."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from stepvideo_kernels.compile.binaries import Binary, Slot, slots_of
from stepvideo_kernels.vae_attention import spec as vae_attention
from stepvideo_serve.engine.manifest import KEY, EngineTarget, GraphEntry, GraphFile, Manifest
from stepvideo_serve.engine.spec import EngineSpec
from stepvideo_serve.fused.kernels_package import LOOKED_UP
from stepvideo_serve.parallel.layout import Layout, part_folder
from tests.fakes.tensorrt import MAGIC, VERSION

SM = 90
ACTIVATION_BYTES, WEIGHT_BYTES = 4000, 1 << 20


def write_engine(
    path: Path,
    onnx: Path,
    spec: EngineSpec,
    activation_bytes: int = ACTIVATION_BYTES,
    weight_bytes: int = WEIGHT_BYTES,
    version: str = VERSION,
) -> None:
    """An engine of `spec`, whose ranges are its profile, that computes the graph in `onnx`."""
    description = {
        "onnx": str(onnx.absolute()),
        "spec": spec.to_json(),
        "activation_bytes": activation_bytes,
        "weight_bytes": weight_bytes,
        "version": version,
    }
    path.write_bytes(MAGIC + json.dumps(description).encode())


def write_engines(
    onnx_dir: Path,
    out: Path,
    layout: str,
    sizes: Mapping[str, Mapping[str, int]] | None = None,
) -> None:
    """An engine of every graph in `onnx_dir` and in its folders of the ranks of `layout`. `sizes`: by engine,
    activation_bytes and weight_bytes where they are not the usual ones."""
    of_branch = Layout.parse(layout)
    parts = [] if layout == "single" else [part_folder(of_branch, index) for index in range(of_branch.tp)]
    for folder in ("", *parts):
        (out / folder).mkdir(parents=True, exist_ok=True)
        source = Manifest.load(onnx_dir / folder)
        target = EngineTarget("tensorrt", VERSION, SM, layout, folder)
        graphs = {
            name: engine_entry(out / folder, onnx_dir / folder / entry.file, entry, (sizes or {}).get(name, {}))
            for name, entry in source.graphs.items()
            if folder or _is_common(name, of_branch)
        }
        replace(source, graphs=graphs, extra={**source.extra, KEY: target.to_json()}).save(out / folder)


def _is_common(name: str, layout: Layout) -> bool:
    """Whether ranks of the layout find the graph in the root; the graphs of several layouts lie in one folder."""
    if name.startswith(("dit_block_", "dit_cross_")):
        return layout.tp == layout.sp == 1
    return layout.sp > 1 or not name.startswith("dit_core")


def engine_entry(
    folder: Path,
    onnx: Path,
    entry: GraphEntry,
    sizes: Mapping[str, int] | None = None,
    kernels: Sequence[Mapping[str, Any]] = (),
) -> GraphEntry:
    """Writes the engine of a graph, and says what the manifest has of it. `kernels`: those of its plugins."""
    name = entry.spec.name
    figures = {"activation_bytes": ACTIVATION_BYTES, "weight_bytes": WEIGHT_BYTES, **(sizes or {})}
    write_engine(folder / f"{name}.engine", onnx, entry.spec, figures["activation_bytes"], figures["weight_bytes"])
    extras = {**entry.extras, "plan": {**figures, "plugins": len(kernels)}, LOOKED_UP: list(kernels)}
    return GraphEntry((GraphFile.of(folder, f"{name}.engine"),), entry.key, entry.spec, extras)


def write_kernel(folder: Path, width: int) -> dict[str, Any]:
    """Machine code of the VAE's attention in fp16, as far as the launcher sees it; returns what names it."""
    folder.mkdir(parents=True, exist_ok=True)
    tile = vae_attention.tile("fp16", 89)  # one that takes pointers, which the fake driver reads
    parameters = (*((name, "*fp16") for name in ("q", "k", "v", "out")), ("tokens", "i32"), ("to_log2", "fp32"))
    slots = [slot for name, kind in parameters for slot in slots_of(name, kind)]
    code = b"\x7fELF"
    name = f"vae_attention.fp16.sm{SM}.{tile.label}"
    (folder / f"{name}.cubin").write_bytes(code)
    Binary(
        name=name,
        op="vae_attention",
        variant="fp16",
        sm=SM,
        chosen=True,
        entry="vae_attention_kernel",
        tile=asdict(tile),
        constexprs=vae_attention.constexprs(tile, width),
        parameters=parameters,
        slots=(*slots, Slot(8, 8), Slot(8, 8)),
        threads=128,
        num_ctas=1,
        shared_bytes=0,
        scratch_bytes=0,
        scratch_alignment=1,
        profile_scratch_bytes=0,
        programmatic_launch=False,
        cooperative=False,
        tensor_maps=(),
        key="",
        cubin_sha256=sha256(code).hexdigest(),
        compiler="none",
        report={},
    ).save(folder)
    return {"op": "vae_attention", "variant": "fp16", "constants": {"WIDTH": width}}
