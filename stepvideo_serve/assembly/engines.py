"""Engines of TensorRT as runners: everything about them is compared with the configuration before one is opened."""

import functools
import logging
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import torch

from stepvideo_serve.assembly.layer_weights import LayerWeights, weight_bytes
from stepvideo_serve.config import ServeConfig
from stepvideo_serve.engine.gpu_memory import free_memory
from stepvideo_serve.engine.manifest import (
    EngineTarget,
    GraphEntry,
    Manifest,
    Reads,
    read_and_hash,
    require_profile,
    require_target,
)
from stepvideo_serve.engine.nvinfer import ActivationMemory, LayerRunner, NvInferRunner, load_tensorrt, require_room
from stepvideo_serve.engine.parity import require_parity
from stepvideo_serve.engine.runner import EngineRunner
from stepvideo_serve.errors import ConfigError, EngineError
from stepvideo_serve.fused.kernels_package import register_plugins
from stepvideo_serve.geometry import PIXELS_PER_LATENT
from stepvideo_serve.memory.ledger import Graphs
from stepvideo_serve.parallel.layout import Layout

WHOLE_TOKENS = "dit_core"  # the graphs that see all tokens where a layout divides them
GIB = 1 << 30
NO_WEIGHTS: Mapping[str, torch.Tensor] = MappingProxyType({})
_logger = logging.getLogger(__name__)
KERNELS_FOLDER = "kernels"  # in the engine directory, not in those of its parts: machine code of plugins


def load_engines(
    config: ServeConfig,
    manifest: Manifest,
    names: Collection[str],
    kernels: Path,
    part: str = "",
    weights: LayerWeights | None = None,
    reads: Reads = read_and_hash,
    device: torch.device | None = None,
    beside_bytes: int = 0,
) -> dict[str, EngineRunner]:
    """The named engines of [model] engines_dir on a GPU.

    kernels  folder of the kernels that plugins look up, one for all engines of a process
    part     the folder of a tensor-parallel rank that the engine directory is
    weights  for engines that take them as inputs: such an engine is opened once for all its layers
    reads    gives the content of an engine's file, and its SHA-256
    device   None: the current GPU
    beside_bytes  what the process will hold there besides, when all is loaded: left free
    Raises ConfigError, SetupError or EngineError when they do not fit, before one is loaded where that can be said.
    """
    model = config.model
    if model.device != "cuda":
        raise ConfigError(f'[model] backend "{model.backend}" needs device = "cuda", got "{model.device}": correct it.')
    trt = load_tensorrt(model.backend)
    layout = str(Layout.parse(config.denoiser.layout).of_branch)
    target = EngineTarget(model.backend, trt.__version__, 0, layout, part)
    check_engines(config, manifest, names, target)
    current = _current_gpu(model.backend)
    device = current if device is None or device.index is None else device
    require_target(manifest, model.engines_dir, replace(target, sm=_sm(device)))
    entries = {name: manifest.graph(name) for name in names}
    register_plugins(trt, kernels, entries, manifest)
    memory = activation_memory(device)
    sizes = _weight_bytes(entries)
    activations = engine_bytes(entries).activations
    torch.cuda.empty_cache()  # TensorRT does not see what torch keeps for itself
    free_memory(device, beside_bytes + sum(sizes.values()) + max(0, activations - memory.size_bytes))
    memory.reserve(activations)
    require_room(sizes, torch.cuda.mem_get_info(device)[0] - beside_bytes)
    opened: dict[str, NvInferRunner] = {}
    with torch.cuda.device(device):
        for name, entry in entries.items():
            file = entry.file
            if file not in opened:
                engine_id = f"{name}@{entry.key[:12]}"
                opened[file] = NvInferRunner(
                    trt, entry.spec, model.engines_dir, entry.files[0], memory, engine_id, reads
                )
    return _of_layers(entries, opened, weights)


