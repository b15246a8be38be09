"""Graphs of a checkpoint or an engine directory as runners on the configured backend, for one rank or whole."""

import os
from collections.abc import Collection
from dataclasses import asdict, replace
from pathlib import Path

import torch

from stepvideo_serve.assembly.checkpoint import Checkpoint
from stepvideo_serve.assembly.graphs import (
    DTYPES,
    components,
    core_component,
    llm_part_components,
    part_components,
    sharded_graph_names,
)
from stepvideo_serve.assembly.layer_weights import LayerWeights
from stepvideo_serve.assembly.on_gpus import beside_graphs, stage_device
from stepvideo_serve.config import LINKS_VARIABLE, ServeConfig
from stepvideo_serve.engine.cores import usable_cores
from stepvideo_serve.engine.manifest import Manifest, Reads
from stepvideo_serve.engine.ort import OrtRunner
from stepvideo_serve.engine.parity import is_of_several
from stepvideo_serve.engine.runner import EagerRunner, EngineRunner
from stepvideo_serve.errors import ConfigError, EngineError
from stepvideo_serve.parallel.collectives import Collectives
from stepvideo_serve.parallel.layout import Layout, part_folder
from stepvideo_serve.text.segments import LayeredStepLLM, ShardedStepLLM, llm_graph_names, llm_layer_names
from stepvideo_serve.weights.cuts import WHOLE, TensorPart
from stepvideo_serve.weights.known_digests import KnownDigests
from stepvideo_serve.weights.weight_set import WeightSet


