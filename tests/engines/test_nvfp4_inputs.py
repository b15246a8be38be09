"""What of NVFP4 may be an input: codes and block scales, but not the scale of a tensor, which costs the product in four
bits."""

from pathlib import Path

import onnx
from onnx import TensorProto
from torch import nn

from export.graphs.translation import TRT_DOMAIN, translation_table
from export.graphs.writer import write_graph
from stepvideo_serve.engine.spec import Dim, EngineSpec, TensorSpec
from stepvideo_serve.fused.nvfp4 import Fp4Linear
from tests.kernels.plugin_builds import Job, build

SM = 120
INPUTS, OUTPUTS = 256, 512
SPEC = EngineSpec(
    "linear",
    (TensorSpec("x", "bfloat16", (1, "tokens", INPUTS)),),
    (TensorSpec("y", "bfloat16", (1, "tokens", OUTPUTS)),),
    {"tokens": Dim(32, 64, 1024)},
)


def with_inputs(path: Path, out: Path, *kinds: int) -> Path:
    """The graph with what of its weight is of these types as inputs. Its scalar scale is the one that does not go into
    the quantisation of the layer's own input."""
    model = onnx.load(str(path))
    of_input = {name for node in model.graph.node if node.domain == TRT_DOMAIN for name in node.input}
    wanted = [tensor for tensor in model.graph.initializer if tensor.data_type in kinds and tensor.name not in of_input]
    assert len(wanted) == len(kinds)
    model.graph.input.extend(onnx.helper.make_tensor_value_info(one.name, one.data_type, one.dims) for one in wanted)
    kept = [tensor for tensor in model.graph.initializer if tensor not in wanted]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    onnx.save(model, str(out))
    return out


def test_codes_and_block_scales_may_be_inputs_but_not_the_scale_of_a_tensor(root: Path, tmp_path: Path) -> None:
    """TensorRT-RTX 1.7 builds the last one too, but decodes both operands and multiplies in bf16."""
    constant = tmp_path / "constant.onnx"
    write_graph(Fp4Linear(nn.Linear(INPUTS, OUTPUTS, bias=False), 4.0), SPEC, constant, translation_table())
    blocks = (TensorProto.FLOAT4E2M1, TensorProto.FLOAT8E4M3FN)
    graphs = [
        constant,
        with_inputs(constant, tmp_path / "blocks.onnx", *blocks),
        with_inputs(constant, tmp_path / "all.onnx", *blocks, TensorProto.FLOAT),
    ]
    profile = {"x": [[1, tokens, INPUTS] for tokens in (32, 64, 1024)]}
    results = build([Job(str(path), SM, profile) for path in graphs], root, tmp_path)
    products = [
        [line.partition("Outputs:")[0] for line in result.plan.splitlines() if "LayerType: gemm" in line]
        for result in results
    ]
    assert all(result.engine for result in results)
    assert ["FP4E2M1" in "".join(lines) for lines in products] == [True, True, False]
    assert "BFloat16" in "".join(products[2])
