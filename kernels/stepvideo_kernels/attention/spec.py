"""What attention accepts, its tilings and its cost."""

import math
from collections.abc import Mapping

from stepvideo_kernels.kernel_spec import (
    ELEMENT_BYTES,
    FP8_MIN_SM,
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
VALUE_PADDING = 16
TO_LOG2 = math.log2(math.e) / math.sqrt(HEAD_DIM)

SPEC = KernelSpec(
    op="attention",
    dtypes={"bf16": 80, "fp16": 80, "fp8": FP8_MIN_SM},
    outputs={"bf16": 80, "fp16": 80},
    size_name="head size",
    size_multiple=HEAD_DIM,
    size_max=HEAD_DIM,
    layouts=("[batch, heads, tokens, 128] contiguous",),
    sms=SMS,
    max_tokens=1 << 23,
    requires="q, k and v of one type; FP8 v transposed, its tokens padded to a multiple of 16, scales [heads] in fp32, "
    "output bf16",
)


def _tile(
    m: int, n: int, warps: int, stages: int, *, tma: bool = False, specialize: bool = False, fresh: bool = False,
    ahead: bool = False,
) -> TileConfig:  # fmt: skip
    extra: dict[str, Constant] = {"TMA": tma, "FRESH": fresh, "AHEAD": ahead}
    return TileConfig(m, n, warps, stages, warp_specialize=specialize, extra=extra)


# The first of each is the chosen one. 128 queries per program halve the traffic of keys and values against 64; the
# fp32 accumulator and scores of 128 x 128 need 128 registers of each of 256 threads. Without HGMMA the compiler gives
# each warp rows of its own only in tiles as high as the head is wide. SM 89 and 120 have 100 KB of shared memory.
# On SM 90 an H200 decided: what matters is that several independent programs fit a multiprocessor (two of four warps in
# bf16, three in FP8), so that the softmax of one runs beside the products of another; one program of eight warps does
# that less well, even when it multiplies ahead. With 128 registers a thread the assembler waits after each product.
# Warp specialisation is the compiler's documented way on SM 100; on SM 90 its second half was NaN on the H200.
# FP8 sums are kept per tile where the tensor cores do not add in full fp32; those of SM 100 do, in tensor memory.
_WIDE: Mapping[int, tuple[TileConfig, ...]] = {
    80: (_tile(128, 64, 8, 3), _tile(128, 32, 8, 4)),
    89: (_tile(128, 64, 8, 2), _tile(128, 32, 8, 3)),
    90: (
        _tile(128, 64, 4, 2, tma=True),
        _tile(128, 64, 8, 3, tma=True),
    ),
    100: (_tile(128, 128, 8, 2, tma=True, specialize=True), _tile(128, 128, 8, 2, tma=True)),
    120: (_tile(128, 64, 8, 2, tma=True), _tile(128, 32, 8, 3, tma=True)),
}
_FP8: Mapping[int, tuple[TileConfig, ...]] = {
    89: (_tile(128, 64, 8, 3, fresh=True), _tile(128, 64, 8, 2, fresh=True)),
    90: (
        _tile(64, 128, 4, 2, tma=True, fresh=True),
        _tile(64, 128, 4, 3, tma=True, fresh=True, ahead=True),
    ),
    100: (_tile(128, 128, 8, 2, tma=True, specialize=True), _tile(128, 128, 8, 3, tma=True)),
    120: (_tile(128, 64, 8, 2, tma=True, fresh=True), _tile(128, 64, 8, 3, tma=True, fresh=True)),
}
TILES: Mapping[str, Mapping[int, tuple[TileConfig, ...]]] = {"bf16": _WIDE, "fp16": _WIDE, "fp8": _FP8}

_FUNCTION = "stepvideo_kernels.attention.kernel:attention_kernel"
_INSTRUCTIONS_16: Mapping[int, str] = {80: r"HMMA", 89: r"HMMA", 90: r"HGMMA", 100: r"UTCHMMA", 120: r"HMMA"}
_INSTRUCTIONS_8: Mapping[int, str] = {89: r"QMMA\S*E4M3", 90: r"QGMMA\S*E4M3", 100: r"UTCQMMA", 120: r"QMMA\S*E4M3"}


def tile(variant: str, sm: int) -> TileConfig:
    """The chosen configuration; raises EngineError where there is none."""
    if sm not in TILES.get(variant, {}):
        raise EngineError(f"{SPEC.op} has no {variant} kernel for SM {sm}: it has {', '.join(TILES)} for SM {SMS}.")
    return TILES[variant][sm][0]


def padded_keys(keys: int) -> int:
    """Row length of the transposed v of the FP8 variant."""
    return (keys + VALUE_PADDING - 1) // VALUE_PADDING * VALUE_PADDING  # no negative numbers: ONNX divides towards zero


def grid(batch: int, heads: int, queries: int, tile: TileConfig) -> tuple[int, int, int]:
    """Programs along queries, then along heads of batch entries."""
    return -(-queries // tile.block_m), batch * heads, 1


def boxes(tile: TileConfig, *, fp8: bool) -> tuple[tuple[int, int, int], ...]:
    """Blocks of the tensor maps of q, k, v (as [B * H, ., .]) and out."""
    queries, keys = (1, tile.block_m, HEAD_DIM), (1, tile.block_n, HEAD_DIM)
    return queries, keys, (1, HEAD_DIM, tile.block_n) if fp8 else keys, queries


def constexprs(tile: TileConfig, *, fp8: bool) -> dict[str, Constant]:
    """The kernel's compile-time parameters."""
    return {
        "FP8": fp8,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        **tile.extra,
        "WARP_SPECIALIZE": tile.warp_specialize,
        "INTERPRET": False,
    }


def builds(full: FullSize) -> tuple[KernelBuild, ...]:
    """Variants are named after the type of q, and sized for self-attention."""
    return tuple(
        _build(full, sm, variant, tile, chosen=index == 0)
        for variant, tiles in TILES.items()
        for sm in tiles
        for index, tile in enumerate(tiles[sm])
    )


def _build(full: FullSize, sm: int, variant: str, tile: TileConfig, *, chosen: bool) -> KernelBuild:
    fp8 = variant == "fp8"
    written = "bf16" if fp8 else variant
    signature = _operands(tile, variant, written)
    aligned = [name for name, kind in signature.items() if kind.startswith("*")]
    signature |= dict.fromkeys(("q_scale", "k_scale", "v_scale"), POINTER_TYPES["fp32"])
    signature |= {**dict.fromkeys(("heads", "queries", "keys", "padded"), "i32"), "to_log2": "fp32"}
    values = constexprs(tile, fp8=fp8)
    keys = full.video_tokens
    planes = full.batch * full.heads
    return KernelBuild(
        op=SPEC.op,
        variant=variant,
        sm=sm,
        function=_FUNCTION,
        signature={**signature, **dict.fromkeys(values, "constexpr")},
        constexprs=values,
        tile=tile,
        chosen=chosen,
        aligned=(*aligned, "padded"),
        instructions=((_INSTRUCTIONS_8 if fp8 else _INSTRUCTIONS_16)[sm],),
        fp8_operands=fp8,
        no_spills=chosen,
        tile_work=_work(1, tile.block_m, keys, variant, written),
        full_work=_work(planes, full.video_tokens, keys, variant, written),
        shape=f"[{full.batch}, {full.heads}, {full.video_tokens}, {HEAD_DIM}] on {keys} keys",
    )


def _operands(tile: TileConfig, element: str, written: str) -> dict[str, str]:
    """Types of q, k, v and out in the signature: pointers, or tensor maps made by the host."""
    types = dict.fromkeys("qkv", POINTER_TYPES[element]) | {"out": POINTER_TYPES[written]}
    if tile.extra["TMA"]:
        blocks = boxes(tile, fp8=element == "fp8")
        types = {
            name: f"tensordesc<{kind.removeprefix('*')}[{','.join(map(str, block))}]>"
            for (name, kind), block in zip(types.items(), blocks, strict=True)
        }
    return types


def _work(planes: int, queries: int, keys: int, read: str, written: str) -> Work:
    """Two products of 2 * 128 operations and one exponential for each pair of query and key."""
    pairs = planes * queries * keys
    rows = planes * HEAD_DIM
    return Work(
        flops=4 * HEAD_DIM * pairs,
        bytes=rows * ((queries + 2 * keys) * ELEMENT_BYTES[read] + queries * ELEMENT_BYTES[written]),
        exps=pairs,
        precision="fp8" if read == "fp8" else "bf16",
    )