def load_runners(
    config: ServeConfig,
    names: Collection[str],
    threads: int,
    part: str = "",
    share: int = 1,
    tensor_part: TensorPart = WHOLE,
    stage: str = "",
) -> dict[str, EngineRunner]:
    """The named graphs on the configured backend. Raises ConfigError or EngineError when the engine directory does not
    fit, or there is no such GPU.

    threads  CPU threads of an operator; 0 = the cores that this process may use, divided by `share`
    part     the folder in the engine directory that holds them: that of a tensor-parallel rank
    tensor_part  the slice of the weights that graphs with weights as inputs get
    stage        the model that runs them, a key of placement.SECTIONS, whose GPU serve.toml may name; "": a rank
    """
    model, device = config.model, stage_device(config, stage)
    if model.backend == "eager":
        torch.set_num_threads(threads or max(usable_cores() // share, 1))
        torch.backends.cudnn.allow_tf32 = False  # torch's default on GPUs: convolutions with ten bits of mantissa
        table = components(Checkpoint(model.dir), model.precision)
        return {name: EagerRunner(table[name].spec, table[name].load(), device) for name in names}
    directory = model.engines_dir / part
    local = replace(config, model=replace(model, engines_dir=directory))
    manifest = open_manifest(local)
    if "step_llm" in names and "step_llm" not in manifest.graphs and manifest.takes_weights:
        return _in_layers(config, names, threads, share, stage)
    weight_set = WeightSet.load(model.weight_set[0], model.manifests) if model.weight_set else None
    digests = _known_digests()
    weights = LayerWeights(Checkpoint(model.dir, digests), tensor_part, weight_set)
    with weights.checked(manifest, names, digests):
        if model.backend == "ort":
            manifest.verify(directory, names)
            threads = threads or max(usable_cores() // share, 1)
            return _open_graphs(directory, manifest, names, threads, weights, digests.read)
        from stepvideo_serve.assembly.engines import KERNELS_FOLDER, load_engines  # for GPUs only

        kernels, beside = model.engines_dir / KERNELS_FOLDER, beside_graphs(config, stage)
        return load_engines(local, manifest, names, kernels, part, weights, digests.read, device, beside)


def _known_digests() -> KnownDigests:
    """In the launcher's folder, so that ranks that are started anew find what is known; none in other processes."""
    folder = os.environ.get(LINKS_VARIABLE)
    return KnownDigests(Path(folder, "digests") if folder else None)


def _in_layers(
    config: ServeConfig, names: Collection[str], threads: int, share: int, stage: str
) -> dict[str, EngineRunner]:
    """The named graphs, with Step-LLM as one graph after the other."""
    from stepvideo_serve.text.graphs import step_llm_spec  # imports transformers, which takes long

    llm_config = Checkpoint(config.model.dir).llm_config
    layers, dtype = llm_layer_names(llm_config.num_layers), str(compute_dtype(config)).removeprefix("torch.")
    names_now = [*(name for name in names if name != "step_llm"), *layers]
    runners = load_runners(config, names_now, threads, share=share, stage=stage)
    whole = LayeredStepLLM(step_llm_spec(llm_config, dtype), runners, llm_config.num_layers)
    return {name: whole if name == "step_llm" else runners[name] for name in names}


def _open_graphs(
    directory: Path, manifest: Manifest, names: Collection[str], threads: int, weights: LayerWeights, reads: Reads
) -> dict[str, EngineRunner]:
    """From the bytes that were compared with the manifest, not from the files, which may change; those of a graph that
    layers share are read once."""
    contents: dict[str, dict[str, bytes]] = {}
    runners: dict[str, EngineRunner] = {}
    for name in names:
        entry = manifest.graph(name)
        if entry.spec.weights and entry.file not in contents:
            contents[entry.file] = entry.read(directory, reads)
        content = contents[entry.file] if entry.spec.weights else entry.read(directory, reads)
        given, engine_id = weights.of(name, entry.spec), f"{name}@{entry.key[:12]}"
        spec = replace(entry.spec, name=name)
        runners[name] = OrtRunner(spec, directory / entry.file, threads, engine_id, content, given)
    return runners


def open_manifest(config: ServeConfig) -> Manifest:
    """The manifest of the engine directory, made for the configured checkpoint's dimensions, configurations
    and tokenizers, and the configured precision."""
    manifest = Manifest.load(config.model.engines_dir, config.model.manifests)
    manifest.require(precision=config.model.precision)
    checkpoint = Checkpoint(config.model.dir)
    expected = asdict(checkpoint.dit_config)
    if manifest.extra.get("dit_config") != expected:
        raise EngineError(
            f"{config.model.engines_dir} must hold graphs of the model in {config.model.dir} ({expected}), "
            f"found {manifest.extra.get('dit_config')}: export the graphs again."
        )
    settings = manifest.extra.get("settings", {})
    if other := [name for name, digest in checkpoint.settings.items() if settings.get(name) != digest]:
        raise EngineError(
            f"{config.model.engines_dir} must hold graphs of the model in {config.model.dir}, found those of another "
            f"{' and '.join(other)}: restore these files of the model, or export the graphs again."
        )
    return manifest


def served_checkpoint(config: ServeConfig) -> str:
    """The identity of all weights that are served, by the graphs' manifest. Where graphs take their weights as inputs
    and serve several checkpoints, the files say which: they are hashed, once for all processes of a server."""
    manifest = open_manifest(config)
    if is_of_several(manifest):
        return Checkpoint(config.model.dir, _known_digests()).identity
    return manifest.checkpoint


def latent_channels(config: ServeConfig) -> int:
    """Channels of the latents that the configured model works on."""
    return Checkpoint(config.model.dir).dit_config.in_channels


def compute_dtype(config: ServeConfig) -> torch.dtype:
    """The dtype of activations between graphs; FP8 graphs take and give bf16."""
    dtype: torch.dtype = getattr(torch, DTYPES.get(config.model.precision, "bfloat16"))
    return dtype


def load_sharded_runners(config: ServeConfig, layout: Layout, tp_index: int) -> dict[str, EngineRunner]:
    """The graphs of the ranks with this tensor-parallel index. Raises ConfigError, EngineError or CheckpointError."""
    checkpoint = Checkpoint(config.model.dir)
    dit_config = checkpoint.dit_config
    layout.check(dit_config.num_heads)
    common, own = sharded_graph_names(dit_config, layout.tp, layout.sp)
    threads, model = config.denoiser.threads, config.model
    if not own:
        return load_runners(config, common, threads, share=layout.world_size)
    if model.backend != "eager" and open_manifest(config).takes_weights:
        tensor_part = TensorPart(tp_index, layout.tp)
        return load_runners(config, [*common, *own], threads, share=layout.world_size, tensor_part=tensor_part)
    if model.backend != "eager":
        part = part_folder(layout, tp_index)
        share = layout.world_size
        whole = load_runners(config, common, threads, share=share)
        return {**whole, **load_runners(config, own, threads, part, share)}
    table = components(checkpoint, model.precision)
    table |= part_components(checkpoint, model.precision, TensorPart(tp_index, layout.tp), sequence=layout.sp > 1)
    core = core_component(model.precision, dit_config.num_heads // (layout.tp * layout.sp))
    table[core.name] = core
    return {name: EagerRunner(table[name].spec, table[name].load(), model.device) for name in (*common, *own)}


def build_sharded_llm(
    config: ServeConfig, layout: Layout, ranks: Collectives
) -> tuple[ShardedStepLLM, dict[str, EngineRunner]]:
    """This rank's slice of Step-LLM, and its graphs. Raises ConfigError when the layout does not cut it."""
    checkpoint = Checkpoint(config.model.dir)
    llm_config = checkpoint.llm_config
    layout.check(checkpoint.dit_config.num_heads, llm_groups=llm_config.num_groups)
    if layout.tp == 1:
        raise ConfigError(f"[text] on_ranks needs a layout with tensor parallelism, got {layout}: set it to false.")
    names, model = llm_graph_names(llm_config.num_layers), config.model
    if model.backend == "eager":
        table = llm_part_components(checkpoint, model.precision, TensorPart(ranks.tp_index, layout.tp))
        graphs: dict[str, EngineRunner] = {
            name: EagerRunner(table[name].spec, table[name].load(), model.device) for name in names
        }
    elif open_manifest(config).takes_weights:
        own = TensorPart(ranks.tp_index, layout.tp)
        graphs = load_runners(config, names, config.denoiser.threads, share=layout.world_size, tensor_part=own)
    else:
        part = part_folder(layout, ranks.tp_index)
        graphs = load_runners(config, names, config.denoiser.threads, part, layout.world_size)
    return ShardedStepLLM(graphs, llm_config, ranks), graphs
