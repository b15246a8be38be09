"""The operators as ONNX nodes: schemas, and an export that keeps each operator as one node."""

import warnings
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

from stepvideo_kernels.choice import OPS
from stepvideo_kernels.kernel_spec import ONNX_DOMAIN
from stepvideo_kernels.launch.on_cuda import type_name
from stepvideo_kernels.plugins.onnx_nodes import operators, schema, translation_table
from stepvideo_serve.errors import EngineError


class Fused(nn.Module):
    """A residual and its modulation, a projection, and what attention needs of it, in FP8."""

    def forward(
        self, x: Tensor, branch: Tensor, vectors: Tensor, gains: Tensor, cos: Tensor, sin: Tensor, scale: Tensor
    ) -> tuple[Tensor, ...]:
        gate, factor, shift = vectors.unbind(1)
        total, y = torch.ops.stepvideo.adaln_residual(x, branch, gate, gains[0], gains[1], factor, shift, 2e-5)
        gains_128 = gains[0, :128], gains[1, :128]
        q, k, v = torch.ops.stepvideo.qkv_norm_rope_fp8(y, *gains_128, cos, sin, scale, scale, scale)
        return total, torch.ops.stepvideo.attention_fp8(q, k, v, scale, scale, scale)


def operands(tokens: int) -> tuple[Tensor, ...]:
    x, branch = torch.randn(2, 2, tokens, 768).bfloat16()
    tables = torch.randn(2, tokens, 128)
    return x, branch, torch.randn(2, 3, 768).bfloat16(), torch.randn(2, 768).bfloat16(), *tables, torch.ones(2)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> onnx.ModelProto:
    tokens = torch.export.Dim("tokens", min=2, max=38_400)
    by_tokens = {1: tokens}, {1: tokens}, None, None, {0: tokens}, {0: tokens}, None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # several axes share the name "tokens", as they should
        program = torch.onnx.export(
            Fused().eval(),
            operands(37),
            dynamo=True,
            opset_version=23,
            custom_translation_table=translation_table(),
            dynamic_shapes=by_tokens,
            verbose=False,
        )
    assert program is not None
    path: Path = tmp_path_factory.mktemp("onnx") / "fused.onnx"
    program.save(str(path))
    onnx.checker.check_model(str(path))
    return onnx.load(str(path))


def test_every_operator_is_one_node_with_its_attributes(model: onnx.ModelProto) -> None:
    nodes = [node for node in model.graph.node if node.domain == ONNX_DOMAIN]
    assert [node.op_type for node in nodes] == ["adaln_residual", "qkv_norm_rope_fp8", "attention_fp8"]
    residual, qkv, attention = nodes
    assert {one.name: one.f for one in residual.attribute} == {"eps": pytest.approx(2e-5)}
    assert {one.name: one.f for one in qkv.attribute} == {"eps": pytest.approx(1e-6)}
    assert (len(residual.input), len(residual.output)) == (7, 2)
    assert (len(qkv.input), len(qkv.output)) == (8, 3)
    assert list(qkv.output) == list(attention.input[:3])


def test_types_and_shapes_are_those_of_the_operators(model: onnx.ModelProto) -> None:
    known = {one.name: one.type.tensor_type for one in [*model.graph.value_info, *model.graph.output]}
    qkv = next(node for node in model.graph.node if node.op_type == "qkv_norm_rope_fp8")
    assert {known[name].elem_type for name in qkv.output} == {onnx.TensorProto.FLOAT8E4M3FN}
    assert [dim.dim_value or dim.dim_param for dim in known[qkv.output[0]].shape.dim] == [2, 2, "tokens", 128]
    assert known[model.graph.output[1].name].elem_type == onnx.TensorProto.BFLOAT16


def test_every_op_has_operators_with_a_schema() -> None:
    found = operators()
    names = [operator._schema.name.split("::")[1] for operator in found]
    assert all(any(name.startswith(op.split("_")[0]) for name in names) for op in OPS)
    for operator, name in zip(found, names, strict=True):
        made = schema(operator)
        assert (made.name, made.domain, made.since_version) == (name, ONNX_DOMAIN, 1)
        tensors = [argument.name for argument in operator._schema.arguments if str(argument.type) == "Tensor"]
        assert [one.name for one in made.inputs] == tensors
        assert len(made.outputs) == len(operator._schema.returns)
        assert set(made.attributes) == {argument.name for argument in operator._schema.arguments} - set(tensors)


def test_names_of_element_types() -> None:
    assert type_name(torch.float8_e4m3fn) == "fp8"
    with pytest.raises(EngineError, match=r"bf16, fp16, fp32, fp8, got torch\.int64"):
        type_name(torch.int64)
