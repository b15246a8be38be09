"""The plugins of `qkv_norm_rope` and `qkv_norm_rope_fp8`."""

from collections.abc import Iterator, Mapping

from stepvideo_kernels.kernel_spec import TileConfig
from stepvideo_kernels.launch.parameters import Argument
from stepvideo_kernels.plugins.form import UNKNOWN, Operand, PluginForm, Shape, Shapes
from stepvideo_kernels.qkv_norm_rope import spec

_TABLES = (Operand("rope_cos", 2, "fp32"), Operand("rope_sin", 2, "fp32"))
_SCALES = ("q_scale", "k_scale", "v_scale")


class QkvNormRope(PluginForm):
    """qkv [B, N, 384 H], gains [128], tables [N, 128] fp32 -> q, k, v [B, H, N, 128]."""

    operator = "qkv_norm_rope"
    spec = spec.SPEC
    layout = "qkv [B, N, heads * 3 * 128], gains [128], tables [N, 128]"
    elements: tuple[str, ...] = ("bf16", "fp16")
    inputs: tuple[Operand, ...] = (Operand("qkv", 3), Operand("q_gain", 1), Operand("k_gain", 1), *_TABLES)
    outputs: tuple[Operand, ...] = (Operand("q", 4), Operand("k", 4), Operand("v", 4))
    attributes: Mapping[str, float] = {"eps": 1e-6}

    def output_shapes(self, shapes: Shapes) -> tuple[Shape, ...]:
        batch, tokens, width = shapes["qkv"]
        rows = (batch, width // (3 * spec.HEAD_DIM), tokens, spec.HEAD_DIM)
        return rows, rows, rows

    def size_and_tokens(self, shapes: Shapes) -> tuple[int, int]:
        return shapes["q_gain"][0], shapes["qkv"][1]

    def expected(self, shapes: Shapes) -> Iterator[tuple[str, Shape]]:
        batch, tokens, width = shapes["qkv"]
        if width != UNKNOWN:
            yield "qkv", (batch, tokens, max(1, width // (3 * spec.HEAD_DIM)) * 3 * spec.HEAD_DIM)
        yield "k_gain", (spec.HEAD_DIM,)
        for name in ("rope_cos", "rope_sin"):
            yield name, (tokens, spec.HEAD_DIM)

    def variant(self, element: str) -> str:
        return element

    def grid(self, shapes: Shapes, tile: TileConfig) -> tuple[int, int, int]:
        batch, tokens, width = shapes["qkv"]
        return spec.grid(batch, tokens, width // (3 * spec.HEAD_DIM), tile, transposed=False)

    def scalars(self, shapes: Shapes, attributes: Mapping[str, float]) -> dict[str, Argument]:
        _, tokens, width = shapes["qkv"]
        heads, row = width // (3 * spec.HEAD_DIM), self.output_shapes(shapes)[2][-1]
        return {"tokens": tokens, "heads": heads, "padded": row, "eps": attributes["eps"]}

    def tensors(self) -> Mapping[str, str]:
        own = {f"{name}_ptr": name for name in ("qkv", "q_gain", "k_gain", "q", "k", "v")}
        unread = {f"{name}_ptr": "qkv" for name in _SCALES}
        return {**own, "cos_ptr": "rope_cos", "sin_ptr": "rope_sin", **unread}


class QkvNormRopeFp8(QkvNormRope):
    """The same with scales [H] fp32 -> E4M3 q, k [B, H, N, 128] and v [B, H, 128, N rounded up to 16]."""

    operator = "qkv_norm_rope_fp8"
    layout = "qkv [B, N, heads * 3 * 128], gains [128], tables [N, 128], scales [heads]"
    elements: tuple[str, ...] = ("bf16",)
    inputs: tuple[Operand, ...] = (*QkvNormRope.inputs, *(Operand(name, 1, "fp32") for name in _SCALES))
    outputs: tuple[Operand, ...] = (Operand("q", 4, "fp8"), Operand("k", 4, "fp8"), Operand("v", 4, "fp8"))

    def output_shapes(self, shapes: Shapes) -> tuple[Shape, ...]:
        batch, tokens, width = shapes["qkv"]
        heads = width // (3 * spec.HEAD_DIM)
        padded = spec.padded_tokens(tokens)
        rows = (batch, heads, tokens, spec.HEAD_DIM)
        return rows, rows, (batch, heads, spec.HEAD_DIM, padded)

    def expected(self, shapes: Shapes) -> Iterator[tuple[str, Shape]]:
        yield from super().expected(shapes)
        width = shapes["qkv"][2]
        for name in _SCALES:
            yield name, (UNKNOWN if width == UNKNOWN else width // (3 * spec.HEAD_DIM),)

    def variant(self, element: str) -> str:
        del element
        return "fp8"

    def grid(self, shapes: Shapes, tile: TileConfig) -> tuple[int, int, int]:
        batch, tokens, width = shapes["qkv"]
        return spec.grid(batch, tokens, width // (3 * spec.HEAD_DIM), tile, transposed=True)

    def tensors(self) -> Mapping[str, str]:
        return {**super().tensors(), **{f"{name}_ptr": name for name in _SCALES}}


FORMS: tuple[PluginForm, ...] = (QkvNormRope(), QkvNormRopeFp8())
