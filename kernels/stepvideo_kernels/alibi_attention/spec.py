"""What alibi_attention accepts, its tilings and its cost."""

import math
from collections.abc import Mapping

from stepvideo_kernels.kernel_spec import (
    ELEMENT_BYTES,
    POINTER_TYPES,
    SMS,
    Constant,
    FullSize,
    KernelBuild,
    KernelSpec,
    TileConfig,
    Work,
)
from stepvideo_serve.errors import EngineError

HEAD_DIM = 128
SCALE = 1 / math.sqrt(HEAD_DIM)

SPEC = KernelSpec(
    op="alibi_attention",
    dtypes={"bf16": 80, "fp16": 80},
    outputs={"bf16": 80, "fp16": 80},
    size_name="head size",
    size_multiple=HEAD_DIM,
    size_max=HEAD_DIM,
    layouts=("[batch, tokens, (heads + 2 * groups) * 128] contiguous",),
    sms=SMS,
    max_tokens=1 << 17,
    requires="slopes [heads] in fp32, a number of heads that is a multiple of the number of groups",
)

# The first of each is the chosen one. With 64 queries 320 tokens make 5 x 48 programs, about two on each SM. Without
# HGMMA the compiler gives each warp rows of its own only in tiles as high as the head is wide; other tiles spill.
_LOW = (TileConfig(64, 64, 4, 2), TileConfig(64, 32, 4, 3))
_HIGH = (TileConfig(128, 32, 8, 3), TileConfig(128, 64, 8, 2))
TILES: Mapping[str, Mapping[int, tuple[TileConfig, ...]]] = {
    element: {80: _HIGH, 89: _HIGH, 90: _LOW, 100: _LOW, 120: _HIGH} for element in ("bf16", "fp16")
}
_INSTRUCTIONS: Mapping[int, str] = {80: r"HMMA", 89: r"HMMA", 90: r"HGMMA", 100: r"UTCHMMA", 120: r"HMMA"}


def tile(variant: str, sm: int) -> TileConfig:
    """The chosen configuration; raises EngineError where there is none."""
    if sm not in TILES.get(variant, {}):
        raise EngineError(f"{SPEC.op} has no {variant} kernel for SM {sm}: it has {', '.join(TILES)} for SM {SMS}.")
    return TILES[variant][sm][0]


def groups(width: int, heads: int) -> int:
    """Key/value groups in a projection of this width; raises EngineError when it does not fit the heads."""
    count, rest = divmod(width - heads * HEAD_DIM, 2 * HEAD_DIM)
    if rest or count < 1 or heads % count:
        raise EngineError(
            f"{SPEC.op} takes (heads + 2 * groups) * {HEAD_DIM} channels with groups dividing the {heads} heads, "
            f"got {width}: give the output of wqkv and one slope per head."
        )
    return count


def grid(batch: int, tokens: int, heads: int, tile: TileConfig) -> tuple[int, int, int]:
    """Programs along queries, heads and batch."""
    return -(-tokens // tile.block_m), heads, batch


def constexprs(tile: TileConfig) -> dict[str, Constant]:
    """The kernel's compile-time parameters."""
    return {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "INTERPRET": False}


def builds(full: FullSize) -> tuple[KernelBuild, ...]:
    """Variants are named after the type of qkv."""
    return tuple(
        _build(full, sm, variant, tile, chosen=index == 0)
        for variant, tiles in TILES.items()
        for sm in tiles
        for index, tile in enumerate(tiles[sm])
    )


def _build(full: FullSize, sm: int, variant: str, tile: TileConfig, *, chosen: bool) -> KernelBuild:
    pointers = {"qkv": POINTER_TYPES[variant], "slopes": POINTER_TYPES["fp32"], "out": POINTER_TYPES[variant]}
    values = constexprs(tile)
    return KernelBuild(
        op=SPEC.op,
        variant=variant,
        sm=sm,
        function="stepvideo_kernels.alibi_attention.kernel:alibi_attention_kernel",
        signature={
            **pointers,
            **dict.fromkeys(("tokens", "heads", "groups"), "i32"),
            "scale": "fp32",
            **dict.fromkeys(values, "constexpr"),
        },
        constexprs=values,
        tile=tile,
        chosen=chosen,
        aligned=tuple(pointers),
        instructions=(_INSTRUCTIONS[sm],),
        tile_work=_work(1, tile.block_m, full.llm_tokens, tile.block_m * full.llm_tokens, variant, 2.0),
        full_work=_full_work(full, variant),
        shape=f"[1, {full.llm_tokens}, {(full.heads + 2 * full.llm_groups) * HEAD_DIM}]",
    )


def _full_work(full: FullSize, element: str) -> Work:
    """One prompt: half of all pairs of query and key are behind the query."""
    pairs = full.heads * full.llm_tokens * (full.llm_tokens + 1) // 2
    shared = 2 * full.llm_groups / full.heads
    return _work(full.heads, full.llm_tokens, full.llm_tokens, pairs, element, shared)


def _work(heads: int, queries: int, keys: int, pairs: int, element: str, keys_values_per_head: float) -> Work:
    values = heads * HEAD_DIM * (2 * queries + keys_values_per_head * keys)
    return Work(flops=4 * HEAD_DIM * pairs, bytes=values * ELEMENT_BYTES[element], exps=pairs, precision="bf16")
