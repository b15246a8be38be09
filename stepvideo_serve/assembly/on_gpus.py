"""Where the processes of a configuration are on the GPUs, and what they hold there by the ledger of memory."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from stepvideo_serve.assembly.checkpoint import Checkpoint
from stepvideo_serve.assembly.engines import engine_bytes
from stepvideo_serve.config import ServeConfig
from stepvideo_serve.engine.manifest import Manifest
from stepvideo_serve.errors import ConfigError
from stepvideo_serve.memory.ledger import STAGE_REST_BYTES, Between, Graphs, Ledger, between_graphs, ledger
from stepvideo_serve.memory.placement import DECODER, ENCODER, SECTIONS, TEXT, Placement, gpu_of, rank_process
from stepvideo_serve.memory.sizes import VALUE_BYTES, Widths
from stepvideo_serve.parallel.layout import part_folder
from stepvideo_serve.text.states import CLIP_TOKENS, LLM_MAX_TOKENS

BESIDE: Mapping[str, tuple[str, ...]] = {
    TEXT: ("step_llm", "hunyuan_clip"),
    ENCODER: ("vae_encoder",),
    DECODER: ("vae_decoder",),
}
"""The models beside the ranks, and the graphs that each holds where there are such engines."""


def stage_device(config: ServeConfig, stage: str) -> torch.device:
    """Where the model of a stage computes (a key of placement.SECTIONS), or with "" a rank: on the current GPU unless
    serve.toml names one, or on the CPU. Raises ConfigError for a GPU that this machine does not have."""
    index = gpu_of(config, stage) if stage else None
    if index is None:
        return torch.device(config.model.device)
    if index >= torch.cuda.device_count():
        raise ConfigError(
            f"[{SECTIONS[stage]}] device must be one of the {torch.cuda.device_count()} GPUs that torch sees here, got "
            f'"cuda:{index}": see nvidia-smi and CUDA_VISIBLE_DEVICES.'
        )
    return torch.device("cuda", index)


def largest_between(config: ServeConfig) -> Between:
    """What a rank keeps beside its graphs for the largest request that [limits] allow. Raises CheckpointError."""
    dit, layout = Checkpoint(config.model.dir).dit_config, Placement.of(config).layout
    tokens, texts = config.limits.max_tokens // dit.patch_size**2, CLIP_TOKENS + LLM_MAX_TOKENS
    widths = Widths(dit.width, dit.width // dit.num_heads, dit.num_layers)
    return between_graphs(widths, layout, tokens, texts, value_bytes=VALUE_BYTES[config.model.precision])


def beside_graphs(config: ServeConfig, stage: str) -> int:
    """Bytes that the model of a stage, or with "" a rank, holds by the ledger once its graphs are loaded."""
    if stage:
        return STAGE_REST_BYTES
    return ledger(Placement.of(config), {}, largest_between(config)).of(rank_process(0)).after_graphs


def ledger_of_engines(config: ServeConfig, needed: Mapping[str, Sequence[str]]) -> Ledger:
    """By the manifests of the engines. needed: folder in the engine directory ("": itself) -> names of the engines in
    it. Raises CheckpointError, ConfigError, EngineError."""
    placement, own = Placement.of(config), dict(needed)
    whole = own.pop("")
    beside = {process: names for process, names in BESIDE.items() if process in placement.processes}
    graphs = {
        process: _held(config, "", [name for name in whole if name in names]) for process, names in beside.items()
    }
    others = {name for names in beside.values() for name in names}
    common = _held(config, "", [name for name in whole if name not in others])
    parts = {part: _held(config, part, names) for part, names in own.items()}
    for rank in range(placement.layout.world_size):
        part = part_folder(placement.layout, placement.layout.coordinates(rank).tp)
        graphs[rank_process(rank)] = common + parts.get(part, Graphs())
    return ledger(placement, graphs, largest_between(config))


def _held(config: ServeConfig, part: str, names: Sequence[str]) -> Graphs:
    """Of one process."""
    manifest = Manifest.load(config.model.engines_dir / Path(part))
    return engine_bytes({name: manifest.graph(name) for name in names})
