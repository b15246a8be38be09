"""What a layout of ranks costs per denoising step: FLOPs, bytes between the ranks, memory, seconds. Pure arithmetic.

Exact     parameters per rank; FLOPs of the matrix multiplications (2 per multiply and add; nothing else is counted);
          payload bytes of every collective, as parallel/collectives.py counts them.
Predicted memory beyond the weights (memory/predicted.py), and all seconds: FLOPs at the share of the peak in gpus.py,
          bytes at the link's bandwidth, sums hidden behind the other guidance branch except for OVERLAP_LOSS of them.
          Not counted: that smaller slices run less efficiently, and the mp4.

Work and seconds are rank 0's: no rank has more tokens. Memory is that of every process on every GPU.
Letters: D width, H heads, N video tokens, n those of this rank, L text tokens.
Sources: ring all-reduce sends 2 (p - 1) / p of the payload (Patarasuk and Yuan, 2009), an all-to-all all but the own
part; cuts of a block as in Megatron-LM (arXiv 1909.08053) and DeepSpeed-Ulysses (arXiv 2309.14509).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil

from stepvideo_serve.errors import ConfigError
from stepvideo_serve.memory.ledger import Ledger
from stepvideo_serve.memory.placement import Placement
from stepvideo_serve.memory.predicted import predicted
from stepvideo_serve.memory.sizes import BF16_BYTES, FP32_BYTES, ModelSize, Workload, own_branches
from stepvideo_serve.parallel.layout import SIZES, Layout, split_evenly
from stepvideo_serve.planning.gpus import GPU, OVERLAP_LOSS

LLM_PLACEMENTS = ("split", "whole", "elsewhere")
"""Step-LLM in slices on the tensor-parallel ranks, whole on one of their GPUs, or not on these GPUs."""


@dataclass(frozen=True)
class Exchange:
    """One kind of collective of one rank during one step, in a group of `ranks` along `axis`.

    payload_bytes: of the tensors handed to the collective; wire_bytes: what of it, or of partial sums, leaves the GPU.
    """

    collective: str
    axis: str
    ranks: int
    calls: int
    payload_bytes: int
    wire_bytes: float

    def call_seconds(self, gpu: GPU) -> float:
        return gpu.send_seconds(self.wire_bytes / self.calls)


@dataclass(frozen=True)
class StepSeconds:
    """compute: if nothing were sent; communication: if nothing else were done; total: as they overlap."""

    compute: float
    communication: float
    total: float


@dataclass(frozen=True)
class Prediction:
    """One layout on one kind of GPU. flops: of rank 0 per step, by part; memory: of the layout's GPUs, for each of
    LLM_PLACEMENTS that the layout allows; placement: the first with which everything fits, None when not even the rest
    does; request_s: without queueing and mp4."""

    layout: Layout
    flops: Mapping[str, float]
    exchanges: tuple[Exchange, ...]
    memory: Mapping[str, Ledger]
    placement: str | None
    step: StepSeconds
    text_s: float
    decode_s: float
    request_s: float

    @property
    def chosen_memory(self) -> Ledger:
        """With `placement`; without Step-LLM where nothing fits."""
        return self.memory[self.placement or "elsewhere"]

    def needs_bytes(self, placement: str) -> int:
        """Of the fullest GPU."""
        return max(self.memory[placement].by_gpu.values())


def placements_of(layout: Layout, llm_groups: int) -> dict[str, Placement]:
    """LLM_PLACEMENTS, as far as the layout allows them. A whole Step-LLM goes to GPU 1 where there is one: the VAE
    encoder is on GPU 0. Elsewhere is the first GPU that no rank has."""
    split = layout.tp > 1 and llm_groups % layout.tp == 0
    return {
        **({"split": Placement(layout, llm_on_ranks=True)} if split else {}),
        "whole": Placement(layout, text=min(1, layout.world_size - 1)),
        "elsewhere": Placement(layout, text=layout.world_size),
    }


def memory_by_placement(size: ModelSize, layout: Layout, work: Workload, precision: str) -> dict[str, Ledger]:
    """For each placement that the layout allows: the layout's GPUs."""
    others = [layout.world_size]
    found = placements_of(layout, size.llm_groups)
    return {name: predicted(size, place, work, precision).without(others) for name, place in found.items()}


def layouts_of(gpus: int, heads: int, tokens: int) -> list[Layout]:
    """Every layout of exactly `gpus` ranks that the heads and tokens allow. Raises ConfigError when there is none."""
    sizes = [Layout(cfg, tp, sp) for cfg in SIZES["cfg"] for tp in SIZES["tp"] for sp in SIZES["sp"]]
    valid = [layout for layout in sizes if heads % (layout.tp * layout.sp) == 0 and layout.sp <= tokens]
    found = [layout for layout in valid if layout.world_size == gpus]
    if not found:
        possible = ", ".join(str(size) for size in sorted({layout.world_size for layout in valid}))
        raise ConfigError(
            f"A layout of a DiT with {heads} heads needs {possible} GPUs, got {gpus}: use one of these numbers."
        )
    return found


def block_flops(size: ModelSize, layout: Layout, own_tokens: int, tokens: int, text_tokens: int) -> dict[str, float]:
    """Of one rank, block and branch: self-attention's projections, its core, cross-attention's, the feed-forward."""
    n, d, tp = own_tokens, size.width, layout.tp
    return {
        "qkv": 2 * n * d * 3 * d / tp,
        "core": 4 * tokens**2 * d / (tp * layout.sp),
        "out": 2 * n * d * d / tp,
        "cross_projections": 4 * n * d * d / tp,
        "cross_core": 4 * n * text_tokens * d / tp,
        "feed_forward": 4 * n * d * size.hidden / tp,
    }


