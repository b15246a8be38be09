"""What vae_attention accepts, its tilings and its cost."""

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

SPEC = KernelSpec(
    op="vae_attention",
    dtypes={"bf16": 80, "fp16": 80},
    outputs={"bf16": 80, "fp16": 80},
    size_name="head size",
    size_multiple=32,
    size_max=512,
    layouts=("[batch, tokens, channels] contiguous",),
    sms=SMS,
    max_tokens=1 << 21,
    requires="q, k and v of one type; a binary is for one head size",
)


def _tile(m: int, n: int, warps: int, stages: int, values: int, chunk: int, *, tma: bool, stream_q: bool) -> TileConfig:
    extra: dict[str, Constant] = {"VALUES": values, "CHUNK": chunk, "TMA": tma, "STREAM_Q": stream_q}
    return TileConfig(m, n, warps, stages, extra=extra)


# The first of each is the chosen one. On SM 90, q of 128 queries (128 KB) and two stages of 32 keys and half their
# values (96 KB) fill shared memory. The whole accumulator at once, with 64 queries, spares the repeated scores but
# reads keys and values twice as often, which is more than L2 gives. SM 89 and 120 have 100 KB and stream q.
_STREAMED = (
    _tile(64, 64, 8, 2, 256, 64, tma=False, stream_q=True),
    _tile(64, 64, 8, 2, 256, 32, tma=False, stream_q=True),
)
_TILES: Mapping[int, tuple[TileConfig, ...]] = {
    80: (_tile(64, 64, 8, 3, 256, 64, tma=False, stream_q=True), *_STREAMED[:1]),
    89: _STREAMED,
    90: (
        _tile(128, 32, 8, 2, 256, 128, tma=True, stream_q=False),
        _tile(128, 64, 8, 2, 256, 128, tma=True, stream_q=True),
    ),
    100: (
        _tile(128, 128, 8, 2, 128, 128, tma=True, stream_q=True),
        _tile(128, 32, 8, 2, 128, 128, tma=True, stream_q=False),
    ),
    120: (_tile(64, 64, 8, 2, 256, 64, tma=True, stream_q=True), *_STREAMED[:1]),
}
TILES: Mapping[str, Mapping[int, tuple[TileConfig, ...]]] = {"bf16": _TILES, "fp16": _TILES}
_INSTRUCTIONS: Mapping[int, str] = {80: r"HMMA", 89: r"HMMA", 90: r"HGMMA", 100: r"UTCHMMA", 120: r"HMMA"}


def tile(variant: str, sm: int) -> TileConfig:
    """The chosen configuration; raises EngineError where there is none."""
    if sm not in TILES.get(variant, {}):
        raise EngineError(f"{SPEC.op} has no {variant} kernel for SM {sm}: it has {', '.join(TILES)} for SM {SMS}.")
    return TILES[variant][sm][0]


def to_log2(width: int) -> float:
    """What turns a product of q and k into an exponent of 2."""
    return math.log2(math.e) / math.sqrt(width)


def grid(batch: int, tokens: int, width: int, tile: TileConfig) -> tuple[int, int, int]:
    """Programs along queries, parts of the value channels, and batch."""
    return -(-tokens // tile.block_m), -(-width // _values(tile, width)), batch


def boxes(tile: TileConfig, width: int) -> tuple[tuple[int, int, int], ...]:
    """Blocks of the tensor maps of q, k, v and out."""
    chunk, values = _chunk(tile, width), _values(tile, width)
    return (1, tile.block_m, chunk), (1, tile.block_n, chunk), (1, tile.block_n, values), (1, tile.block_m, values)


def constexprs(tile: TileConfig, width: int) -> dict[str, Constant]:
    """The kernel's compile-time parameters for one head size."""
    return {
        "WIDTH": width,
        "CHUNK": _chunk(tile, width),
        "VALUES": _values(tile, width),
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "TMA": tile.extra["TMA"],
        "STREAM_Q": tile.extra["STREAM_Q"],
        "INTERPRET": False,
    }


def builds(full: FullSize) -> tuple[KernelBuild, ...]:
    """Variants are named after the type of q; the head size is that of the full-size VAE."""
    return tuple(
        _build(full, sm, variant, tile, chosen=index == 0)
        for variant, tiles in TILES.items()
        for sm in tiles
        for index, tile in enumerate(tiles[sm])
    )


def _chunk(tile: TileConfig, width: int) -> int:
    """The largest power of two that divides the width, up to the tile's."""
    return min(int(tile.extra["CHUNK"]), width & -width)


def _values(tile: TileConfig, width: int) -> int:
    """A power of two, no wider than needed."""
    return min(int(tile.extra["VALUES"]), 1 << (width - 1).bit_length())


def _build(full: FullSize, sm: int, variant: str, tile: TileConfig, *, chosen: bool) -> KernelBuild:
    width = full.vae_channels
    types = dict.fromkeys(("q", "k", "v", "out"), POINTER_TYPES[variant])
    aligned = () if tile.extra["TMA"] else tuple(types)
    if tile.extra["TMA"]:
        types = {
            name: f"tensordesc<{variant}[{','.join(map(str, box))}]>"
            for name, box in zip(types, boxes(tile, width), strict=True)
        }
    values = constexprs(tile, width)
    return KernelBuild(
        op=SPEC.op,
        variant=variant,
        sm=sm,
        function="stepvideo_kernels.vae_attention.kernel:vae_attention_kernel",
        signature={**types, "tokens": "i32", "to_log2": "fp32", **dict.fromkeys(values, "constexpr")},
        constexprs=values,
        tile=tile,
        chosen=chosen,
        aligned=aligned,
        instructions=(_INSTRUCTIONS[sm],),
        tile_work=_work(tile.block_m, full.vae_tokens, tile.block_m * full.vae_tokens, variant, tile, width, parts=1),
        full_work=_full_work(full, variant, tile),
        shape=f"[1, {full.vae_tokens}, {width}]",
    )


def _full_work(full: FullSize, element: str, tile: TileConfig) -> Work:
    """One chunk of frames: half of all pairs of query and key are behind the query."""
    tokens, width = full.vae_tokens, full.vae_channels
    parts = -(-width // _values(tile, width))
    return _work(tokens, tokens, tokens * (tokens + 1) // 2, element, tile, width, parts)


def _work(queries: int, keys: int, pairs: int, element: str, tile: TileConfig, width: int, parts: int) -> Work:
    """What `parts` programs side by side do: each computes the scores, and the weighted sum of its share of values."""
    values = _values(tile, width)
    moved = (queries + keys) * width + parts * (queries + keys) * values
    return Work(
        flops=2 * pairs * parts * (width + values),
        bytes=moved * ELEMENT_BYTES[element],
        exps=pairs * parts,
        precision="bf16",
    )
