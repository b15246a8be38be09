"""Which implementation each op gets in an export, and networks rebuilt with fused operators, on the CPU."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from export.compare.one_graph import FP32_ALLOWED, relative_error
from export.graphs.example_inputs import SMALL_SIZES, sample_inputs
from export.quantize.calibration import Calibration
from export.quantize.fp8 import Fp8, quantize_module
from stepvideo_kernels.choice import Choice, Target
from stepvideo_serve.assembly.checkpoint import Checkpoint
from stepvideo_serve.assembly.graphs import Component, components, core_component, llm_part_components, part_components
from stepvideo_serve.dit.blocks import DiTBlock, SelfAttention
from stepvideo_serve.dit.rope import rope_tables
from stepvideo_serve.dit.segments import CoreSegment
from stepvideo_serve.errors import ExportError
from stepvideo_serve.fused.choose import USES, ModelSizes, apply_ops, choose_ops, fuse_quantization, ops_of
from stepvideo_serve.fused.fp8 import QuantizedAttention, QuantizedLinear
from stepvideo_serve.fused.layers import all_names
from stepvideo_serve.fused.modules import PairedCore
from stepvideo_serve.text.segments import LlmAttention
from stepvideo_serve.text.step_llm import StepLLM, StepLLMConfig
from stepvideo_serve.vae.layers import TokenCausalAttention
from stepvideo_serve.weights.cuts import TensorPart
from tests.mini import MINI, normal, with_random_weights

H100 = Target(90, "tensorrt")
B200 = Target(100, "tensorrt")
L40S_RTX = Target(89, "tensorrt_rtx")
LLM = StepLLMConfig(width=768, num_heads=6, num_groups=2, num_layers=2, ffn_width=256, vocab_size=768, norm_eps=1e-5)
SCALES: dict[str, Tensor | float] = {"attn1.q": 0.02, "attn1.k": torch.tensor([0.02, 0.03]), "attn1.v": 0.01}


def implementations(choices: dict[str, Choice]) -> dict[str, str]:
    return {op: choice.implementation for op, choice in choices.items()}


def test_a_data_centre_gpu_gets_plugins() -> None:
    for precision in ("bf16", "fp16", "fp8"):
        assert implementations(choose_ops(precision, B200)) == dict.fromkeys(USES, "plugin")
    wide = {**dict.fromkeys(USES, "plugin"), "attention": "native", "attention_to_text": "native"}
    assert implementations(choose_ops("bf16", H100)) == wide
    assert implementations(choose_ops("fp8", H100)) == wide | {"attention": "plugin"}


def test_self_attention_alone_is_in_fp8() -> None:
    chosen = choose_ops("fp8", H100)
    assert (chosen["qkv_norm_rope"].output, chosen["attention"].dtype) == ("fp8", "fp8")
    assert {chosen[op].dtype for op in ("alibi_attention", "vae_attention", "adaln_modulate")} == {"bf16"}
    assert (chosen["attention_to_text"].op, chosen["attention_to_text"].dtype) == ("attention", "bf16")
    assert choose_ops("fp8", H100, ops=ops_of("dit_core_2h"))["attention"].dtype == "fp8"
    assert choose_ops("fp8", H100, ops=ops_of("dit_qkv_00"))["qkv_norm_rope"].output == "bf16"


def test_where_tensorrt_does_fp8_attention_itself_it_is_given_wide_values() -> None:
    chosen = choose_ops("fp8", L40S_RTX)
    assert implementations(chosen)["attention"] == "native"
    assert (chosen["qkv_norm_rope"].implementation, chosen["qkv_norm_rope"].output) == ("plugin", "bf16")


def test_native_falls_back_op_by_op_with_the_reason() -> None:
    chosen = choose_ops("bf16", H100, "native")
    assert chosen["attention"].implementation == "native"
    assert chosen["adaln_modulate"].implementation == "reference"
    assert chosen["adaln_modulate"].reason == "Not native: TensorRT has no fused adaln_modulate."


def test_small_models_get_plugins_where_they_fit() -> None:
    sizes = ModelSizes.of(MINI.dit, MINI.llm, MINI.vae)
    assert sizes == ModelSizes(dit_width=256, llm_head=8, vae_channels=64)
    chosen = choose_ops("bf16", B200, "auto", sizes)
    assert implementations(chosen) == {**dict.fromkeys(USES, "plugin"), "alibi_attention": "reference"}
    assert "takes a head size of 128, got 8" in chosen["alibi_attention"].reason
    with pytest.raises(
        ExportError, match="--ops plugin cannot be had: alibi_attention takes a head size of 128, got 8"
    ):
        choose_ops("bf16", H100, "plugin", sizes)
    assert set(choose_ops("bf16", H100, "plugin", sizes, ops_of("dit_block_00"))) == set(ops_of("dit_block_00"))


def test_without_a_target_nothing_is_fused() -> None:
    assert implementations(choose_ops("fp8", None)) == dict.fromkeys(USES, "reference")
    with pytest.raises(ExportError, match="needs a target, got none: add --sm and --toolkit"):
        choose_ops("bf16", None, "plugin")


def test_what_cannot_be_had_is_an_error() -> None:
    with pytest.raises(ExportError, match="must be one of auto, reference, native, plugin, got 'fast'"):
        choose_ops("bf16", H100, "fast")
    with pytest.raises(ExportError, match="takes bf16 or fp16, got fp32"):
        choose_ops("fp32", H100, "plugin")
    with pytest.raises(ExportError, match="from SM 89 on, got SM 80"):
        choose_ops("fp8", Target(80, "tensorrt"), "plugin")
    with pytest.raises(ExportError, match="A toolkit must be one of tensorrt, tensorrt_rtx, got 'onnxruntime'"):
        Target(90, "onnxruntime")


def every_graph(folder: Path) -> dict[str, Component]:
    """Whole graphs, both kinds of pieces, and the pieces of Step-LLM."""
    checkpoint, part = Checkpoint(folder), TensorPart(0, 2)
    table = components(checkpoint, "bf16")
    table |= part_components(checkpoint, "bf16", part, False) | part_components(checkpoint, "bf16", part, True)
    core = core_component("bf16", 1)
    return table | llm_part_components(checkpoint, "bf16", part) | {core.name: core}


def all_plugins() -> dict[str, Choice]:
    return choose_ops("bf16", H100, "plugin", ops=tuple(use for use in USES if use != "alibi_attention"))


def test_every_graph_has_the_ops_that_its_name_says(mini_checkpoint: Path) -> None:
    fused = {
        "FusedNorm": "adaln_modulate",
        "FusedCore": "attention",
        "FusedSelfAttention": "qkv_norm_rope",
        "FusedTokenCausalAttention": "vae_attention",
    }
    for name, component in every_graph(mini_checkpoint).items():
        plain = component.load()
        keys = list(plain.state_dict())
        module, used = apply_ops(plain, name, all_plugins())
        put_in = {fused[type(part).__name__] for part in module.modules() if type(part).__name__ in fused}
        expected = {use.removesuffix("_to_text") for use in ops_of(name)} - {"alibi_attention"}
        assert put_in >= expected, name  # a piece holds the whole block, of which it runs a part
        assert bool(used) == bool(put_in), name
        assert list(module.state_dict()) == keys == list(plain.state_dict()), name
        assert not any(type(part).__name__ in fused for part in plain.modules()), "the plain module is left as it was"
        ours = {id(tensor) for tensor in module.parameters()}
        assert ours == {id(tensor) for tensor in plain.parameters()}, "weights are not copied"


def block_inputs(dtype: torch.dtype, tokens: int = 35) -> tuple[Tensor, ...]:
    width = MINI.dit.width
    keys_values = normal(2, 1, MINI.dit.num_heads, 19, 128, seed=3).to(dtype)
    cos, sin = rope_tables(1, 5, 7)
    modulation = normal(1, 6, width, seed=2).to(dtype)
    return normal(1, tokens, width, seed=1).to(dtype), modulation, cos, sin, keys_values[0], keys_values[1]


def mean_error(value: Tensor, exact: Tensor) -> float:
    return float((value.float() - exact).square().mean().sqrt())


def assert_no_worse(
    make: Callable[[], nn.Module], name: str, inputs: Callable[[torch.dtype], tuple[Tensor, ...]]
) -> None:
    """The fused network in bf16 errs against fp32 at most twice as much as the plain one."""
    with torch.no_grad():
        exact = with_random_weights(make())(*inputs(torch.float32))
        plain = with_random_weights(make()).bfloat16()
        choices = choose_ops("bf16", H100, "plugin", ModelSizes(dit_width=MINI.dit.width), ops_of(name))
        fused, _ = apply_ops(plain, name, choices)
        own, ours = plain(*inputs(torch.bfloat16)), fused(*inputs(torch.bfloat16))
    assert ours.dtype == torch.bfloat16
    assert not torch.equal(ours, own), "nothing was fused"
    assert 0 < mean_error(ours, exact) <= 2 * mean_error(own, exact)


def test_a_fused_block_computes_what_the_block_does() -> None:
    assert_no_worse(lambda: DiTBlock(MINI.dit.width), "dit_block_00", block_inputs)


def native() -> dict[str, Choice]:
    return choose_ops("bf16", L40S_RTX, "native")


def test_attention_of_a_single_head_is_that_of_two_equal_ones(mini_checkpoint: Path) -> None:
    """TensorRT has no kernel for one; a slice of two heads stays as it is. FP8 attention takes its place as ever."""
    assert MINI.dit.num_heads == 2
    checkpoint = Checkpoint(mini_checkpoint)
    for count in (1, 2):
        table = part_components(checkpoint, "fp32", TensorPart(0, count), sequence=False)
        for name in ("dit_attn_00", "dit_text_00"):
            plain = table[name].load()
            module, operators = apply_ops(plain, name, native())
            assert sum(isinstance(part, PairedCore) for part in module.modules()) == (2 if count == 2 else 0)
            assert not operators
            inputs = tuple(sample_inputs(table[name].spec, SMALL_SIZES).values())
            with torch.no_grad():
                for ours, expected in zip(outputs(module(*inputs)), outputs(plain(*inputs)), strict=True):
                    assert relative_error(ours, expected) <= FP32_ALLOWED
    name = "dit_attn_00"
    component = part_components(checkpoint, "bf16", TensorPart(0, 2), sequence=False)[name]
    module, _ = apply_ops(component.load(), name, native())
    calibration = Calibration(
        {}, {}, dict.fromkeys(operands(all_names(checkpoint.dit_config, checkpoint.llm_config)), 6.0)
    )
    assert quantize_module(component, module, Fp8(calibration))
    assert isinstance(module.get_submodule("block.attn1.core"), QuantizedAttention)


def operands(layers: list[str]) -> list[str]:
    """The tensors that calibration measures."""
    return [
        name for layer in layers for name in ([f"{layer}.{x}" for x in "qkv"] if layer.endswith("core") else [layer])
    ]


def outputs(returned: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return returned if isinstance(returned, tuple) else (returned,)


@pytest.mark.parametrize(("heads", "paired"), [(1, True), (2, False)])
def test_attention_alone_knows_its_heads_by_its_name(heads: int, paired: bool) -> None:
    component = core_component("bf16", heads)
    module, _ = apply_ops(component.load(), component.name, native())
    assert any(isinstance(part, PairedCore) for part in module.modules()) == paired
    qkv = normal(3, heads, 40, 128)
    with torch.no_grad():
        assert relative_error(module(qkv), component.load()(qkv)) <= FP32_ALLOWED


def test_fused_step_llm_computes_what_it_does() -> None:
    ids = torch.arange(23)[None] * 7
    assert_no_worse(lambda: StepLLM(LLM), "step_llm", lambda _: (ids,))


def test_a_rank_of_step_llm_uses_the_slopes_of_its_own_heads() -> None:
    def inputs(dtype: torch.dtype) -> tuple[Tensor, ...]:
        return (normal(1, 23, LLM.width).to(dtype),)

    assert_no_worse(lambda: LlmAttention(LLM, TensorPart(1, 2)), "step_llm_attn_00", inputs)


def test_fused_vae_attention_computes_what_it_does() -> None:
    def inputs(dtype: torch.dtype) -> tuple[Tensor, ...]:
        return (normal(1, 64, 3, 4, 5).to(dtype),)

    assert_no_worse(lambda: nn.Sequential(TokenCausalAttention(64)), "vae_decoder", inputs)


def test_fp8_attention_is_no_worse_than_standard_operators_in_fp8() -> None:
    x, _, cos, sin, _, _ = block_inputs(torch.float32)
    with torch.no_grad():
        plain = with_random_weights(SelfAttention(MINI.dit.width))
        whole = nn.ModuleDict({"attn1": plain})
        exact = plain(x, cos, sin)
        heads = [part.abs().amax(dim=(0, 2, 3)) for part in plain.project(x, cos, sin)]
        scales = {f"attn1.{name}": amax / 448 for name, amax in zip("qkv", heads, strict=True)}
        choices = choose_ops("fp8", H100, "plugin", ops=("qkv_norm_rope", "attention"))
        fused, _ = apply_ops(whole.bfloat16(), "dit_attn_00", choices, scales)
        ours = fused.get_submodule("attn1")(x.bfloat16(), cos, sin)
        core = QuantizedAttention(torch.bfloat16, *(float(amax.max()) for amax in heads))
        own = plain.wo(core(*plain.project(x.bfloat16(), cos, sin)))
    assert 0 < mean_error(ours, exact) <= 2 * mean_error(own, exact)


def test_fp8_attention_as_a_graph_of_its_own() -> None:
    qkv = normal(3, 2, 35, 128)
    amax = [float(part.abs().max()) for part in qkv]
    core = CoreSegment()
    choices = choose_ops("fp8", H100, ops=ops_of("dit_core_2h"))
    scales = {f"core.{name}": value / 448 for name, value in zip("qkv", amax, strict=True)}
    fused, _ = apply_ops(core, "dit_core_2h", choices, scales)
    exact = core(qkv)
    own = QuantizedAttention(torch.bfloat16, *amax)(*qkv.bfloat16().split(1))
    assert 0 < mean_error(fused(qkv.bfloat16()), exact) <= 2 * mean_error(own, exact)
    with pytest.raises(ExportError, match=r"dit_core_2h needs a scale core.q for its FP8 attention, got \[\]"):
        apply_ops(core, "dit_core_2h", choices)


def quantized_block(choices: dict[str, Choice], *, fuse: bool) -> nn.Module:
    """A block whose linear layers are in FP8, their inputs scaled for normal values."""
    block = with_random_weights(DiTBlock(MINI.dit.width)).bfloat16()
    module, _ = apply_ops(block, "dit_block_00", choices)
    for path, layer in list(module.named_modules()):
        if isinstance(layer, nn.Linear):
            module.set_submodule(path, QuantizedLinear(layer, 8.0))
    assert fuse_quantization(module) == ["norm1", "norm2"] if fuse else True
    return module


def test_norms_that_give_codes_lose_no_more_than_casts_behind_them() -> None:
    choices = choose_ops("bf16", H100, "plugin", ModelSizes(dit_width=MINI.dit.width), ops_of("dit_block_00"))
    with torch.no_grad():
        exact = with_random_weights(DiTBlock(MINI.dit.width))(*block_inputs(torch.float32))
        own = quantized_block(choices, fuse=False)(*block_inputs(torch.bfloat16))
        fused = quantized_block(choices, fuse=True)
        ours = fused(*block_inputs(torch.bfloat16))
    assert 0 < mean_error(ours, exact) <= 2 * mean_error(own, exact)
    assert {type(fused.get_submodule(name)).__name__ for name in ("norm1", "norm2")} == {"FusedNormFp8"}
    assert fuse_quantization(fused) == []


def test_norms_stay_wide_where_their_linear_layer_does() -> None:
    choices = choose_ops("bf16", H100, "plugin", ModelSizes(dit_width=MINI.dit.width), ops_of("dit_block_00"))
    module, _ = apply_ops(DiTBlock(MINI.dit.width).bfloat16(), "dit_block_00", choices)
    assert fuse_quantization(module) == []
    assert fuse_quantization(with_random_weights(DiTBlock(MINI.dit.width))) == []


@pytest.mark.parametrize(
    ("scales", "sentence"),
    [
        (None, "dit_block_00 needs a scale attn1.q for its FP8 attention, got \\[\\]: calibrate"),
        ({**SCALES, "attn1.k": torch.ones(3)}, "attn1.k one positive scale or 2 of them, got"),
        ({**SCALES, "attn1.v": 0.0}, "attn1.v one positive scale or 2 of them, got"),
        ({**SCALES, "attn1.v": float("nan")}, "attn1.v one positive scale or 2 of them, got"),
    ],
)
def test_scales_are_needed_and_judged(scales: dict[str, Tensor | float] | None, sentence: str) -> None:
    choices = choose_ops("fp8", H100, ops=ops_of("dit_block_00"))
    with pytest.raises(ExportError, match=sentence):
        apply_ops(DiTBlock(MINI.dit.width), "dit_block_00", choices, scales)


def test_scales_are_one_for_each_head_and_a_path_of_its_own_wins() -> None:
    whole = nn.ModuleDict({"block": DiTBlock(MINI.dit.width)})
    choices = choose_ops("fp8", H100, ops=ops_of("dit_attn_00"))
    fused, _ = apply_ops(whole, "dit_attn_00", choices, {**SCALES, "block.attn1.v": 0.5})
    attention = fused.get_submodule("block.attn1")
    assert attention.get_buffer("q_scale").tolist() == pytest.approx([0.02, 0.02])
    assert attention.get_buffer("k_scale").tolist() == pytest.approx([0.02, 0.03])
    assert attention.get_buffer("v_scale").tolist() == [0.5, 0.5]
    assert attention.get_buffer("v_scale").dtype == torch.float32


def test_a_part_of_another_size_is_refused() -> None:
    choices = {"vae_attention": Choice("vae_attention", "plugin", "asked for", "bf16", "bf16")}
    with pytest.raises(ExportError, match=r"vae_decoder cannot have the plugin of vae_attention: .*, got 576"):
        apply_ops(nn.Sequential(TokenCausalAttention(576)), "vae_decoder", choices)