def _of_layers(
    entries: Mapping[str, GraphEntry], opened: Mapping[str, NvInferRunner], weights: LayerWeights | None
) -> dict[str, EngineRunner]:
    """A runner for each name: the engine itself, or with the weights of its layer, which go to the GPU here."""
    runners: dict[str, EngineRunner] = {}
    began_s, moved = time.monotonic(), 0
    for name, entry in entries.items():
        engine = opened[entry.file]
        if not entry.spec.weights:
            runners[name] = engine
            continue
        if weights is None:
            raise EngineError(
                f"Engine {name} takes its weights as inputs, none are at hand: open it with a checkpoint."
            )
        given = {key: tensor.to(engine.device) for key, tensor in weights.of(name, entry.spec).items()}
        runners[name] = LayerRunner(engine, name, f"{name}@{entry.key[:12]}", given)
        moved += weight_bytes(entry.spec)
    if moved:
        took_s = max(time.monotonic() - began_s, 1e-3)
        rate = moved / GIB / took_s
        _logger.info("%.2f GiB of weights went to the GPU in %.1f s, %.2f GiB/s", moved / GIB, took_s, rate)
    return runners


def engine_bytes(entries: Mapping[str, GraphEntry]) -> Graphs:
    """What a process holds that has opened these engines of one folder, by their plans."""
    activations = max((int(entry.extras["plan"]["activation_bytes"]) for entry in entries.values()), default=0)
    return Graphs(sum(_weight_bytes(entries).values()), activations)


def _weight_bytes(entries: Mapping[str, GraphEntry]) -> dict[str, int]:
    """By name: what an engine holds itself, counted with the first of its layers, and the weights of the layer."""
    sizes, files = {}, set[str]()
    for name, entry in entries.items():
        inside = 0 if entry.file in files else int(entry.extras["plan"]["weight_bytes"])
        files.add(entry.file)
        sizes[name] = inside + weight_bytes(entry.spec)
    return sizes


def open_alone(directory: Path, manifest: Manifest, kernels: Path) -> Callable[..., EngineRunner]:
    """Opens one engine at a time on the current GPU, whatever a configuration says, by its name and, where it takes
    them as inputs, with the weights of a layer on the CPU; `kernels` as for load_engines.
    Raises EngineError when they were built for another TensorRT or GPU, or there is no GPU."""
    found = EngineTarget.of(manifest, directory)
    trt = load_tensorrt(found.backend)
    device = _current_gpu(found.backend)
    require_target(manifest, directory, replace(found, version=trt.__version__, sm=_sm(device)))
    register_plugins(trt, kernels, manifest.graphs, manifest)
    memory = activation_memory(device)

    def open_engine(name: str, weights: Mapping[str, torch.Tensor] = NO_WEIGHTS) -> EngineRunner:
        entry = manifest.graph(name)
        engine_id = f"{name}@{entry.key[:12]}"
        engine = NvInferRunner(trt, entry.spec, directory, entry.files[0], memory, engine_id)
        if not entry.spec.weights:
            return engine
        return LayerRunner(engine, name, engine_id, {key: value.to(device) for key, value in weights.items()})

    return open_engine


def check_engines(config: ServeConfig, manifest: Manifest, names: Collection[str], target: EngineTarget) -> None:
    """EngineError unless the engines are what `config` and `target` ask for; an SM of 0 in `target` is any.

    Files are compared in size here, and byte by byte when they are opened.
    """
    directory = config.model.engines_dir
    found = EngineTarget.of(manifest, directory)
    require_target(manifest, directory, replace(target, sm=target.sm or found.sm))
    manifest.verify(directory, names)
    require_parity(manifest, names)
    for name in names:
        require_profile({name: manifest.graph(name)}, largest_sizes(config, name))


def largest_sizes(config: ServeConfig, name: str) -> dict[str, int]:
    """Symbol -> its largest size in the graph `name` that requests may ask of one rank."""
    limits = config.limits
    parts = 1 if name.startswith(WHOLE_TOKENS) else Layout.parse(config.denoiser.layout).sp
    return {
        "tokens": -(-limits.max_tokens // parts),
        "latent_height": limits.max_height // PIXELS_PER_LATENT,
        "latent_width": limits.max_width // PIXELS_PER_LATENT,
    }


@functools.cache
def activation_memory(device: torch.device) -> ActivationMemory:
    """Of this process on this GPU, shared by all its engines."""
    return ActivationMemory(device)


def _current_gpu(backend: str) -> torch.device:
    if not torch.cuda.is_available():
        raise EngineError(f'[model] backend "{backend}" needs an NVIDIA GPU with its driver, found none: use "ort".')
    return torch.device("cuda", torch.cuda.current_device())


def _sm(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