def step_flops(size: ModelSize, layout: Layout, work: Workload, rank: int = 0) -> dict[str, float]:
    """Of one rank in one step, by part; "outer" is what surrounds the blocks, which tensor parallelism does not cut."""
    own = split_evenly(work.tokens, layout.sp)[layout.coordinates(rank).sp]
    branches = own_branches(layout, work.branches)
    block = block_flops(size, layout, own, work.tokens, work.text_tokens)
    d = size.width
    embed = 2 * own * size.patch_in * d + 4 * (size.time_channels * d + d * d) + 12 * d * d
    final = 2 * own * d * size.patch_out
    blocks = {part: flops * size.layers * branches for part, flops in block.items()}
    return {**blocks, "outer": embed + final * branches}


def exchanges(
    size: ModelSize, layout: Layout, tokens: int, branches: int = 2, rank: int = 0, itemsize: int = BF16_BYTES
) -> tuple[Exchange, ...]:
    """What one rank sends in one step; `itemsize` of the activations. Velocities are exchanged in fp32."""
    tp, sp, width = layout.tp, layout.sp, size.width
    own = split_evenly(tokens, sp)[layout.coordinates(rank).sp]
    on_rank = own_branches(layout, branches)
    calls = size.layers * on_rank
    found = []
    if tp > 1:
        payload = 3 * calls * own * width * itemsize
        found.append(Exchange("sum_tp", "tp", tp, 3 * calls, payload, payload * 2 * (tp - 1) / tp))
    if sp > 1:
        heads = calls * 3 * (size.heads // tp) * own * size.head_dim * itemsize
        back = calls * tokens * (size.heads // (tp * sp)) * size.head_dim * itemsize
        gathered = on_rank * sp * own * size.patch_out * itemsize
        found += [
            Exchange("to_heads", "sp", sp, calls, heads, heads * (sp - 1) / sp),
            Exchange("to_tokens", "sp", sp, calls, back, back * (tokens - own) / tokens),
            Exchange("gather_tokens", "sp", sp, on_rank, gathered, gathered * (sp - 1) / sp),
        ]
    if layout.cfg > 1 and branches > 1:
        payload = tokens * size.patch_out * FP32_BYTES
        found.append(Exchange("exchange_branches", "cfg", layout.cfg, 1, payload, payload))
    return tuple(found)


def two_queues(pieces: Sequence[float], sum_s: float, branches: int) -> float:
    """Seconds until every branch has run the pieces, in turn, each followed by its sum.

    Computation is one queue, sums another; a branch's next piece waits for its sum, other branches' pieces do not.
    """
    compute = network = 0.0
    ready = [0.0] * branches
    for piece in pieces:
        for branch in range(branches):
            compute = max(compute, ready[branch]) + piece
            network = max(compute, network) + sum_s
            ready[branch] = network
    return max(ready)


def step_seconds(size: ModelSize, layout: Layout, work: Workload, gpu: GPU, precision: str) -> StepSeconds:
    """All-to-alls hold up the computation; only sums overlap with it, and only with another branch's."""
    branches = own_branches(layout, work.branches)
    sent = exchanges(size, layout, work.tokens, work.branches)
    call_s = {exchange.collective: exchange.call_seconds(gpu) for exchange in sent}
    rate = gpu.flops(precision)
    own = split_evenly(work.tokens, layout.sp)[0]
    flops = block_flops(size, layout, own, work.tokens, work.text_tokens)
    swap_s = call_s.get("to_heads", 0.0) + call_s.get("to_tokens", 0.0)
    pieces = (
        (flops["qkv"] + flops["core"] + flops["out"]) / rate + swap_s,
        (flops["cross_projections"] + flops["cross_core"]) / rate,
        flops["feed_forward"] / rate,
    )
    blocks_s = two_queues(pieces * size.layers, call_s.get("sum_tp", 0.0), branches)
    outer_s = step_flops(size, layout, work)["outer"] / gpu.flops("bf16")
    end_s = branches * call_s.get("gather_tokens", 0.0) + call_s.get("exchange_branches", 0.0)
    total_s = blocks_s + outer_s + end_s
    compute_s = sum(flops.values()) * size.layers * branches / rate + outer_s
    communication_s = sum(exchange.calls * call_s[exchange.collective] for exchange in sent)
    hidden_s = compute_s + communication_s - total_s
    return StepSeconds(compute_s, communication_s, total_s + OVERLAP_LOSS * hidden_s)


def predict(size: ModelSize, layout: Layout, work: Workload, gpu: GPU, precision: str) -> Prediction:
    """Everything about one layout. `precision` "bf16" or "fp8": of the weights that are cut, and of the blocks'
    computation; activations between pieces, the rest of the weights and the VAE stay in bf16."""
    needed = memory_by_placement(size, layout, work, precision)
    fits = {place: max(ledger.by_gpu.values()) <= gpu.memory_bytes for place, ledger in needed.items()}
    placement = next((place for place in LLM_PLACEMENTS if fits.get(place)), None)
    step = step_seconds(size, layout, work, gpu, precision)
    llm_ranks = layout.tp if placement == "split" else 1
    own_share = own_branches(layout, work.branches) / work.branches
    text_s = work.llm_flops / llm_ranks / gpu.flops(precision) + work.prepare_flops * own_share / gpu.flops("bf16")
    decode_s = ceil(work.chunks / layout.world_size) * work.chunk_flops / gpu.vae_flops
    return Prediction(
        layout=layout,
        flops=step_flops(size, layout, work),
        exchanges=exchanges(size, layout, work.tokens, work.branches),
        memory=needed,
        placement=placement,
        step=step,
        text_s=text_s,
        decode_s=decode_s,
        request_s=text_s + work.encode_flops / gpu.vae_flops + work.steps * step.total + decode_s,
    )
