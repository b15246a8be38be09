"""What a plan must hold, and that one which does not is refused."""

import re
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from export.engines.child import Job
from export.engines.engine_plan import Plan, PlanLayer, parse_plan
from export.engines.expectations import GIB, Expected, activation_bound, expected_of, violations
from export.engines.process import run_child
from export.engines.profiles import profile_spec
from export.engines.toolkit import check_target, child_environment
from stepvideo_serve.engine.manifest import Manifest
from stepvideo_serve.engine.spec import Dim, EngineSpec, TensorSpec
from stepvideo_serve.errors import ExportError
from stepvideo_serve.geometry import VideoGeometry
from tests.engines.conftest import build

GEMM = (
    "Name: node_linear_myl0_2, LayerType: gemm, Inputs: [ { Name: x, Dimensions: [1,-1,256], Strides: [-1,256,1], "
    "StrideOrder: [2,1,0], Datatype: FP8, Format: (Linear) Row major linear format }], Constants: [ { Name: w, "
    "Dimensions: [1,256,768], Strides: [196608,768,1], StrideOrder: [2,1,0], Datatype: FP8, Format: (Linear) }, "
    "{ Name: alpha, Dimensions: [1], Strides: [1], StrideOrder: [0], Datatype: Float, Format: (Linear) }], "
    "Outputs: [ { Name: y, Dimensions: [1,-1,768], Strides: [-1,768,1], StrideOrder: [2,1,0], Datatype: BFloat16, "
    "Format: (Linear) }], TacticName: __myelin_CASK_STUB, StreamId: 0, Metadata: [ONNX Layer: node_linear]"
    "[ONNX Layer: node_dequantize]"
)
BINDING = (
    " Name: x, IOMode: Input, DataType: BFloat16, Dimensions: [1,-1,256], Location: Device, IsShapeInferenceIO: false, "
    "ProfileInfo: [ { MinShape: [1,32,256], OptShape: [1,48,256], MaxShape: [1,64,256], Format: Row major }]"
)
TOTALS = "[INFO] Total Activation Memory: 123 bytes\n[INFO] Total Weights Memory: 456 bytes\n"
LOG = f"{TOTALS}[VERBOSE] Layers:\n{GEMM}\n\nI/O Tensors:\n{BINDING}\n"
NOTHING = Expected((), (), (), (), (), activation_bytes=GIB)


def test_parse() -> None:
    plan = parse_plan(LOG)
    (layer,) = plan.layers
    assert (layer.name, layer.kind, layer.tactic) == ("node_linear_myl0_2", "gemm", "__myelin_CASK_STUB")
    assert layer.onnx_nodes == ("node_linear", "node_dequantize")
    assert (layer.inputs[0].dims, layer.inputs[0].dtype) == ((1, -1, 256), "FP8")
    assert layer.weight is not None
    assert (layer.weight.name, layer.weight.dims) == ("w", (1, 256, 768))
    assert layer.outputs[0].dtype == "BFloat16"
    assert plan.bindings[0].profile == ((1, 32, 256), (1, 48, 256), (1, 64, 256))
    assert (plan.activation_bytes, plan.weight_bytes) == (123, 456)


def test_a_plan_must_say_how_much_memory_it_takes() -> None:
    with pytest.raises(ExportError, match="must print the total of its weights memory, found none"):
        parse_plan(LOG.replace("Weights", "Other"))


def test_a_log_without_a_plan() -> None:
    with pytest.raises(ExportError, match="found 0 layers and 0 tensors in 1 lines"):
        parse_plan("[INFO] nothing")


@pytest.mark.parametrize(
    ("expected", "message"),
    [
        (replace(NOTHING, fp8_products=("node_linear",)), None),
        (
            replace(NOTHING, fp8_products=("node_linear", "other")),
            "2 FP8 GEMMs were expected, 1 found; not in FP8: other",
        ),
        (replace(NOTHING, attentions=("softmax",)), "1 fused attention kernels were expected, 0 found; .*: softmax"),
        (replace(NOTHING, plugins=("node_attention",)), "1 plugin layers were expected, missing: node_attention"),
        (replace(NOTHING, activation_bytes=122), "activations of at most .* were expected, found"),
    ],
)
def test_violations(expected: Expected, message: str | None) -> None:
    found = violations(parse_plan(LOG), expected)
    if message is None:
        assert not found
    else:
        assert len(found) == 1
        assert re.search(message, found[0])


