"""What adaln_modulate accepts, its tilings and its cost."""

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

FLOPS_PER_VALUE = 8
FLOPS_PER_RESIDUAL_VALUE = 2

SPEC = KernelSpec(
    op="adaln_modulate",
    dtypes={"bf16": 80, "fp16": 80},
    outputs={"bf16": 80, "fp16": 80, "fp8": FP8_MIN_SM},
    size_name="width",
    size_multiple=16,
    size_max=8192,
    layouts=("[batch, tokens, width] contiguous",),
    sms=SMS,
    max_tokens=1 << 24,
    requires="gate, weight, bias, scale and shift in the type of x, out_scale [1] in fp32; binaries are for one width",
)

# The kernel streams: it is limited by device memory. Two programs of 8 warps on an SM overlap one's reduction with the
# other's loads; SM 89 and 120 have 100 KB of shared memory and get a shallower pipeline.
_DEEP = TileConfig(32, 0, 8, 3)
_SHALLOW = TileConfig(32, 0, 8, 2)
_BROAD = TileConfig(32, 0, 16, 2)
_SHORT = TileConfig(16, 0, 8, 2)

# The first of each is the chosen one; for SM 80, 90 and 100, then for SM 89 and 120. fp16 is as bf16.
_BY_VARIANT: Mapping[str, tuple[tuple[TileConfig, ...], tuple[TileConfig, ...]]] = {
    "bf16": ((_DEEP, _SHORT), (_SHALLOW, _BROAD)),
    "fp16": ((_DEEP,), (_SHALLOW,)),
    "fp8": ((_DEEP, _BROAD), (_SHALLOW, _BROAD)),
    "residual-bf16": ((_DEEP, _SHORT), (_SHALLOW, _BROAD)),
    "residual-fp16": ((_DEEP,), (_SHALLOW,)),
    "residual-fp8": ((_DEEP, _SHALLOW), (_SHALLOW, _BROAD)),
}
TILES: Mapping[str, Mapping[int, tuple[TileConfig, ...]]] = {
    variant: {
        sm: tight if sm in (89, 120) else roomy for sm in SMS if sm >= SPEC.outputs[variant.removeprefix("residual-")]
    }
    for variant, (roomy, tight) in _BY_VARIANT.items()
}


def tile(variant: str, sm: int) -> TileConfig:
    """The chosen configuration; raises EngineError where there is none."""
    if sm not in TILES.get(variant, {}):
        raise EngineError(f"{SPEC.op} has no {variant} kernel for SM {sm}: it has {', '.join(TILES)} for SM {SMS}.")
    return TILES[variant][sm][0]


def block_width(width: int) -> int:
    """The width rounded up to a power of two, as the language wants its blocks."""
    return 1 << (width - 1).bit_length()


def grid(batch: int, tokens: int, tile: TileConfig) -> tuple[int, int, int]:
    """Programs along tokens and batch."""
    return -(-tokens // tile.block_m), batch, 1


def builds(full: FullSize) -> tuple[KernelBuild, ...]:
    """Variants: with the residual or without, by the type of y; FP8 ones read bf16."""
    return tuple(
        _build(full, sm, variant, tile, chosen=index == 0)
        for variant, tiles in TILES.items()
        for sm in tiles
        for index, tile in enumerate(tiles[sm])
    )


def variant_name(written: str, *, residual: bool) -> str:
    """E.g. "bf16" and "residual-bf16"."""
    return f"residual-{written}" if residual else written


def _build(full: FullSize, sm: int, variant: str, tile: TileConfig, *, chosen: bool) -> KernelBuild:
    residual, written = variant.startswith("residual-"), variant.removeprefix("residual-")
    read = "bf16" if written == "fp8" else written
    inputs = ("x_ptr", "branch_ptr", "gate_ptr", "weight_ptr", "bias_ptr", "scale_ptr", "shift_ptr")
    pointers = dict.fromkeys(inputs, POINTER_TYPES[read])
    pointers |= {
        "out_scale_ptr": POINTER_TYPES["fp32"],
        "total_ptr": POINTER_TYPES[read],
        "y_ptr": POINTER_TYPES[written],
    }
    constexprs = {
        "HAS_RESIDUAL": residual,
        "WIDTH": full.width,
        "BLOCK_D": block_width(full.width),
        "ROWS_PER_PROGRAM": tile.block_m,
        "STAGES": tile.num_stages,
    }
    # Stores of 8 bytes, though 16 would do: one layout then fits the streams of 2-byte values and that of E4M3, and no
    # value has to change its thread.
    narrow = ("y_ptr",) if written == "fp8" else ()
    return KernelBuild(
        op=SPEC.op,
        variant=variant,
        sm=sm,
        function="stepvideo_kernels.adaln_modulate.kernel:adaln_modulate_kernel",
        signature={**pointers, "tokens": "i32", "eps": "fp32", **dict.fromkeys(constexprs, "constexpr")},
        constexprs=constexprs,
        tile=tile,
        chosen=chosen,
        aligned=tuple(name for name in pointers if name not in narrow),
        narrow=narrow,
        tile_work=_work(tile.block_m, 1, full.width, read, written, residual=residual),
        full_work=_work(full.video_tokens, full.batch, full.width, read, written, residual=residual),
        shape=f"[{full.batch}, {full.video_tokens}, {full.width}]",
    )


def _work(tokens: int, batch: int, width: int, read: str, written: str, *, residual: bool) -> Work:
    values = batch * tokens * width
    streams = 2 * ELEMENT_BYTES[read] + ELEMENT_BYTES[read] if residual else ELEMENT_BYTES[read]
    vectors = (2 + (3 if residual else 2) * batch) * width * ELEMENT_BYTES[read]
    flops = FLOPS_PER_VALUE + (FLOPS_PER_RESIDUAL_VALUE if residual else 0)
    return Work(flops=values * flops, bytes=values * (streams + ELEMENT_BYTES[written]) + vectors)
