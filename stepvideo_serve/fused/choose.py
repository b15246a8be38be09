"""Which implementation each fused operator gets, and the networks rebuilt accordingly.

    choices = choose_ops("fp8", Target(90, "tensorrt"), "auto", ModelSizes.of(dit, llm, vae))
    module, used = apply_ops(component.load(), component.name, choices, scales)
    ...                                  # quantise its linear layers, then
    fuse_quantization(module)
Only "plugin" changes a network: its parts are replaced by modules of the same parameters (modules.py). With
"native" and "reference" the plain network is exported, and TensorRT fuses what it can; but for attention of a
single head, which it refuses as it stands (PairedCore).
"""

import copy
import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import chain

import torch
from torch import Tensor, nn

from stepvideo_kernels.choice import (
    IMPLEMENTATIONS,
    OPS,
    Choice,
    Implementation,
    Target,
    Use,
    choose,
    refusals,
    spec_of,
)
from stepvideo_kernels.kernel_spec import FullSize
from stepvideo_serve.dit.blocks import AttentionCore, CrossAttention, DiTBlock, ModulatedNorm, SelfAttention
from stepvideo_serve.dit.config import HEAD_DIM, DiTConfig
from stepvideo_serve.dit.graphs import VIDEO_TOKENS
from stepvideo_serve.dit.segments import CoreSegment, core_name
from stepvideo_serve.errors import ExportError
from stepvideo_serve.fused.fp8 import QuantizedLinear
from stepvideo_serve.fused.modules import (
    CodesLinear,
    FusedAlibiAttention,
    FusedCore,
    FusedCoreFp8,
    FusedNorm,
    FusedNormFp8,
    FusedSelfAttention,
    FusedSelfAttentionFp8,
    FusedTokenCausalAttention,
    PairedCore,
)
from stepvideo_serve.text.segments import LLM_TOKENS, LlmAttention, LlmLayer
from stepvideo_serve.text.step_llm import Attention, StepLLM, StepLLMConfig, alibi_slopes
from stepvideo_serve.vae.config import VAEConfig
from stepvideo_serve.vae.layers import TokenCausalAttention

AUTO = "auto"
WANTED = (AUTO, *IMPLEMENTATIONS)

Scales = Mapping[str, Tensor | float]

# Attention to the text uses the op "attention", never in FP8: a use of its own.
TEXT_ATTENTION = "attention_to_text"
USES = (*OPS, TEXT_ATTENTION)

# Graphs by name -> how they use ops. Graphs named nowhere have none.
_GRAPHS: Mapping[str, tuple[str, ...]] = {
    "dit_block_*": ("qkv_norm_rope", "attention", TEXT_ATTENTION, "adaln_modulate"),
    "dit_attn_*": ("qkv_norm_rope", "attention", "adaln_modulate"),
    "dit_qkv_*": ("qkv_norm_rope", "adaln_modulate"),
    "dit_core_*": ("attention",),
    "dit_text_*": (TEXT_ATTENTION,),
    "dit_ff_*": ("adaln_modulate",),
    "step_llm": ("alibi_attention",),
    "step_llm_attn_*": ("alibi_attention",),
    "step_llm_layer_*": ("alibi_attention",),
    "vae_encoder": ("vae_attention",),
    "vae_decoder": ("vae_attention",),
}
# The norm of a DiT block -> the linear layer that takes its result.
NORM_FEEDS: Mapping[str, str] = {"norm1": "attn1.wqkv", "norm2": "ff.net.0.proj"}


@dataclass(frozen=True)
class ModelSizes:
    """What the choice depends on: width of the DiT, head of Step-LLM, channels and tokens of the VAE's attention."""

    dit_width: int = FullSize.heads * FullSize.head_dim
    llm_head: int = FullSize.head_dim
    vae_channels: int = FullSize.vae_channels
    vae_tokens: int = FullSize.vae_tokens

    @classmethod
    def of(cls, dit: DiTConfig, llm: StepLLMConfig, vae: VAEConfig) -> "ModelSizes":
        """Of a model with networks of these configurations."""
        return cls(
            dit_width=dit.width,
            llm_head=llm.head_dim,
            vae_channels=max(vae.encoder_widths[-1], vae.decoder_widths[-1]),
        )


def ops_of(graph_name: str) -> tuple[str, ...]:
    """How a graph uses ops: "dit_ff_07" -> ("adaln_modulate",)."""
    return next((ops for glob, ops in _GRAPHS.items() if fnmatch.fnmatch(graph_name, glob)), ())


