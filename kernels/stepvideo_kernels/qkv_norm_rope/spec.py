"""What qkv_norm_rope accepts, its tilings and its cost."""

from collections.abc import Mapping

from stepvideo_kernels.kernel_spec import (
    ELEMENT_BYTES,
    FP8_MIN_SM,
    POINTER_TYPES,
    SMS,
    FullSize,
    KernelBuild,
    KernelSpec,
    TileConfig,
    Work,
)
from stepvideo_serve.errors import EngineError

HEAD_DIM = 128
KEY_PADDING = 16
FLOPS_PER_NORMED_VALUE = 8

SPEC = KernelSpec(
    op="qkv_norm_rope",
    dtypes={"bf16": 80, "fp16": 80},
    outputs={"bf16": 80, "fp16": 80, "fp8": FP8_MIN_SM},
    size_name="head size",
    size_multiple=HEAD_DIM,
    size_max=HEAD_DIM,
    layouts=("[batch, tokens, heads * 3 * 128] contiguous",),
    sms=SMS,
    max_tokens=1 << 24,
    requires="RoPE tables in fp32, the first half of each part is read; gains in the type of qkv, scales in fp32",
)

# The kernel streams: it is limited by device memory, so a tile is right when enough bytes are in flight (about latency
# times bandwidth: 18 KB for each SM of an H100, 43 KB of a B200) and nothing spills. The tables stay in registers
# while a program walks over its heads, whose loads run one or two heads ahead. FP8 tiles are 32 tokens high or more,
# because v is written transposed and a run of 32 bytes fills a sector. SM 89 and 120 have 100 KB of shared memory.
_SMALL = TileConfig(16, 0, 4, 3, extra={"HEADS_PER_PROGRAM": 16})
_SMALL_SHALLOW = TileConfig(16, 0, 4, 2, extra={"HEADS_PER_PROGRAM": 16})
_TALL = TileConfig(32, 0, 8, 3, extra={"HEADS_PER_PROGRAM": 16})
_TALL_SHALLOW = TileConfig(32, 0, 8, 2, extra={"HEADS_PER_PROGRAM": 8})
_BROAD = TileConfig(32, 0, 16, 3, extra={"HEADS_PER_PROGRAM": 16})
_TALLEST = TileConfig(64, 0, 16, 2, extra={"HEADS_PER_PROGRAM": 8})

# The first of each is the chosen one.
_WIDE_TILES: Mapping[int, tuple[TileConfig, ...]] = {
    80: (_SMALL, _TALL_SHALLOW),
    89: (_SMALL_SHALLOW, _TALL_SHALLOW),
    90: (_BROAD, _TALL),
    100: (_TALL, _SMALL),
    120: (_SMALL_SHALLOW, _TALL_SHALLOW),
}
_FP8_TILES: Mapping[int, tuple[TileConfig, ...]] = {
    89: (_TALL_SHALLOW, _TALLEST),
    90: (_TALL, _TALLEST),
    100: (_TALL, _TALLEST),
    120: (_TALL_SHALLOW, _TALLEST),
}
TILES: Mapping[str, Mapping[int, tuple[TileConfig, ...]]] = {
    "bf16": _WIDE_TILES,
    "fp16": {sm: tiles[:1] for sm, tiles in _WIDE_TILES.items()},  # what is best in bf16 is best in fp16
    "fp8": _FP8_TILES,
}


def padded_tokens(tokens: int) -> int:
    """Row length of the transposed v of the FP8 variant."""
    return (tokens + KEY_PADDING - 1) // KEY_PADDING * KEY_PADDING  # no negative numbers: ONNX divides towards zero


def tile(variant: str, sm: int) -> TileConfig:
    """The chosen configuration; raises EngineError where there is none."""
    if sm not in TILES.get(variant, {}):
        raise EngineError(f"{SPEC.op} has no {variant} kernel for SM {sm}: it has {', '.join(TILES)} for SM {SMS}.")
    return TILES[variant][sm][0]


def grid(batch: int, tokens: int, heads: int, tile: TileConfig, *, transposed: bool) -> tuple[int, int, int]:
    """Programs along tokens, groups of heads and batch."""
    rows = padded_tokens(tokens) if transposed else tokens
    heads_each = int(tile.extra["HEADS_PER_PROGRAM"])
    return -(-rows // tile.block_m), -(-heads // heads_each), batch


def builds(full: FullSize) -> tuple[KernelBuild, ...]:
    """Variants are named after the output's type; the FP8 one reads bf16."""
    return tuple(
        _build(full, sm, variant, tile, chosen=index == 0)
        for variant, tiles in TILES.items()
        for sm in tiles
        for index, tile in enumerate(tiles[sm])
    )


def _build(full: FullSize, sm: int, variant: str, tile: TileConfig, *, chosen: bool) -> KernelBuild:
    read = "bf16" if variant == "fp8" else variant
    source, target = POINTER_TYPES[read], POINTER_TYPES[variant]
    pointers = dict.fromkeys(("qkv_ptr", "q_gain_ptr", "k_gain_ptr"), source)
    pointers |= dict.fromkeys(
        ("cos_ptr", "sin_ptr", "q_scale_ptr", "k_scale_ptr", "v_scale_ptr"), POINTER_TYPES["fp32"]
    )
    pointers |= dict.fromkeys(("q_ptr", "k_ptr", "v_ptr"), target)
    constexprs = {
        "TRANSPOSE_V": variant == "fp8",
        "BLOCK_M": tile.block_m,
        "HEADS_PER_PROGRAM": tile.extra["HEADS_PER_PROGRAM"],
        "STAGES": tile.num_stages,
    }
    return KernelBuild(
        op=SPEC.op,
        variant=variant,
        sm=sm,
        function="stepvideo_kernels.qkv_norm_rope.kernel:qkv_norm_rope_kernel",
        signature={
            **pointers,
            **dict.fromkeys(("tokens", "heads", "padded"), "i32"),
            "eps": "fp32",
            **dict.fromkeys(constexprs, "constexpr"),
        },
        constexprs=constexprs,
        tile=tile,
        chosen=chosen,
        aligned=(*pointers, "padded"),
        tile_work=_work(tile.block_m, int(tile.extra["HEADS_PER_PROGRAM"]), read, variant),
        full_work=_work(full.batch * full.video_tokens, full.heads, read, variant),
        shape=f"[{full.batch}, {full.video_tokens}, {3 * full.width}]",
    )


def _work(tokens: int, heads: int, read: str, written: str) -> Work:
    values = tokens * heads * HEAD_DIM
    tables = tokens * HEAD_DIM * ELEMENT_BYTES["fp32"]
    moved = 3 * values * (ELEMENT_BYTES[read] + ELEMENT_BYTES[written]) + tables
    return Work(flops=2 * values * FLOPS_PER_NORMED_VALUE, bytes=moved)
