"""Which implementation of an op an engine gets, and why."""

import json
import re
from dataclasses import replace

import pytest

from stepvideo_kernels.adaln_modulate.spec import SPEC as ADALN
from stepvideo_kernels.choice import (
    OPS,
    Target,
    Use,
    builds_of,
    choices,
    choose,
    full_size_uses,
    refusals,
    spec_of,
    table,
)
from stepvideo_kernels.kernel_spec import FP8_MIN_SM, SMS, FullSize, TileConfig
from stepvideo_kernels.qkv_norm_rope.spec import SPEC as QKV
from stepvideo_serve.errors import ExportError

H100 = Target(90, "tensorrt")
L40S_RTX = Target(89, "tensorrt_rtx")
ATTENTION = Use("attention", "bf16", "bf16", 128, 37_944)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": "fp32"}, "takes bf16 or fp16, got fp32"),
        ({"output": "fp32"}, "gives bf16 or fp16 or fp8, got fp32"),
        ({"output": "fp8", "sm": 80}, "gives fp8 from SM 89 on, got SM 80"),
        ({"size": 64}, "takes a head size of 128, got 64"),
        ({"sm": 75}, "has binaries for SM 80 or 89 or 90 or 100 or 120, got SM 75"),
        (
            {"layout": "[batch, heads, tokens, 384]"},
            r"takes the layout \[batch, tokens, heads \* 3 \* 128\] contiguous",
        ),
        ({"tokens": 1 << 25}, "takes up to 16777216 tokens"),
    ],
)
def test_kernel_refuses_with_the_reason(change: dict[str, object], reason: str) -> None:
    good: dict[str, object] = {"dtype": "bf16", "output": "bf16", "size": 128, "sm": 90}
    good |= {"layout": QKV.layouts[0], "tokens": 37_944}
    assert QKV.refuse(**good) is None  # type: ignore[arg-type]
    refusal = QKV.refuse(**(good | change))  # type: ignore[arg-type]
    assert refusal is not None
    assert re.search(reason, refusal)
    assert refusal.startswith("qkv_norm_rope ")
    assert refusal.endswith(".")


def test_sizes_may_be_a_range() -> None:
    assert ADALN.refuse(dtype="bf16", output="fp8", size=6144, sm=90) is None
    refusal = ADALN.refuse(dtype="bf16", output="fp8", size=6150, sm=90)
    assert refusal is not None
    assert "a width of a multiple of 16 up to 8192, got 6150" in refusal


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp8"])
@pytest.mark.parametrize("sm", [80, 90, 100])
def test_every_op_at_full_size_has_its_kernel_on_a_data_centre_gpu(precision: str, sm: int) -> None:
    if precision == "fp8" and sm < FP8_MIN_SM:
        return
    chosen = choices(full_size_uses(precision), Target(sm, "tensorrt"))
    slower = ("attention",) if sm == 90 and precision != "fp8" else ()
    expected = {op: "native" if op in slower else "plugin" for op in OPS}
    assert {op: choice["implementation"] for op, choice in chosen.items()} == expected
    json.dumps(chosen)


def test_what_a_library_was_measured_to_do_faster_is_left_to_it() -> None:
    choice = choose(ATTENTION, H100)
    assert choice.implementation == "native"
    assert choice.reason == "On SM 90 a library's kernel was faster than ours. TensorRT fuses it by itself."
    assert choose(ATTENTION, H100, "plugin").implementation == "plugin"
    assert choose(replace(ATTENTION, dtype="fp8"), H100).implementation == "plugin"


def test_rtx_prefers_what_tensorrt_fuses_itself() -> None:
    assert choose(ATTENTION, L40S_RTX).implementation == "native"
    fused_here_only = choose(Use("adaln_modulate", "bf16", "bf16", 6144, 100), L40S_RTX)
    assert fused_here_only.implementation == "plugin"
    assert fused_here_only.reason.startswith("Not native: TensorRT has no fused adaln_modulate.")


def test_what_nothing_takes_gets_the_reference_with_every_reason() -> None:
    choice = choose(Use("attention", "fp32", "fp32", 128, 100), H100)
    assert choice.implementation == "reference"
    assert "Not plugin: attention takes" in choice.reason
    assert "Not native: TensorRT's fused attention takes bf16 or fp16, got fp32." in choice.reason


def test_insisting_gives_it_or_says_why_not() -> None:
    assert choose(ATTENTION, H100, "native").reason == "asked for"
    with pytest.raises(ExportError, match="--ops plugin cannot be had: attention takes a head size of 128, got 64"):
        choose(Use("attention", "bf16", "bf16", 64, 100), H100, "plugin")
    with pytest.raises(ExportError, match="--ops reference cannot be had: the reference of attention computes in"):
        choose(Use("attention", "fp8", "bf16", 128, 100), H100, "reference")
    with pytest.raises(ExportError, match="--ops native cannot be had: TensorRT has no fused qkv_norm_rope"):
        choose(Use("qkv_norm_rope", "bf16", "bf16", 128, 100), H100, "native")


def test_refusals_are_values_with_their_sentences() -> None:
    assert refusals(ATTENTION, H100) == dict.fromkeys(("reference", "native", "plugin"), None)
    refused = refusals(Use("qkv_norm_rope", "bf16", "fp8", 64, 100), H100)
    assert refused["native"] == "TensorRT has no fused qkv_norm_rope."
    assert "computes in bf16, fp16 or fp32, got FP8" in (refused["reference"] or "")
    assert "takes a head size of 128, got 64" in (refused["plugin"] or "")


def test_unknown_op() -> None:
    with pytest.raises(ExportError, match="must be one of qkv_norm_rope, attention"):
        spec_of("convolution")


def test_table_covers_every_target() -> None:
    whole = table("bf16")
    assert set(whole) == {f"tensorrt sm{sm}" for sm in SMS} | {f"tensorrt_rtx sm{sm}" for sm in (80, 89, 120)}
    assert all(set(row) == set(OPS) for row in whole.values())


@pytest.mark.parametrize("op", OPS)
def test_every_accepted_type_has_a_chosen_binary_on_every_architecture(op: str) -> None:
    spec = spec_of(op)
    builds = builds_of(op, FullSize())
    assert {build.sm for build in builds} == set(spec.sms) == set(SMS)
    groups: dict[tuple[str, int], int] = {}
    for build in builds:
        assert build.op == op
        assert list(build.constexprs) == [name for name, kind in build.signature.items() if kind == "constexpr"]
        assert set(build.aligned) <= set(build.signature) - set(build.constexprs)
        groups[build.variant, build.sm] = groups.get((build.variant, build.sm), 0) + build.chosen
    assert set(groups.values()) == {1}
    assert len({build.name for build in builds}) == len(builds)
    for variant, sm in groups:
        assert "fp8" not in variant or sm >= 89


def test_label_of_a_tile_tells_configurations_apart() -> None:
    tile = TileConfig(128, 64, 8, 3, num_ctas=2, warp_specialize=True, max_registers=168, extra={"HEADS_EACH": 4})
    assert tile.label == "m128n64w8s3c2wsr168headseach4"
    assert TileConfig(32, 0, 4, 1).label == "m32w4s1"