def choose_ops(
    precision: str,
    target: Target | None,
    wanted: str = AUTO,
    sizes: ModelSizes | None = None,
    ops: tuple[str, ...] = USES,
) -> dict[str, Choice]:
    """Use -> its choice, for `ops` (all by default; see `ops_of`) of a model of these sizes (the full one by default).

    precision  "fp32", "fp16", "bf16" or "fp8" (bf16, with the DiT's self-attention in FP8)
    target     None for graphs that ONNX Runtime runs, which has no plugins
    wanted     "auto": the fastest that there is; "plugin": every op or an error; "native": what TensorRT fuses by
               itself, plain operators elsewhere; "reference": plain operators
    Raises ExportError when what is wanted is not to be had.
    """
    if wanted not in WANTED:
        raise ExportError(f"--ops must be one of {', '.join(WANTED)}, got {wanted!r}: correct it.")
    if target is None:
        if wanted == "plugin":
            raise ExportError("--ops plugin needs a target, got none: add --sm and --toolkit, such as --sm 90.")
        plain = _uses(_base(precision), sizes or ModelSizes(), fp8=False)
        reason = "No target was named, so that the graph has standard operators only."
        return {op: Choice(plain[op].op, "reference", reason, plain[op].dtype, plain[op].output) for op in ops}
    fp8 = precision == "fp8" and wanted != "reference"
    uses = _uses(_base(precision), sizes or ModelSizes(), fp8=fp8)
    if fp8 and ("attention" not in ops or _choose(uses["attention"], target, wanted).implementation != "plugin"):
        # Attention elsewhere takes wide values, and casts them itself.
        uses["qkv_norm_rope"] = replace(uses["qkv_norm_rope"], output=_base(precision))
    return {op: _choose(uses[op], target, wanted) for op in ops}


def apply_ops(
    module: nn.Module, graph_name: str, choices: Mapping[str, Choice], scales: Scales | None = None
) -> tuple[nn.Module, frozenset[str]]:
    """A copy of `module`, which shares its parameters, with the parts replaced whose choice is "plugin"; and how the
    copy uses operators (see USES).

    scales  needed for FP8 attention: "attn1.q", "attn1.k" and "attn1.v" (under whatever the graph puts before
            "attn1") -> amax / 448, one number or one for each head [H]. A graph's own path wins: "block.attn1.q".
            Attention that is a graph of its own, dit_core_*, takes one number for "core.q", "core.k" and "core.v".
    Raises ExportError when a part is of a size that the kernel refuses, or when scales are missing.
    """
    shared = {id(tensor): tensor for tensor in chain(module.parameters(), module.buffers())}
    rebuilt = copy.deepcopy(module, shared)
    fuse = _Fuser(graph_name, choices, scales or {})
    for path, part in list(rebuilt.named_modules()):
        replacement = fuse.replacement(path, part, rebuilt)
        if replacement is None:
            continue
        if not path:
            raise ExportError(f"{graph_name} must hold its attention as a part, it is one itself: wrap it.")
        rebuilt.set_submodule(path, replacement)
    return rebuilt, frozenset(fuse.used)


def fuse_quantization(module: nn.Module) -> list[str]:
    """After the linear layers of `module` were quantised: where a fused norm feeds one, the norm gives its codes
    itself, which spares a pass over them. Replaces both in place; returns the paths of the norms."""
    done = []
    for path, block in list(module.named_modules()):
        if not isinstance(block, DiTBlock):
            continue
        for norm_path, linear_path in NORM_FEEDS.items():
            norm, linear = block.get_submodule(norm_path), block.get_submodule(linear_path)
            if isinstance(norm, FusedNorm) and isinstance(linear, QuantizedLinear):
                block.set_submodule(norm_path, FusedNormFp8(norm, linear.input_scale))
                block.set_submodule(linear_path, CodesLinear(linear))
                done.append(f"{path}.{norm_path}" if path else norm_path)
    return done