def test_a_gemm_in_fp32_is_allowed_where_the_graph_says_so() -> None:
    plan = parse_plan(LOG.replace("Datatype: FP8", "Datatype: Float"))
    assert "no fp32 GEMM was expected but 0, found also: node_linear_myl0_2" in violations(plan, NOTHING)[0]
    assert not violations(plan, replace(NOTHING, fp32_products=("node_linear",)))


def test_fp8_block_and_step_llm(fp8_graphs: Path, tmp_path: Path) -> None:
    for sm in (89, 120):
        out = tmp_path / str(sm)
        done = build(fp8_graphs, out, sm=sm)
        assert done.returncode == 0, done.stdout + done.stderr
        graphs = Manifest.load(out).graphs
        block, llm = (graphs[name].extras["plan"] for name in ("dit_block_00", "step_llm"))
        assert (block["gemms"], block["fp8_gemms"], block["fused_attentions"]) == (6, 6, 2)
        assert llm["fp8_gemms"] == llm["gemms"]
        assert llm["fused_attentions"] == 2


def test_nvfp4_block_and_step_llm(nvfp4_graphs: Path, tmp_path: Path) -> None:
    """Every product with a weight has four-bit operands; attention has FP8, as with FP8."""
    done = build(nvfp4_graphs, tmp_path / "out", sm=120)
    assert done.returncode == 0, done.stdout + done.stderr
    graphs = Manifest.load(tmp_path / "out").graphs
    block, llm = (graphs[name].extras["plan"] for name in ("dit_block_00", "step_llm"))
    assert (block["gemms"], block["fp4_gemms"], block["fp8_gemms"], block["fused_attentions"]) == (6, 6, 0, 2)
    assert llm["fp4_gemms"] == llm["gemms"]
    assert graphs["dit_block_00"].extras["fp8"] == {"linears": 0, "fp4_linears": 6, "attentions": 1}
    with pytest.raises(ExportError, match="nvfp4 needs SM 100 or newer, got 89"):
        check_target("tensorrt_rtx", 89, "nvfp4")


def test_a_product_that_is_not_in_fp4_is_found(fp8_graphs: Path, tmp_path: Path) -> None:
    spec = profile_spec(Manifest.load(fp8_graphs).graph("dit_block_00").spec, (VideoGeometry(17, 64, 64),), fixed=False)
    asked = expected(fp8_graphs, spec)
    plan = plan_of(fp8_graphs / "dit_block_00.onnx", spec, tmp_path)
    wrong = violations(plan, replace(asked, fp8_products=(), fp4_products=asked.fp8_products))
    count = len(asked.fp8_products)
    assert any(f"{count} FP4 GEMMs were expected, 0 found" in sentence for sentence in wrong)


def test_fp8_attention_below_32_tokens_is_found_to_write_its_scores(fp8_graphs: Path, tmp_path: Path) -> None:
    """Why profiles begin at 32: the builder gives another plan without a word."""
    spec = Manifest.load(fp8_graphs).graph("dit_block_00").spec
    short = replace(spec, dims={**spec.dims, "tokens": Dim(3, 48, 64)})
    wrong = violations(plan_of(fp8_graphs / "dit_block_00.onnx", short, tmp_path), expected(fp8_graphs, short))
    assert any("fused attention kernels were expected" in sentence for sentence in wrong)
    long = profile_spec(spec, (VideoGeometry(17, 64, 64),), fixed=False)
    assert not violations(plan_of(fp8_graphs / "dit_block_00.onnx", long, tmp_path), expected(fp8_graphs, long))


def expected(graphs: Path, spec: EngineSpec) -> Expected:
    return expected_of(graphs / f"{spec.name}.onnx", spec)


def plan_of(onnx_file: Path, spec: EngineSpec, folder: Path) -> Plan:
    engine, log, result = (str(folder / name) for name in ("engine", "log", "result"))
    job = Job("tensorrt_rtx", 89, str(onnx_file), engine, log, result, spec.profile())
    run_child(job, folder, child_environment("tensorrt_rtx", folder / "lib"), lambda _: None)
    return parse_plan((folder / "log").read_text(encoding="utf-8"))


