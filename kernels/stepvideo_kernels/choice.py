"""The ops, and which implementation of each an engine gets.

reference  the formula in torch operations, exported as ordinary ONNX operators
native     what TensorRT has itself for it (its fused attention, its rotary embedding); the graph of the plain model
plugin     our kernel behind a TensorRT plugin: one node of the domain "stepvideo"

The choice is made once, at export, from the specs, and written into the manifest with its reason.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import import_module
from typing import Any, Literal, cast

from stepvideo_kernels.kernel_spec import FP8_MIN_SM, SMS, FullSize, KernelBuild, KernelSpec
from stepvideo_serve.errors import ExportError

Implementation = Literal["reference", "native", "plugin"]
IMPLEMENTATIONS: tuple[Implementation, ...] = ("reference", "native", "plugin")

OPS = ("qkv_norm_rope", "attention", "alibi_attention", "vae_attention", "adaln_modulate")

# What TensorRT fuses by itself, so that "native" is worth having: op -> types of its main input. FP8 attention at a
# head of 128 is known to fuse in TensorRT-RTX only.
NATIVE_DTYPES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "tensorrt": {"attention": ("bf16", "fp16"), "vae_attention": ("bf16", "fp16")},
    "tensorrt_rtx": {"attention": ("bf16", "fp16", "fp8"), "vae_attention": ("bf16", "fp16")},
}
NATIVE_MAX_HEAD = 256

# Where a library's fused kernel was faster than ours on a GPU: (op, SM) -> types. H200: cuDNN's attention takes 0.92 of
# the time of ours (kernels/README.md).
SLOWER_THAN_NATIVE: Mapping[tuple[str, int], tuple[str, ...]] = {("attention", 90): ("bf16", "fp16")}


@dataclass(frozen=True)
class Target:
    """What an engine is built for. `toolkit` is the builder: "tensorrt" or "tensorrt_rtx"; else ExportError."""

    sm: int
    toolkit: str

    def __post_init__(self) -> None:
        if self.toolkit not in NATIVE_DTYPES:
            raise ExportError(f"A toolkit must be one of {', '.join(NATIVE_DTYPES)}, got {self.toolkit!r}.")


@dataclass(frozen=True)
class Use:
    """How a graph uses an op: types of its main input and output, the size in question, and its longest sequence."""

    op: str
    dtype: str
    output: str
    size: int
    tokens: int


@dataclass(frozen=True)
class Choice:
    """dtype, output: types of its main input and output; reason: why this one, or why nothing faster."""

    op: str
    implementation: Implementation
    reason: str
    dtype: str
    output: str

    def to_json(self) -> dict[str, str]:
        """For the manifest."""
        return asdict(self)


def spec_of(op: str) -> KernelSpec:
    """Raises ExportError for an unknown op."""
    return cast(KernelSpec, _spec_module(op).SPEC)


def builds_of(op: str, full: FullSize) -> tuple[KernelBuild, ...]:
    """Every binary of an op; raises ExportError for an unknown op."""
    return cast(tuple[KernelBuild, ...], _spec_module(op).builds(full))


def refusals(use: Use, target: Target) -> dict[Implementation, str | None]:
    """Implementation -> the sentence why the op cannot have it there; None where it can. Raises ExportError for an
    unknown op."""
    spec = spec_of(use.op)
    return {
        "reference": _refuse_reference(use),
        "native": _refuse_native(use, target),
        "plugin": spec.refuse(dtype=use.dtype, output=use.output, size=use.size, sm=target.sm, tokens=use.tokens),
    }


def choose(use: Use, target: Target, wanted: Implementation | None = None) -> Choice:
    """The implementation of one op for one target; `wanted` insists on one.

    By itself the choice is the plugin wherever its kernel takes the operands, then TensorRT's own, then the
    reference. TensorRT's own comes first on TensorRT-RTX, whose maker does not support plugins, and where a library's
    kernel was measured to be faster.
    Raises ExportError when what is wanted is not to be had; its message carries the reason.
    """
    refused = refusals(use, target)
    if wanted is not None:
        if refused[wanted] is not None:
            raise ExportError(f"--ops {wanted} cannot be had: {refused[wanted]}")
        return Choice(use.op, wanted, "asked for", use.dtype, use.output)
    slower = use.dtype in SLOWER_THAN_NATIVE.get((use.op, target.sm), ())
    native_first = slower or target.toolkit == "tensorrt_rtx"
    order: tuple[Implementation, ...] = ("native", "plugin") if native_first else ("plugin", "native")
    passed_over = [f"On SM {target.sm} a library's kernel was faster than ours."] if slower else []
    for implementation in order:
        refusal = refused[implementation]
        if refusal is None:
            reason = " ".join([*passed_over, _REASONS[implementation]])
            return Choice(use.op, implementation, reason, use.dtype, use.output)
        passed_over.append(f"Not {implementation}: {refusal}")
    return Choice(use.op, "reference", " ".join(passed_over), use.dtype, use.output)


def choices(uses: tuple[Use, ...], target: Target, wanted: Implementation | None = None) -> dict[str, Any]:
    """Op -> its choice, as JSON values for a manifest."""
    return {use.op: choose(use, target, wanted).to_json() for use in uses}


def full_size_uses(precision: str, full: FullSize | None = None) -> tuple[Use, ...]:
    """How the full-size graphs use the ops; precision "bf16", "fp16" or "fp8" (FP8 for the DiT's attention only)."""
    sizes = full or FullSize()
    base = "bf16" if precision == "fp8" else precision
    return (
        Use("qkv_norm_rope", base, precision, sizes.head_dim, sizes.video_tokens),
        Use("attention", precision, base, sizes.head_dim, sizes.video_tokens),
        Use("alibi_attention", base, base, sizes.head_dim, sizes.llm_tokens),
        Use("vae_attention", base, base, sizes.vae_channels, sizes.vae_tokens),
        Use("adaln_modulate", base, precision, sizes.width, sizes.video_tokens),
    )


def table(precision: str) -> dict[str, dict[str, dict[str, str]]]:
    """ "tensorrt sm90" -> op -> choice, for the toolkits and architectures there are."""
    targets = [Target(sm, "tensorrt") for sm in SMS] + [Target(sm, "tensorrt_rtx") for sm in (80, 89, 120)]
    uses = full_size_uses(precision)
    return {f"{target.toolkit} sm{target.sm}": choices(uses, target) for target in targets}


_REASONS: Mapping[str, str] = {
    "plugin": "The kernel takes these operands.",
    "native": "TensorRT fuses it by itself.",
}


def _refuse_native(use: Use, target: Target) -> str | None:
    types = NATIVE_DTYPES[target.toolkit].get(use.op)
    if types is None:
        return f"TensorRT has no fused {use.op}."
    if use.dtype not in types:
        return f"TensorRT's fused {use.op} takes {' or '.join(types)}, got {use.dtype}."
    if use.dtype == "fp8" and target.sm < FP8_MIN_SM:
        return f"TensorRT's fused {use.op} takes fp8 from SM {FP8_MIN_SM} on, got SM {target.sm}."
    if use.size > NATIVE_MAX_HEAD:
        return f"TensorRT's fused {use.op} takes a head size up to {NATIVE_MAX_HEAD}, got {use.size}."
    return None


def _refuse_reference(use: Use) -> str | None:
    if use.dtype == "fp8" or use.output == "fp8":
        return (
            f"the reference of {use.op} computes in bf16, fp16 or fp32, got FP8: use the plugin, or another precision."
        )
    return None


def _spec_module(op: str) -> Any:
    if op not in OPS:
        raise ExportError(f"An op must be one of {', '.join(OPS)}, got {op!r}: correct the name.")
    return import_module(f"stepvideo_kernels.{op}.spec")