class _Fuser:
    """Decides part by part. `used`: the ops that were put in."""

    def __init__(self, graph_name: str, choices: Mapping[str, Choice], scales: Scales) -> None:
        self._graph, self._choices, self._scales = graph_name, choices, scales
        self.used: set[str] = set()

    def replacement(self, path: str, part: nn.Module, root: nn.Module) -> nn.Module | None:
        """The fused form of a part, None to leave it."""
        if isinstance(part, SelfAttention) and self._takes("qkv_norm_rope", HEAD_DIM):
            return self._self_attention(path, part)
        if isinstance(part, AttentionCore):
            return self._core(path, root)
        if isinstance(part, ModulatedNorm) and self._takes("adaln_modulate", part.normalized_shape[0]):
            return FusedNorm(part)
        if isinstance(part, TokenCausalAttention) and self._takes("vae_attention", part.q.conv.out_channels):
            return FusedTokenCausalAttention(part)
        if isinstance(part, Attention) and self._takes("alibi_attention", part.head_dim):
            return FusedAlibiAttention(part, _slopes(path, root, self._graph))
        return None

    def _self_attention(self, path: str, plain: SelfAttention) -> nn.Module:
        core = self._choices.get("attention")
        if core is None or core.implementation != "plugin" or core.dtype != "fp8":
            return FusedSelfAttention(plain, plain.core)
        heads = plain.wo.in_features // HEAD_DIM
        return FusedSelfAttentionFp8(plain, *(self._scale(f"{path}.{name}", heads) for name in "qkv"))

    def _core(self, path: str, root: nn.Module) -> nn.Module | None:
        owner = root.get_submodule(path.rpartition(".")[0])
        use = TEXT_ATTENTION if isinstance(owner, CrossAttention) else "attention"
        if not self._takes(use, HEAD_DIM):
            return PairedCore() if self._has_one_head(owner) else None
        if use == TEXT_ATTENTION:
            return FusedCore()
        if isinstance(root, CoreSegment) and self._choices["attention"].dtype == "fp8":
            return FusedCoreFp8(*(self._scale(f"{path}.{name}", 1) for name in "qkv"))
        return FusedCore()

    def _has_one_head(self, owner: nn.Module) -> bool:
        """Whether the attention that a core belongs to has a single head; attention alone is known by its name."""
        if isinstance(owner, CoreSegment):
            return self._graph == core_name(1)
        return isinstance(owner.wo, nn.Linear) and owner.wo.in_features == HEAD_DIM

    def _takes(self, op: str, size: int) -> bool:
        """Whether this op's plugin was chosen; raises ExportError where it was and cannot take this size."""
        choice = self._choices.get(op)
        if choice is None or choice.implementation != "plugin":
            return False
        spec = spec_of(choice.op)
        types = (choice.dtype, choice.output)
        sm = max(spec.dtypes.get(types[0], 0), spec.outputs.get(types[1], 0))
        refusal = spec.refuse(dtype=types[0], output=types[1], size=size, sm=sm)
        if refusal is not None:
            raise ExportError(f"{self._graph} cannot have the plugin of {op}: {refusal}")
        self.used.add(op)
        return True

    def _scale(self, path: str, heads: int) -> Tensor:
        """[heads] fp32 of "block.attn1.q", also found under "attn1.q"."""
        keys = (path, ".".join(path.split(".")[-2:]))
        found = next((self._scales[key] for key in keys if key in self._scales), None)
        if found is None:
            raise ExportError(
                f"{self._graph} needs a scale {keys[-1]} for its FP8 attention, got {sorted(self._scales)}: "
                "calibrate, and give its file."
            )
        scale = torch.as_tensor(found, dtype=torch.float32).detach().clone().flatten()
        if scale.numel() not in (1, heads) or not bool((scale > 0).all()) or not bool(scale.isfinite().all()):
            raise ExportError(
                f"{self._graph} takes for {keys[-1]} one positive scale or {heads} of them, got {scale.tolist()}: "
                "calibrate again."
            )
        return scale.expand(heads).contiguous()


def _slopes(path: str, root: nn.Module, graph_name: str) -> list[float]:
    """The slopes of the heads of the attention at `path`."""
    if isinstance(root, StepLLM):
        return alibi_slopes(root.config.num_heads)
    owner = root.get_submodule(path.rpartition(".")[0])
    if isinstance(owner, LlmAttention | LlmLayer):
        return owner.slopes
    raise ExportError(f"{graph_name} must be Step-LLM or one of its pieces, got {type(root).__name__}.")


def _choose(use: Use, target: Target, wanted: str) -> Choice:
    if wanted == "native":
        return _native(use, target)
    insisted: Mapping[str, Implementation | None] = {AUTO: None, "plugin": "plugin", "reference": "reference"}
    return choose(use, target, insisted[wanted])


def _native(use: Use, target: Target) -> Choice:
    refusal = refusals(use, target)["native"]
    if refusal is None:
        return choose(use, target, "native")
    return Choice(use.op, "reference", f"Not native: {refusal}", use.dtype, use.output)


def _base(precision: str) -> str:
    return "bf16" if precision == "fp8" else precision


def _uses(base: str, sizes: ModelSizes, *, fp8: bool) -> dict[str, Use]:
    """How the graphs of a model use the ops, at their longest sequences."""
    attention, tokens = "fp8" if fp8 else base, VIDEO_TOKENS.max
    uses = (
        Use("qkv_norm_rope", base, attention, HEAD_DIM, tokens),
        Use("attention", attention, base, HEAD_DIM, tokens),
        Use("alibi_attention", base, base, sizes.llm_head, LLM_TOKENS.max),
        Use("vae_attention", base, base, sizes.vae_channels, sizes.vae_tokens),
        Use("adaln_modulate", base, base, sizes.dit_width, tokens),
    )
    return {use.op: use for use in uses} | {TEXT_ATTENTION: Use("attention", base, base, HEAD_DIM, tokens)}
