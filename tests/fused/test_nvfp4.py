"""NVFP4: codes and scales by their definition, what they lose, and the graph that TensorRT gets."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

from export.graphs.recipe import Recipe
from export.graphs.translation import DYNAMIC_QUANTIZE, translation_table
from export.graphs.writer import write_graph
from stepvideo_serve.engine.spec import Dim, EngineSpec, TensorSpec
from stepvideo_serve.errors import ExportError
from stepvideo_serve.fused.nvfp4 import (
    Fp4Linear,
    block_scales,
    decode,
    encode,
    global_scale,
    round_trip,
    weight,
)

CHANNELS = 64
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
SPEC = EngineSpec(
    "linear",
    (TensorSpec("x", "bfloat16", (1, "tokens", CHANNELS)),),
    (TensorSpec("y", "bfloat16", (1, "tokens", 48)),),
    {"tokens": Dim(1, 32, 4096)},
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_codes_are_those_of_e2m1() -> None:
    """Every multiple of 1/64 up to beyond the largest, among them all ties."""
    x = torch.arange(0, 513) / 64
    distance = (x[:, None] - torch.tensor(E2M1)).abs()
    nearest = distance == distance.amin(dim=1, keepdim=True)
    nearest[nearest.sum(dim=1) == 2, 1::2] = False  # of two, the even code
    expected = nearest.int().argmax(dim=1)
    assert torch.equal(encode(x).int(), expected.int())
    assert torch.equal(decode(encode(x)), torch.tensor(E2M1)[expected])
    assert torch.equal(encode(-x[1:]).int(), expected[1:].int() + 8)
    assert torch.equal(decode(encode(-x)), -decode(encode(x)))


def test_scales_are_those_of_the_definition() -> None:
    x = normal(3, 4, CHANNELS) * 5
    g = global_scale(float(x.abs().max()))
    assert float(g) == pytest.approx(float(x.abs().max()) / 2688)
    scales = block_scales(x, g)
    assert scales.shape == (3, 4, CHANNELS // 16)
    assert float(scales.float().max()) == 448, "the block with the largest number has the largest scale"
    amax = x.reshape(3, 4, -1, 16).abs().amax(-1) / 6 / g
    assert torch.equal(scales.float(), amax.to(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("value", [0.0, 1e-30, 3.0])
def test_blocks_of_one_number_come_back(value: float) -> None:
    """Zeros stay zeros, what is far below the range vanishes, and nothing becomes NaN."""
    x = torch.full((2, 32), value)
    back = round_trip(x, global_scale(3.0))
    assert torch.allclose(back, x if value > 1 else torch.zeros_like(x), rtol=1e-6)


def test_what_is_lost() -> None:
    """E2M1 has one bit of mantissa: numbers next to each other differ by up to 50 %, so that at most a quarter of a
    number above the smallest steps is lost, and about a tenth of the norm of normal ones."""
    x = normal(64, 1024)
    back = round_trip(x, global_scale(float(x.abs().max())))
    lost = float((back - x).norm() / x.norm())
    assert 0.05 < lost < 0.15
    large = x.abs() > x.reshape(64, -1, 16).abs().amax(-1, keepdim=True).expand(-1, -1, 16).reshape_as(x) / 3
    assert float(((back - x).abs() / x.abs())[large].max()) < 0.25


def test_a_linear_layer_is_what_its_codes_say() -> None:
    linear = nn.Linear(CHANNELS, 48, bias=False).requires_grad_(False)
    x = normal(5, CHANNELS)
    fp4 = Fp4Linear(linear, float(x.abs().max()))
    assert fp4.weight.shape == (48, CHANNELS // 2)
    wide = weight(fp4.weight, fp4.scales, fp4.g)
    assert float((wide - linear.weight).norm() / linear.weight.norm()) < 0.15
    assert torch.allclose(fp4(x), round_trip(x, fp4.input_g) @ wide.t())
    assert 0.02 < float((fp4(x) - linear(x)).norm() / linear(x).norm()) < 0.3


def test_the_graph_has_fp4_weights_and_quantises_its_input(tmp_path: Path) -> None:
    module = Fp4Linear(nn.Linear(CHANNELS, 48, bias=False), 4.0)
    path = tmp_path / "linear.onnx"
    write_graph(module, SPEC, path, translation_table())
    model = onnx.load(str(path))
    onnx.checker.check_model(model, full_check=True)
    assert [node.op_type for node in model.graph.node if node.domain == "trt"] == [DYNAMIC_QUANTIZE]
    codes = [tensor for tensor in model.graph.initializer if tensor.data_type == TensorProto.FLOAT4E2M1]
    assert [list(tensor.dims) for tensor in codes] == [[48, CHANNELS]]
    # The weight's branch, computed by ONNX's own reference: the same numbers as in torch.
    consumer = next(node for node in model.graph.node if codes[0].name in node.input)
    needed = [node for node in model.graph.node if node.output[0] == consumer.input[1]]
    wide = onnx.helper.make_tensor_value_info(consumer.output[0], TensorProto.FLOAT, [48, CHANNELS])
    branch = onnx.helper.make_graph([*needed, consumer], "branch", [], [wide], model.graph.initializer)
    [found] = ReferenceEvaluator(onnx.helper.make_model(branch, opset_imports=model.opset_import)).run(None, {})
    assert np.array_equal(found, weight(module.weight, module.scales, module.g).numpy())


def test_it_needs_calibration() -> None:
    with pytest.raises(ExportError, match="--calibration goes with --precision fp8 or nvfp4, got none"):
        Recipe("nvfp4")
