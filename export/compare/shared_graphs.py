"""Graphs of a kind, which layers share, under the names of a whole model."""

from collections.abc import Callable

from stepvideo_serve.assembly.checkpoint import Checkpoint
from stepvideo_serve.engine.manifest import Manifest
from stepvideo_serve.engine.runner import EngineRunner
from stepvideo_serve.text.segments import LayeredStepLLM, llm_layer_names

WHOLE = "step_llm"


def with_step_llm(
    checkpoint: Checkpoint, manifest: Manifest, dtype: str, open_graph: Callable[[str], EngineRunner]
) -> Callable[[str], EngineRunner]:
    """`open_graph`, but that "step_llm" of a folder with its layers alone is these one after the other; `dtype` is that
    of their activations, "float32" or another."""

    def opened(name: str) -> EngineRunner:
        if name != WHOLE or name in manifest.graphs or not manifest.takes_weights:
            return open_graph(name)
        from stepvideo_serve.text.graphs import step_llm_spec  # imports transformers, which takes long

        config = checkpoint.llm_config
        layers = {one: open_graph(one) for one in llm_layer_names(config.num_layers)}
        return LayeredStepLLM(step_llm_spec(config, dtype), layers, config.num_layers)

    return opened
