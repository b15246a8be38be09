"""The plugins of `adaln_modulate`, `adaln_residual` and their FP8 forms."""

from collections.abc import Iterator, Mapping

from stepvideo_kernels.adaln_modulate import spec
from stepvideo_kernels.kernel_spec import Constant, TileConfig
from stepvideo_kernels.launch.parameters import Argument
from stepvideo_kernels.plugins.form import Operand, PluginForm, Shape, Shapes

_VECTORS = (Operand("weight", 1), Operand("bias", 1), Operand("scale", 2), Operand("shift", 2))
_OUT_SCALE = Operand("out_scale", 1, "fp32")


class AdalnModulate(PluginForm):
    """x [B, N, D], weight and bias [D], scale and shift [B, D] -> y [B, N, D]."""

    operator = "adaln_modulate"
    spec = spec.SPEC
    layout = "x and branch [B, N, D], weight and bias [D], gate, scale and shift [B, D]"
    elements: tuple[str, ...] = ("bf16", "fp16")
    inputs: tuple[Operand, ...] = (Operand("x", 3), *_VECTORS)
    outputs: tuple[Operand, ...] = (Operand("y", 3),)
    attributes: Mapping[str, float] = {"eps": 1e-5}

    def output_shapes(self, shapes: Shapes) -> tuple[Shape, ...]:
        return tuple(shapes["x"] for _ in self.outputs)

    def size_and_tokens(self, shapes: Shapes) -> tuple[int, int]:
        return shapes["x"][2], shapes["x"][1]

    def expected(self, shapes: Shapes) -> Iterator[tuple[str, Shape]]:
        batch, _, width = shapes["x"]
        known = {"branch": shapes["x"], "weight": (width,), "bias": (width,), "out_scale": (1,)}
        known |= dict.fromkeys(("gate", "scale", "shift"), (batch, width))
        yield from ((one.name, known[one.name]) for one in self.inputs[1:])

    def variant(self, element: str) -> str:
        written = self.outputs[-1].element
        return spec.variant_name("fp8" if written == "fp8" else element, residual=len(self.outputs) > 1)

    def constants(self, shapes: Shapes) -> dict[str, Constant]:
        return {"WIDTH": shapes["x"][2]}

    def grid(self, shapes: Shapes, tile: TileConfig) -> tuple[int, int, int]:
        batch, tokens, _ = shapes["x"]
        return spec.grid(batch, tokens, tile)

    def scalars(self, shapes: Shapes, attributes: Mapping[str, float]) -> dict[str, Argument]:
        return {"tokens": shapes["x"][1], "eps": attributes["eps"]}

    def tensors(self) -> Mapping[str, str]:
        unread = dict.fromkeys(("branch_ptr", "gate_ptr", "out_scale_ptr", "total_ptr"), "x")
        return {**unread, **{f"{one.name}_ptr": one.name for one in (*self.inputs, *self.outputs)}}


class AdalnModulateFp8(AdalnModulate):
    """The same with out_scale [1] fp32 -> y in E4M3."""

    operator = "adaln_modulate_fp8"
    elements: tuple[str, ...] = ("bf16",)
    inputs: tuple[Operand, ...] = (*AdalnModulate.inputs, _OUT_SCALE)
    outputs: tuple[Operand, ...] = (Operand("y", 3, "fp8"),)


class AdalnResidual(AdalnModulate):
    """x and branch [B, N, D], gate [B, D], the rest as above -> x + gate * branch, and y of that sum."""

    operator = "adaln_residual"
    inputs: tuple[Operand, ...] = (Operand("x", 3), Operand("branch", 3), Operand("gate", 2), *_VECTORS)
    outputs: tuple[Operand, ...] = (Operand("total", 3), Operand("y", 3))


class AdalnResidualFp8(AdalnResidual):
    """The same with out_scale [1] fp32 -> the sum in x's type, y in E4M3."""

    operator = "adaln_residual_fp8"
    elements: tuple[str, ...] = ("bf16",)
    inputs: tuple[Operand, ...] = (*AdalnResidual.inputs, _OUT_SCALE)
    outputs: tuple[Operand, ...] = (Operand("total", 3), Operand("y", 3, "fp8"))


FORMS: tuple[PluginForm, ...] = (AdalnModulate(), AdalnModulateFp8(), AdalnResidual(), AdalnResidualFp8())
