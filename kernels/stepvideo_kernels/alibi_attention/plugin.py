"""The plugin of `alibi_attention`."""

from collections.abc import Iterator, Mapping

from stepvideo_kernels.alibi_attention import spec
from stepvideo_kernels.kernel_spec import TileConfig
from stepvideo_kernels.launch.parameters import Argument
from stepvideo_kernels.plugins.form import UNKNOWN, Operand, PluginForm, Shape, Shapes


class AlibiAttention(PluginForm):
    """qkv [B, L, 128 (H + 2 G)], slopes [H] fp32 -> [B, L, 128 H]."""

    operator = "alibi_attention"
    spec = spec.SPEC
    layout = "qkv [B, L, 128 (H + 2 G)], slopes [H]"
    elements: tuple[str, ...] = ("bf16", "fp16")
    inputs: tuple[Operand, ...] = (Operand("qkv", 3), Operand("slopes", 1, "fp32"))
    outputs: tuple[Operand, ...] = (Operand("out", 3),)
    attributes: Mapping[str, float] = {}

    def output_shapes(self, shapes: Shapes) -> tuple[Shape, ...]:
        batch, tokens, _ = shapes["qkv"]
        return ((batch, tokens, shapes["slopes"][0] * spec.HEAD_DIM),)

    def size_and_tokens(self, shapes: Shapes) -> tuple[int, int]:
        """The head size is 128 where the channels divide so; see `expected`."""
        return spec.HEAD_DIM, shapes["qkv"][1]

    def expected(self, shapes: Shapes) -> Iterator[tuple[str, Shape]]:
        """Raises EngineError when the channels do not fit the heads."""
        width, heads = shapes["qkv"][2], shapes["slopes"][0]
        if UNKNOWN not in (width, heads):
            spec.groups(width, heads)
        return iter(())

    def variant(self, element: str) -> str:
        return element

    def grid(self, shapes: Shapes, tile: TileConfig) -> tuple[int, int, int]:
        batch, tokens, _ = shapes["qkv"]
        return spec.grid(batch, tokens, shapes["slopes"][0], tile)

    def scalars(self, shapes: Shapes, attributes: Mapping[str, float]) -> dict[str, Argument]:
        del attributes
        _, tokens, width = shapes["qkv"]
        heads = shapes["slopes"][0]
        return {"tokens": tokens, "heads": heads, "groups": spec.groups(width, heads), "scale": spec.SCALE}

    def tensors(self) -> Mapping[str, str]:
        return {"qkv": "qkv", "slopes": "slopes", "out": "out"}


FORMS: tuple[PluginForm, ...] = (AlibiAttention(),)
