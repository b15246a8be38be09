"""Whole graphs of the model with plugins: exported, saved, parsed and built by TensorRT-RTX."""

from dataclasses import replace
from pathlib import Path
from typing import cast

import onnx
import pytest
import torch
from torch import nn

from export.graphs.translation import translation_table
from export.graphs.writer import write_graph
from stepvideo_kernels.choice import Target
from stepvideo_kernels.kernel_spec import ONNX_DOMAIN
from stepvideo_serve.dit.blocks import DiTBlock
from stepvideo_serve.dit.graphs import block_spec
from stepvideo_serve.dit.segments import PIECES, CoreSegment, core_spec, segment_module, segment_spec
from stepvideo_serve.engine.spec import Dim, EngineSpec
from stepvideo_serve.fused.choose import ModelSizes, apply_ops, choose_ops, fuse_quantization, ops_of
from stepvideo_serve.fused.fp8 import QuantizedLinear
from stepvideo_serve.text.graphs import step_llm_spec
from stepvideo_serve.text.step_llm import StepLLM, StepLLMConfig
from stepvideo_serve.vae.graphs import vae_decoder_spec
from stepvideo_serve.vae.model import VideoDecoder
from tests.kernels.plugin_builds import Job, Result, build
from tests.mini import MINI, with_random_weights

SCALES: dict[str, torch.Tensor | float] = {
    "attn1.q": 0.02,
    "attn1.k": torch.tensor([0.02, 0.03]),
    "attn1.v": 0.01,
    "core.q": 0.02,
    "core.k": 0.02,
    "core.v": 0.01,
}
TARGETS = (89, 120)


def exported(module: nn.Module, spec: EngineSpec, precision: str, folder: Path) -> Path:
    """The graph with every op as a plugin."""
    ops = ops_of(spec.name)
    choices = choose_ops(precision, Target(89, "tensorrt_rtx"), "plugin", ModelSizes(dit_width=256), ops)
    fused, used = apply_ops(with_random_weights(module).bfloat16(), spec.name, choices, SCALES)
    if precision == "fp8":
        for name in [name for name, layer in fused.named_modules() if isinstance(layer, nn.Linear)]:
            fused.set_submodule(name, QuantizedLinear(cast(nn.Linear, fused.get_submodule(name)), 8.0))
        fuse_quantization(fused)
    path = folder / f"{spec.name}.onnx"
    assert used
    write_graph(fused, spec, path, translation_table(kernels=True))
    onnx.checker.check_model(str(path))
    return path


def built(path: Path, spec: EngineSpec, root: Path) -> list[Result]:
    """For both targets, up to a number of tokens that is no multiple of anything."""
    dims = {name: Dim(3, 1000, 38_401) if name == "tokens" else dim for name, dim in spec.dims.items()}
    profile = {
        name: [list(ends[0]), list(ends[1]), list(ends[2])]
        for name, ends in replace(spec, dims=dims).profile().items()
        if ends[0] != ends[2]
    }
    return build([Job(str(path), sm, profile) for sm in TARGETS], root, path.parent)


def plugins_in(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(path, load_external_data=False).graph.node if node.domain == ONNX_DOMAIN]


def assert_engines(results: list[Result], plugins: list[str]) -> None:
    """An engine for each target, whose plan has exactly these plugins and nothing that does their work besides."""
    for result in results:
        assert result.refusals == []
        assert result.engine, result.plan[-2000:]
        assert len(result.plugin_layers) == len(plugins)
        plan = [line for line in result.plan.splitlines() if line.startswith("Name: ")]
        assert sum("LayerType: custom_layer" in line for line in plan) == len(plugins)
        assert not any("mha" in line.split(",")[0] or "Softmax" in line.split(",")[0] for line in plan)


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_a_whole_block_is_built_with_plugins(precision: str, root: Path, tmp_path: Path) -> None:
    spec = block_spec(MINI.dit, "bfloat16", 0)
    path = exported(DiTBlock(MINI.dit.width), spec, precision, tmp_path)
    form = "_fp8" if precision == "fp8" else ""
    fused = [f"{op}{form}" for op in ("adaln_modulate", "qkv_norm_rope", "attention")]
    nodes = [*fused, "attention", f"adaln_residual{form}"]
    assert plugins_in(path) == nodes
    results = built(path, spec, root)
    assert_engines(results, nodes)
    products = [line for line in results[0].plan.splitlines() if "LayerType: gemm" in line]
    assert len(products) == 6 if precision == "fp8" else products
    assert all(("Datatype: FP8" in line.split("Constants:")[0]) == (precision == "fp8") for line in products)


def test_fp8_attention_alone_is_built_with_its_plugin(root: Path, tmp_path: Path) -> None:
    spec = core_spec("bfloat16", 2)
    path = exported(CoreSegment(), spec, "fp8", tmp_path)
    assert plugins_in(path) == ["attention_fp8"]
    assert_engines(built(path, spec, root), ["attention_fp8"])


@pytest.mark.slow
@pytest.mark.parametrize("piece", [*PIECES[False], *PIECES[True][:2], "core"])
def test_the_pieces_of_a_block_are_built_with_plugins(piece: str, root: Path, tmp_path: Path) -> None:
    expected = {
        "attn": ["adaln_modulate", "qkv_norm_rope", "attention"],
        "text": ["attention"],
        "ff": ["adaln_residual"],
        "qkv": ["adaln_modulate", "qkv_norm_rope"],
        "out": [],
        "core": ["attention"],
    }[piece]
    whole = piece == "core"
    spec = core_spec("bfloat16", 2) if whole else segment_spec(MINI.dit, "bfloat16", piece, 0, 1)
    module = CoreSegment() if whole else segment_module(piece, DiTBlock(MINI.dit.width))
    path = exported(module, spec, "bf16", tmp_path)
    assert plugins_in(path) == expected
    assert_engines(built(path, spec, root), expected)


@pytest.mark.slow
def test_step_llm_is_built_with_plugins(root: Path, tmp_path: Path) -> None:
    config = StepLLMConfig(
        width=768, num_heads=6, num_groups=2, num_layers=2, ffn_width=256, vocab_size=768, norm_eps=1e-5
    )
    spec = step_llm_spec(config, "bfloat16")
    path = exported(StepLLM(config), spec, "bf16", tmp_path)
    assert plugins_in(path) == ["alibi_attention"] * 2
    assert_engines(built(path, spec, root), ["alibi_attention"] * 2)


@pytest.mark.slow
def test_the_vae_is_built_with_plugins(root: Path, tmp_path: Path) -> None:
    spec = vae_decoder_spec(MINI.vae, "bfloat16")
    path = exported(VideoDecoder(MINI.vae), spec, "bf16", tmp_path)
    assert plugins_in(path) == ["vae_attention"]
    assert_engines(built(path, spec, root), ["vae_attention"])
