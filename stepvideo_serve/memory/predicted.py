"""The ledger of a server whose engines nobody has built: what its graphs will hold, from sizes alone.

Weights are exact. In FP8 all matrices that tensor parallelism cuts count one byte; layers that are kept in bf16
(`KEEP_BF16`) take twice that. Activations are predicted: tensors alive at the same time in the pieces of a block and in
the Video-VAE. Letters: D width, n tokens of a rank.
"""

from collections.abc import Mapping
from math import ceil
from typing import Final

from stepvideo_serve.memory.ledger import Graphs, Ledger, between_graphs, ledger
from stepvideo_serve.memory.placement import DECODER, ENCODER, TEXT, Placement, rank_process
from stepvideo_serve.memory.sizes import BF16_BYTES, GIB, VALUE_BYTES, ModelSize, Workload
from stepvideo_serve.parallel.layout import Layout, split_evenly

ENGINES, TORCH = "engines", "torch"
DECODER_SHARE: Final[Mapping[str, float]] = {ENGINES: 0.642, TORCH: 1.53}
"""What runs the Video-VAE's decoder -> its memory, as a share of the tensors that are alive in it: TensorRT planned
11.89 GiB for one chunk of 544x992, torch took 28.3 GiB on an H200, workspace of cuDNN's convolutions included."""
ENCODER_SHARE: Final[Mapping[str, float]] = {ENGINES: 1.0, TORCH: 1.6}
"""Likewise, of its encoder: torch took 1.5 GiB for an image of 544x992; nobody has planned an engine of that size."""
TEXT_BYTES: Final = GIB // 4
"""Activations of the text encoders, for one text: torch took 0.13 GiB on an H200."""


def runs_on(backend: str) -> str:
    """What runs the graphs of [model] backend: ENGINES or TORCH; ONNX Runtime is counted as torch."""
    return ENGINES if backend.startswith("tensorrt") else TORCH


def predicted(size: ModelSize, placement: Placement, work: Workload, precision: str, runs: str = ENGINES) -> Ledger:
    """precision: a key of VALUE_BYTES; runs: ENGINES or TORCH."""
    between = between_graphs(
        size.widths, placement.layout, work.tokens, work.text_tokens, work.branches, VALUE_BYTES[precision]
    )
    return ledger(placement, predicted_graphs(size, placement, work, precision, runs), between)


def predicted_graphs(
    size: ModelSize, placement: Placement, work: Workload, precision: str, runs: str = ENGINES
) -> dict[str, Graphs]:
    """Process -> what its graphs hold."""
    layout, value_bytes = placement.layout, VALUE_BYTES[precision]
    scale = value_bytes / BF16_BYTES
    decoder = Graphs(size.vae_decoder_parameters * value_bytes, ceil(work.chunk_bytes * scale * DECODER_SHARE[runs]))
    own = split_evenly(work.tokens, layout.sp)[0]
    rank = Graphs(size.dit.bytes(layout.tp, precision), ceil(block_scratch(size, layout, own) * scale))
    text = Graphs(size.clip_parameters * value_bytes, TEXT_BYTES)
    if placement.llm_on_ranks:
        rank += Graphs(size.llm.bytes(layout.tp, precision), TEXT_BYTES)
    else:
        text += Graphs(size.llm.bytes(1, precision))
    if placement.ranks_decode:
        rank += decoder
    encoder = Graphs(size.vae_encoder_parameters * value_bytes, ceil(work.image_bytes * scale * ENCODER_SHARE[runs]))
    ranks = {rank_process(index): rank for index in range(layout.world_size)}
    return {**ranks, TEXT: text, ENCODER: encoder, **({} if placement.ranks_decode else {DECODER: decoder})}


def block_scratch(size: ModelSize, layout: Layout, own_tokens: int) -> int:
    """Largest memory inside a piece of a block in bf16, in bytes.

    Self-attention holds the modulated tokens, q, k and v, fp32 copies of q and k for the norm and the rotation, and the
    result; the feed-forward the modulated tokens and its hidden values before and after GELU; the exchange of heads
    four copies of q, k and v. (TensorRT planned 4.5 GB for one whole block at 38,400 tokens; this says 4.2.)
    """
    heads = size.width / layout.tp
    attention = size.width + (3 + 4 + 1) * heads
    feed_forward = size.width + 2 * size.hidden / layout.tp
    exchange = 4 * 3 * heads if layout.sp > 1 else 0
    return ceil(own_tokens * max(attention, feed_forward, exchange) * BF16_BYTES)
