"""What is quantised and what it is called, in whole graphs and in the pieces of every rank."""

from pathlib import Path

import pytest
import torch
from torch import nn

from export.quantize.calibration import PARTS, Calibration
from export.quantize.fp8 import Fp8, quantize_module
from stepvideo_serve.assembly.checkpoint import Checkpoint
from stepvideo_serve.assembly.graphs import components, core_component, llm_part_components, part_components
from stepvideo_serve.errors import ExportError
from stepvideo_serve.fused.fp8 import QuantizedAttention, QuantizedLinear
from stepvideo_serve.fused.layers import SHARED_CORE, all_names, check_globs, is_kept, quantizable
from stepvideo_serve.weights.cuts import TensorPart


@pytest.fixture(scope="module")
def checkpoint(mini_checkpoint: Path) -> Checkpoint:
    return Checkpoint(mini_checkpoint)


def ones(checkpoint: Checkpoint) -> Calibration:
    """An amax of 1 for everything, and of 2 for what belongs to block 1."""
    names = [n for n in all_names(checkpoint.dit_config, checkpoint.llm_config) if not n.endswith("core")]
    names += [
        f"{n}.{operand}"
        for n in all_names(checkpoint.dit_config, checkpoint.llm_config)
        if n.endswith("core")
        for operand in "qkv"
    ]
    amax = {name: 2.0 if name.startswith("transformer_blocks.1.") else 1.0 for name in names}
    return Calibration({part: checkpoint.digest(part) for part in PARTS}, {}, amax)


def test_the_graphs_have_exactly_the_layers_of_the_list(checkpoint: Checkpoint) -> None:
    found = [layer.name for c in components(checkpoint, "fp32").values() for layer in quantizable(c, c.load())]
    assert len(found) == len(set(found)) == 2 * 8 + 2 * 4
    assert sorted(found) == sorted(all_names(checkpoint.dit_config, checkpoint.llm_config))


@pytest.mark.parametrize("sequence", [False, True])
def test_the_pieces_of_a_rank_have_the_same_names(checkpoint: Checkpoint, sequence: bool) -> None:
    part = TensorPart(1, 2)
    table = part_components(checkpoint, "fp32", part, sequence) | llm_part_components(checkpoint, "fp32", part)
    found = [layer.name for component in table.values() for layer in quantizable(component, component.load())]
    whole = [
        name
        for name in all_names(checkpoint.dit_config, checkpoint.llm_config)
        if not (sequence and name.endswith("attn1.core"))
    ]
    assert sorted(found) == sorted(whole)


def test_the_core_that_all_blocks_share_takes_the_widest_range(checkpoint: Checkpoint) -> None:
    component = core_component("fp32", heads=2)
    module = component.load()
    assert quantize_module(component, module, Fp8(ones(checkpoint))) == [SHARED_CORE]
    core = module.get_submodule("core")
    assert isinstance(core, QuantizedAttention)
    assert float(core.q_scale) == pytest.approx(2 / 448, rel=2**-8)


def test_norms_and_everything_outside_the_blocks_stay(checkpoint: Checkpoint) -> None:
    kinds = (QuantizedLinear, QuantizedAttention)
    for component in components(checkpoint, "bf16").values():
        module = component.load()
        done = quantize_module(component, module, Fp8(ones(checkpoint)))
        assert len(done) == sum(isinstance(part, kinds) for part in module.modules())
        left = [name for name, part in module.named_modules() if isinstance(part, nn.Linear)]
        if component.name.startswith("dit_block"):
            assert left == ["attn2.wkv"]  # the keys and values come from dit_cross
        elif component.name == "step_llm":
            assert not left


def test_kept_layers_stay_the_same_modules(checkpoint: Checkpoint) -> None:
    component = components(checkpoint, "bf16")["dit_block_01"]
    module = component.load()
    before = {name: module.get_submodule(name) for name in ("attn1.wo", "attn1.core", "ff.net.2")}
    quantize_module(component, module, Fp8(ones(checkpoint), ("*.1.attn1.*", "transformer_blocks.0.*")))
    assert module.get_submodule("attn1.wo") is before["attn1.wo"]
    assert module.get_submodule("attn1.core") is before["attn1.core"]
    assert isinstance(module.get_submodule("ff.net.2"), QuantizedLinear)


def test_which_globs_keep_the_shared_core() -> None:
    assert is_kept(SHARED_CORE, ["*attn1.core"])
    assert not is_kept(SHARED_CORE, ["transformer_blocks.0.*"])


def test_a_glob_without_a_layer_is_refused(checkpoint: Checkpoint) -> None:
    check_globs(["*.wqkv", "transformer.layers.1.*"], checkpoint.dit_config, checkpoint.llm_config)
    with pytest.raises(ExportError, match=r"'\*\.wkqv' matches none of 24"):
        check_globs(["*.wqkv", "*.wkqv"], checkpoint.dit_config, checkpoint.llm_config)


def test_a_layer_that_was_not_calibrated_is_named(checkpoint: Checkpoint) -> None:
    component = components(checkpoint, "bf16")["dit_cross_00"]
    empty = Calibration({}, {}, {})
    with pytest.raises(ExportError, match=r"must hold transformer_blocks\.0\.attn2\.wkv, found 0 other"):
        quantize_module(component, component.load(), Fp8(empty))


def test_quantised_modules_run_in_the_dtype_of_their_graph(checkpoint: Checkpoint) -> None:
    for precision, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)):
        component = components(checkpoint, precision)["dit_cross_00"]
        module = component.load()
        quantize_module(component, module, Fp8(ones(checkpoint)))
        with torch.no_grad():
            keys, values = module(torch.ones(1, 90, checkpoint.dit_config.width, dtype=dtype))
        assert keys.dtype == values.dtype == dtype
