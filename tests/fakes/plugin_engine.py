"""Engines of one plugin layer each, with their kernels, in an engine directory of the stub."""

import json
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

from stepvideo_serve.assembly.engines import KERNELS_FOLDER
from stepvideo_serve.engine.manifest import KERNELS, GraphEntry, GraphFile, Manifest
from stepvideo_serve.engine.spec import Dim, EngineSpec, TensorSpec
from tests.fakes.engines import engine_entry
from tests.kernels import plugin_graphs

WIDTH = 96
NAME = "attention_node"
PART = "tp0of2"
KERNEL = {"op": "vae_attention", "variant": "fp16", "constants": {"WIDTH": WIDTH}}
_SHAPE = (1, "nodes", WIDTH)
SPEC = EngineSpec(
    NAME,
    tuple(TensorSpec(name, "float16", _SHAPE) for name in "qkv"),
    (TensorSpec("out_out", "float16", _SHAPE),),
    {"nodes": Dim(1, 64, 4096)},
)
_PASSED = {"output": "out_out", "error": 0.0, "allowed": 1e-3, "rms": 0.0}


def add_plugin_engine(folder: Path) -> None:
    """Adds the engine to the manifest of a folder of engines. Its kernels are for the caller to write."""
    onnx = plugin_graphs.write(folder / f"{NAME}.onnx", plugin_graphs.form_of("vae_attention"), "fp16")
    graph = GraphEntry((GraphFile.of(folder, onnx.name),), "k" * 64, SPEC, {"parity": [_PASSED]})
    manifest = Manifest.load(folder)
    entry = engine_entry(folder, onnx, graph, kernels=[KERNEL])
    replace(manifest, graphs={**manifest.graphs, NAME: entry}).save(folder)


def name_kernels(engines: Path, *parts: str) -> None:
    """Records the descriptions in the folder of the kernels by hash, in the manifests of the root and of its parts, as
    the builder does."""
    hashes = {path.name: sha256(path.read_bytes()).hexdigest() for path in (engines / KERNELS_FOLDER).glob("*.json")}
    for folder in (engines, *(engines / part for part in parts)):
        manifest = Manifest.load(folder)
        replace(manifest, extra={**manifest.extra, KERNELS: hashes}).save(folder)


def forget_kernels(folder: Path) -> None:
    """The manifest as it was written before kernels were recorded."""
    path = folder / "manifest.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    del data["graphs"][NAME]["extras"]["kernels"]
    path.write_text(json.dumps(data), encoding="utf-8")
