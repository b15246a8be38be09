"""Whether a request fits the graphs, asked before any of them runs.

Every rank asks about the whole request, also about what other ranks compute: all come to the same answer, and none is
left waiting in a collective.
"""

from collections.abc import Mapping, Sequence

from stepvideo_serve.dit.config import HEAD_DIM, DiTConfig
from stepvideo_serve.dit.segments import CORE, core_heads
from stepvideo_serve.engine.spec import EngineSpec
from stepvideo_serve.errors import EngineError
from stepvideo_serve.text.states import TextStates


def check_shapes(
    specs: Mapping[str, EngineSpec],
    config: DiTConfig,
    shape: tuple[int, ...],
    texts: Sequence[TextStates],
    sequence_parts: int,
) -> None:
    """shape = [F, C, h, w] of the latents, `specs` those of a rank's graphs by name. Raises EngineError."""
    frames, channels, height, width = shape
    patch = config.patch_size
    if height % patch or width % patch:
        raise EngineError(
            f"latents must have rows and columns in multiples of {patch}, got {height} and {width}: correct them."
        )
    tokens = frames * (height // patch) * (width // patch)
    for own in {tokens // sequence_parts, -(-tokens // sequence_parts)}:
        patches = (1, own, channels * patch**2)
        scalars = {"timestep": (1,), "motion_score": (1,)}
        specs["dit_embed"].check_shapes({"latent_tokens": patches, "condition_tokens": patches, **scalars})
    for name in (name for name in specs if name.startswith(CORE)):
        specs[name].check_shapes({"qkv": (3, core_heads(name), tokens, HEAD_DIM)})
    for text in texts:
        llm, clip = tuple(text.llm.shape), tuple(text.clip.shape)
        specs["dit_context"].check_shapes({"llm_states": (1, *llm), "clip_states": (1, *clip)})
        specs["dit_cross_00"].check_shapes({"context": (1, clip[0] + llm[0], config.width)})