def test_the_video_vae_goes_by_blocks_of_queries(vae_graphs: Path, tmp_path: Path) -> None:
    done = build(vae_graphs, tmp_path / "out")
    assert done.returncode == 0, done.stdout + done.stderr
    for name, least in (("vae_decoder", 2), ("vae_encoder", 1)):
        spec = Manifest.load(vae_graphs).graph(name).spec
        full = profile_spec(spec, (VideoGeometry(102, 544, 992),), fixed=False)
        assert not expected(vae_graphs, full).attentions, "scores of one block of queries are small"
        huge = replace(spec, dims={symbol: Dim(least, 2, 128) for symbol in spec.dims})
        assert len(expected(vae_graphs, huge).attentions) > 0, "at 2048 x 2048 pixels they are not"


ATTENTION = EngineSpec(
    "attention",
    inputs=tuple(TensorSpec(name, "bfloat16", (1, "tokens", 512)) for name in ("q", "k", "v")),
    outputs=(TensorSpec("out", "bfloat16", (1, "tokens", 512)),),
    dims={"tokens": Dim(32, 1024, 42160)},
)


def test_scores_in_memory_are_found(tmp_path: Path) -> None:
    """Attention of one head of 512 as three operators: no kernel fuses it, so that the scores need 7 GB."""
    nodes = [
        helper.make_node("Transpose", ["k"], ["kt"], "transpose", perm=[0, 2, 1]),
        helper.make_node("MatMul", ["q", "kt"], ["scores"], "scores"),
        helper.make_node("Softmax", ["scores"], ["p"], "softmax", axis=-1),
        helper.make_node("MatMul", ["p", "v"], ["out"], "out"),
    ]
    shape: list[str | int | None] = [1, "tokens", 512]
    values = [helper.make_tensor_value_info(name, TensorProto.BFLOAT16, shape) for name in ("q", "k", "v", "out")]
    info = [helper.make_tensor_value_info("p", TensorProto.BFLOAT16, [1, "tokens", "tokens"])]
    graph = helper.make_graph(nodes, "attention", values[:3], values[3:], value_info=info)
    path = tmp_path / "attention.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)]), path)
    asked = expected_of(path, ATTENTION)
    assert asked.attentions == ("softmax",)
    wrong = violations(plan_of(path, ATTENTION, tmp_path), asked)
    assert "1 fused attention kernels were expected, 0 found; with scores in memory: softmax" in wrong


def test_what_a_graph_asks_for(tmp_path: Path) -> None:
    """A product is known by the type in which its weight is stored, whatever lies between."""
    weight = helper.make_tensor("w", TensorProto.FLOAT, [4, 4], range(16))
    nodes = [
        helper.make_node("Transpose", ["w"], ["wt"], "transpose"),
        helper.make_node("MatMul", ["y", "wt"], ["z"], "product"),
        helper.make_node("MatMul", ["z", "y"], ["out"], "no_weight"),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 4]) for name in ("y", "out")]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], [weight])
    path = tmp_path / "g.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)]), path)
    tensor = TensorSpec("y", "float32", ("n", 4))
    spec = EngineSpec("g", (tensor,), (replace(tensor, name="out"),), {"n": Dim(1, 1, 10**7)})
    asked = expected_of(path, spec)
    assert (asked.fp32_products, asked.fp8_products) == (("product",), ())
    assert asked.activation_bytes == activation_bound(spec) == 12 * 2 * 4 * 4 * 10**7


def test_layer_kinds() -> None:
    def layer(name: str, kind: str) -> PlanLayer:
        return PlanLayer(name, kind, "", (), (), (), ())

    assert layer("_gemm_mha_v2_myl0_5", "kgen").is_fused_attention
    assert not layer("_gemm_mha_v2_myl0_5", "kgen").is_matrix_product
    assert layer("__myl_FcMulAdd_myl0_1", "runtime_fusion").is_matrix_product
    assert not layer("__myl_CastMulMean_myl0_4", "kgen").is_matrix_product
