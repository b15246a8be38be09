"""Plans in the forms in which data-centre TensorRT's EngineInspector writes them. The texts are made up after public
reports: of 10.x NVIDIA/TensorRT issues 4020 and 4397, of 11.x the fields that its tools look for, which RTX 1.7 has."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from export.engines.engine_plan import Plan
from export.engines.expectations import Expected, summary, violations
from export.engines.inspection import read_inspection
from stepvideo_serve.errors import ExportError

GIB = 2**30
EXPECTED = Expected(("q", "up"), (), (), ("attention",), ("fused_norm",), activation_bytes=GIB, products=("q", "up"))


def tensor_10(name: str, dims: list[int], dtype: str) -> dict[str, Any]:
    return {"Name": name, "Location": "Device", "Dimensions": dims, "Format/Datatype": dtype}


def tensor_11(name: str, dims: list[int], dtype: str) -> dict[str, Any]:
    return {
        "Name": name,
        "Dimensions": dims,
        "Strides": [-1, 64, 1],
        "StrideOrder": [2, 1, 0],
        "Datatype": dtype,
        "Format": "(Linear)",
    }


def layers(version: int) -> list[dict[str, Any]]:
    """Two products, alone and with pointwise operations behind it, an attention, and a plugin."""
    tensor = tensor_10 if version == 10 else tensor_11
    separator = "\x1e" if version == 10 else ""
    fp8, half = "FP8", "Row major linear FP16 format" if version == 10 else "BFloat16"

    def layer(name: str, kind: str, inputs: list[Any], nodes: list[str], tactic: str, **more: Any) -> dict[str, Any]:
        metadata = separator.join(f"[ONNX Layer: {node}]" for node in nodes)
        outputs = [tensor("y", [1, -1, 64], half)]
        ends = {"Inputs": inputs, "Outputs": outputs, "TacticName": tactic, "StreamId": 0, "Metadata": metadata}
        return {"Name": name, "LayerType": kind, **ends, **more}

    x, head = tensor("x", [1, -1, 64], fp8), tensor("heads", [4, -1, 64], half)
    weight = {"Constants": [tensor("w", [1, 64, 256], fp8)]} if version == 11 else {}
    gemm = "sm90_xmma_gemm_e4m3bf16_e4m3f32_f32_tn_n_tilesize128x128x128_warpgroupsize1x1x1_execute_kernel_trt"
    return [
        layer("q+k+v_myl0_3", "gemm", [x], ["q", "dequantize_q"], gemm, **weight),
        layer("_gemm_mha_v2_myl0_17", "kgen", [head] * 3, ["attention"], "_gemm_mha_v2_0x957a2fe283f77dcf"),
        layer("__myl_FcAddCast_myl0_7", "fusion", [x], ["up", "gelu"], "__myl_FcAddCast_0x1234", **weight),
        layer("fused_norm", "PluginV3", [head], ["fused_norm"], ""),
    ]


def inspected(path: Path, content: Any, activation_bytes: int = 123) -> Path:
    binding = {"name": "x", "mode": "INPUT", "dtype": "BF16", "dims": [1, -1, 64]}
    ranges = {"profile": [[1, 32, 64], [1, 48, 64], [1, 64, 64]]}
    found = {
        "inspector": content if isinstance(content, str) else json.dumps(content),
        "bindings": [binding | ranges, {"name": "y", "mode": "OUTPUT", "dtype": "HALF", "dims": [1], "profile": []}],
        "activation_bytes": activation_bytes,
        "engine_bytes": 456,
    }
    path.write_text(json.dumps(found), encoding="utf-8")
    return path


def plan(tmp_path: Path, version: int) -> Plan:
    return read_inspection(inspected(tmp_path / "plan.json", {"Layers": layers(version), "Bindings": ["x", "y"]}))


@pytest.mark.parametrize("version", [10, 11])
def test_a_plan_that_is_as_expected(tmp_path: Path, version: int) -> None:
    found = plan(tmp_path, version)
    assert violations(found, EXPECTED) == []
    figures = {"layers": 4, "gemms": 2, "fp8_gemms": 2, "fp4_gemms": 0, "fused_attentions": 1}
    assert summary(found) == figures | {"activation_bytes": 123, "weight_bytes": 456}
    assert [(row.mode, row.dtype) for row in found.bindings] == [("Input", "BFloat16"), ("Output", "Half")]
    assert found.bindings[0].profile == ((1, 32, 64), (1, 48, 64), (1, 64, 64))
    assert found.layers[0].onnx_nodes == ("q", "dequantize_q")


@pytest.mark.parametrize("version", [10, 11])
def test_what_is_not_as_expected_is_found(tmp_path: Path, version: int) -> None:
    """A product that fell back to 16 bits or fp32, scores in memory, a plugin that is not there."""
    text = json.dumps({"Layers": [one for one in layers(version) if "mha" not in one["Name"]][:-1]})
    found = read_inspection(inspected(tmp_path / "16.json", text.replace("FP8", "BFloat16")))
    wrong = violations(found, EXPECTED)
    assert "2 FP8 GEMMs were expected, 0 found; not in FP8: q, up" in wrong
    assert "1 fused attention kernels were expected, 0 found; with scores in memory: attention" in wrong
    assert "1 plugin layers were expected, missing: fused_norm" in wrong
    found = read_inspection(inspected(tmp_path / "32.json", text.replace("FP8", "Float")))
    wide = "no fp32 GEMM was expected but 0, found also: q+k+v_myl0_3"
    assert any(wide in sentence for sentence in violations(found, EXPECTED))
    asked = replace(EXPECTED, fp8_products=(), attentions=(), plugins=(), fp32_products=("q", "up"))
    assert violations(found, asked) == []


@pytest.mark.parametrize("version", [10, 11])
def test_a_product_of_two_activations_in_fp32_is_none_of_a_weight(tmp_path: Path, version: int) -> None:
    scores = {**layers(version)[0], "Metadata": "[ONNX Layer: scores]"}
    scores.pop("Constants", None)
    text = json.dumps({"Layers": [scores]}).replace("FP8", "Float")
    found = read_inspection(inspected(tmp_path / "plan.json", text))
    assert violations(found, replace(EXPECTED, fp8_products=(), attentions=(), plugins=())) == []


@pytest.mark.parametrize(
    "content",
    [
        {"Layers": ["q+k+v_myl0_3", "_gemm_mha_v2_myl0_17"]},  # names only
        {"Layers": [{"Kernel": "q"}]},
        {"Kernels": []},
        "Layers:\nName: q",
    ],
)
def test_another_form(tmp_path: Path, content: Any) -> None:
    with pytest.raises(ExportError, match="EngineInspector must describe each layer in detail, in a form"):
        read_inspection(inspected(tmp_path / "plan.json", content))
