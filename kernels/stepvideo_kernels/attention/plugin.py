"""The plugins of `attention` and `attention_fp8`."""

from collections.abc import Iterator, Mapping

from stepvideo_kernels.attention import spec
from stepvideo_kernels.kernel_spec import TileConfig
from stepvideo_kernels.launch.parameters import Argument
from stepvideo_kernels.plugins.form import UNKNOWN, Operand, PluginForm, Shape, Shapes

_SCALES = ("q_scale", "k_scale", "v_scale")


class Attention(PluginForm):
    """q [B, H, N, 128], k and v [B, H, L, 128] -> [B, N, 128 H]."""

    operator = "attention"
    spec = spec.SPEC
    layout = "q [B, H, N, 128], k and v [B, H, L, 128]"
    elements: tuple[str, ...] = ("bf16", "fp16")
    inputs: tuple[Operand, ...] = (Operand("q", 4), Operand("k", 4), Operand("v", 4))
    outputs: tuple[Operand, ...] = (Operand("out", 3),)
    attributes: Mapping[str, float] = {}

    def output_shapes(self, shapes: Shapes) -> tuple[Shape, ...]:
        batch, heads, tokens, head = shapes["q"]
        return ((batch, tokens, heads * head),)

    def size_and_tokens(self, shapes: Shapes) -> tuple[int, int]:
        return shapes["q"][3], max(shapes["q"][2], shapes["k"][2])

    def expected(self, shapes: Shapes) -> Iterator[tuple[str, Shape]]:
        batch, heads, _, head = shapes["q"]
        yield "k", (batch, heads, UNKNOWN, head)
        yield "v", (batch, heads, shapes["k"][2], head)

    def variant(self, element: str) -> str:
        return element

    def grid(self, shapes: Shapes, tile: TileConfig) -> tuple[int, int, int]:
        batch, heads, queries, _ = shapes["q"]
        return spec.grid(batch, heads, queries, tile)

    def scalars(self, shapes: Shapes, attributes: Mapping[str, float]) -> dict[str, Argument]:
        del attributes
        _, heads, queries, _ = shapes["q"]
        return {"heads": heads, "queries": queries, "keys": shapes["k"][2], "padded": 0, "to_log2": spec.TO_LOG2}

    def tensors(self) -> Mapping[str, str]:
        return {"q": "q", "k": "k", "v": "v", "out": "out", **dict.fromkeys(_SCALES, "q")}

    def plane(self, name: str, shape: Shape) -> Shape:
        """Batch entries and heads are one axis."""
        return (shape[0] * shape[1], *shape[2:]) if name in ("q", "k", "v") else shape


class AttentionFp8(Attention):
    """E4M3 q [B, H, N, 128], k [B, H, L, 128], v [B, H, 128, L rounded up to 16], scales [H] fp32 -> bf16."""

    operator = "attention_fp8"
    layout = "q [B, H, N, 128], k [B, H, L, 128], v [B, H, 128, L rounded up to 16], scales [H]"
    elements: tuple[str, ...] = ("fp8",)
    inputs: tuple[Operand, ...] = (*Attention.inputs, *(Operand(name, 1, "fp32") for name in _SCALES))
    outputs: tuple[Operand, ...] = (Operand("out", 3, "bf16"),)

    def expected(self, shapes: Shapes) -> Iterator[tuple[str, Shape]]:
        batch, heads, _, head = shapes["q"]
        keys = shapes["k"][2]
        yield "k", (batch, heads, UNKNOWN, head)
        yield "v", (batch, heads, head, UNKNOWN if keys == UNKNOWN else spec.padded_keys(keys))
        for name in _SCALES:
            yield name, (heads,)

    def scalars(self, shapes: Shapes, attributes: Mapping[str, float]) -> dict[str, Argument]:
        return {**super().scalars(shapes, attributes), "padded": shapes["v"][3]}

    def tensors(self) -> Mapping[str, str]:
        return {**super().tensors(), **{name: name for name in _SCALES}}


FORMS: tuple[PluginForm, ...] = (Attention(), AttentionFp8())
