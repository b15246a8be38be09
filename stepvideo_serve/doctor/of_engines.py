"""Graphs and engines against checkpoint, configuration and installed versions; their plugins and kernels."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from stepvideo_serve.assembly.checkpoint import Checkpoint
from stepvideo_serve.assembly.engines import KERNELS_FOLDER, check_engines
from stepvideo_serve.assembly.graphs import sharded_graph_names
from stepvideo_serve.assembly.runners import open_manifest
from stepvideo_serve.config import ServeConfig
from stepvideo_serve.doctor.case import Case
from stepvideo_serve.doctor.finding import Findings, fault, ok, unseen
from stepvideo_serve.engine.manifest import EngineTarget, Manifest, require_kernels_named
from stepvideo_serve.engine.nvinfer import PACKAGES, load_tensorrt
from stepvideo_serve.errors import CheckpointError, EngineError, SetupError
from stepvideo_serve.fused.kernels_package import require_kernels
from stepvideo_serve.parallel.layout import Layout, part_folder
from stepvideo_serve.text.segments import llm_graph_names


def engines(case: Case) -> Findings:
    """All that the processes of a server open: there, in full size, and made for this configuration."""
    config = case.config
    if config.model.backend == "eager":
        yield ok("None are needed: torch runs the networks.")
        return
    try:
        needed = needed_graphs(config)
        trt = load_tensorrt(config.model.backend) if config.model.backend in PACKAGES else None
        for part, names in needed.items():
            _check_folder(config, part, names, trt)
    except CheckpointError as error:
        yield unseen(f"They are compared with the checkpoint: {error}")
    except SetupError as error:
        yield fault(str(error), build_command(config))
    else:
        count = sum(map(len, needed.values()))
        gpu = "" if trt is None or torch.cuda.is_available() else "; for which kind of GPU was not compared"
        yield ok(f"{count} in {config.model.engines_dir} are of this checkpoint and configuration{gpu}.")


def kernels(case: Case) -> Findings:
    """The machine code that plugins look up, by the hashes in the manifest; and TensorRT's word on the plugins."""
    config = case.config
    if config.model.backend not in PACKAGES:
        yield ok(f"None are needed: {config.model.backend} has no plugins.")
        return
    folder = config.model.engines_dir / KERNELS_FOLDER
    try:
        found = manifests_with_plugins(config, needed_graphs(config))
        if not found:
            yield ok("None are needed: no engine has plugins.")
            return
        require_kernels("An engine with plugins")
        for part, (manifest, engine) in found.items():
            _check_kernels(folder, require_kernels_named(manifest, config.model.engines_dir / part, engine))
        _check_plugins(load_tensorrt(config.model.backend))
    except CheckpointError as error:
        yield unseen(f"The checkpoint says which engines are served: {error}")
    except SetupError as error:
        yield fault(str(error), f"make kernels, and copy build/kernels to {folder} (docs/engines.md)")
    else:
        yield ok(f"The kernels in {folder} are those of the engines, and TensorRT takes their plugins.")


def needed_graphs(config: ServeConfig) -> Mapping[str, list[str]]:
    """Folder in the engine directory ("": itself) -> names of the graphs there. Raises ConfigError, CheckpointError."""
    checkpoint, layout = Checkpoint(config.model.dir), Layout.parse(config.denoiser.layout)
    layout.check(checkpoint.dit_config.num_heads)
    common, own = sharded_graph_names(checkpoint.dit_config, layout.tp, layout.sp)
    in_slices = config.text.on_ranks
    whole = [*common, "vae_encoder", "vae_decoder", "hunyuan_clip", *([] if in_slices else ["step_llm"])]
    own = [*own, *(llm_graph_names(checkpoint.llm_config.num_layers) if in_slices else [])]
    return {"": whole, **({part_folder(layout, index): own for index in range(layout.tp)} if own else {})}


def manifests_with_plugins(config: ServeConfig, parts: Iterable[str]) -> dict[str, tuple[Manifest, str]]:
    """Folder -> its manifest, and the first engine there that has plugins. Raises EngineError."""
    found = {}
    for part in parts:
        manifest = Manifest.load(config.model.engines_dir / part, config.model.manifests)
        have = [name for name, entry in manifest.graphs.items() if entry.extras.get("plan", {}).get("plugins")]
        if have:
            found[part] = manifest, have[0]
    return found


def build_command(config: ServeConfig) -> str:
    """What makes the graphs or engines of a configuration."""
    model = config.model
    if model.backend == "ort":
        whole = f"python -m export.to_onnx --model-dir {model.dir} --out {model.engines_dir}"
        return f"{whole} --precision {model.precision} (make serve does so for the toy world)"
    split = " SPLIT_LLM=1" if config.text.on_ranks else ""
    return (
        f"make engines BACKEND={model.backend} MODEL_DIR={model.dir} OUT={model.engines_dir} "
        f"PRECISION={model.precision} LAYOUT={config.denoiser.layout}{split} (docs/engines.md)"
    )


def _check_folder(config: ServeConfig, part: str, names: list[str], trt: Any) -> None:
    """Raises EngineError, CheckpointError or ConfigError."""
    directory = config.model.engines_dir / part
    local = replace(config, model=replace(config.model, engines_dir=directory))
    manifest = open_manifest(local)
    if trt is None:
        manifest.verify(directory, names)
        return
    sm = 0
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability(0)
        sm = 10 * major + minor
    layout = str(Layout.parse(config.denoiser.layout).of_branch)
    check_engines(local, manifest, names, EngineTarget(config.model.backend, trt.__version__, sm, layout, part))


def _check_kernels(folder: Path, described: Mapping[str, str]) -> None:
    """Raises EngineError for a description or machine code that is absent or another one."""
    from stepvideo_kernels.compile.binaries import Binary

    for name, digest in described.items():
        Binary.load(folder / name, digest).read_cubin(folder)


def _check_plugins(trt: Any) -> None:
    """Raises EngineError where TensorRT refuses them."""
    from stepvideo_kernels.plugins.registration import register

    if not register(trt).creators:
        raise EngineError("TensorRT must take the plugins, it has none of them.")
