"""The plugin of `vae_attention`."""

from collections.abc import Iterator, Mapping

from stepvideo_kernels.kernel_spec import Constant, TileConfig
from stepvideo_kernels.launch.parameters import Argument
from stepvideo_kernels.plugins.form import Operand, PluginForm, Shape, Shapes
from stepvideo_kernels.vae_attention import spec


class VaeAttention(PluginForm):
    """q, k and v [B, N, C], C a multiple of 32 up to 512 -> [B, N, C]."""

    operator = "vae_attention"
    spec = spec.SPEC
    layout = "q, k and v [B, N, C]"
    elements: tuple[str, ...] = ("bf16", "fp16")
    inputs: tuple[Operand, ...] = (Operand("q", 3), Operand("k", 3), Operand("v", 3))
    outputs: tuple[Operand, ...] = (Operand("out", 3),)
    attributes: Mapping[str, float] = {}

    def output_shapes(self, shapes: Shapes) -> tuple[Shape, ...]:
        return (shapes["q"],)

    def size_and_tokens(self, shapes: Shapes) -> tuple[int, int]:
        return shapes["q"][2], shapes["q"][1]

    def expected(self, shapes: Shapes) -> Iterator[tuple[str, Shape]]:
        yield "k", shapes["q"]
        yield "v", shapes["q"]

    def variant(self, element: str) -> str:
        return element

    def constants(self, shapes: Shapes) -> dict[str, Constant]:
        return {"WIDTH": shapes["q"][2]}

    def grid(self, shapes: Shapes, tile: TileConfig) -> tuple[int, int, int]:
        batch, tokens, width = shapes["q"]
        return spec.grid(batch, tokens, width, tile)

    def scalars(self, shapes: Shapes, attributes: Mapping[str, float]) -> dict[str, Argument]:
        del attributes
        _, tokens, width = shapes["q"]
        return {"tokens": tokens, "to_log2": spec.to_log2(width)}

    def tensors(self) -> Mapping[str, str]:
        return {name: name for name in ("q", "k", "v", "out")}


FORMS: tuple[PluginForm, ...] = (VaeAttention(),)
