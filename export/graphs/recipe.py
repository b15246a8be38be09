"""What an export makes of a checkpoint's graphs: their precision, what is quantised, which operators are fused, and
the identity of all that, by which a graph is recognised as up to date."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import export
import stepvideo_serve
from export.engines.toolkit import LOWEST_SM
from export.graphs.kinds import WHOLE_GRAPHS, kept_in
from export.graphs.translation import Table, translation_table
from export.quantize.fp8 import Fp8, norm_gains, quantize_module, require_gains, scale_module
from stepvideo_serve.assembly.checkpoint import Checkpoint
from stepvideo_serve.assembly.graphs import DTYPES, Component
from stepvideo_serve.engine.manifest import content_key
from stepvideo_serve.errors import ExportError
from stepvideo_serve.fused.fp8 import scale_of
from stepvideo_serve.fused.layers import OPERANDS, SHARED_CORE, check_globs, is_kept
from stepvideo_serve.fused.nvfp4 import Fp4Linear
from stepvideo_serve.text.segments import LlmAttention, SlopesOutside

if TYPE_CHECKING:  # the kernels are a folder of their own, which plain exports do without
    from stepvideo_kernels.choice import Choice, Target

OPSET = 23
CONSTANT, INPUT = "constant", "input"
WEIGHTS = (CONSTANT, INPUT)
QUANTIZED = ("fp8", "nvfp4")
PRECISIONS = (*DTYPES, *QUANTIZED)
SOURCES = (
    "geometry.py",
    "dit/*.py",
    "text/*.py",
    "vae/*.py",
    "weights/cuts.py",
    "fused/*.py",
    "engine/spec.py",
    "assembly/checkpoint.py",
    "assembly/graphs.py",
)
EXPORT_SOURCES = ("to_onnx.py", "graphs/*.py")
QUANTIZE_SOURCES = ("quantize/fp8.py",)
KERNEL_SOURCES = ("*.py", "*/op.py", "*/spec.py", "*/reference.py", "plugins/*.py")
TOOLS = ("torch", "onnx", "onnxscript", "transformers")


@dataclass(frozen=True)
class Built:
    """A module ready for the exporter, the translations of its operators, and the choice made for each fused one."""

    module: nn.Module
    table: Table
    ops: dict[str, Any]

    @property
    def needs_tensorrt(self) -> bool:
        """Whether the graph will have nodes that ONNX Runtime does not know: plugins, or TensorRT's own."""
        fp4 = any(isinstance(part, Fp4Linear) for part in self.module.modules())
        return fp4 or any(choice["implementation"] == "plugin" for choice in self.ops.values())


@dataclass(frozen=True)
class Recipe:
    """precision: "fp32", "bf16", "fp16", or "fp8" or "nvfp4", which need `fp8` and are bf16 where they do not quantise.

    target, ops  what the graphs are compiled for, and which operators to fuse ("auto", "plugin", "native",
                 "reference"); without a target all operators are standard ones
    weights      "constant": in the graphs; "input": graphs of a kind that layers share (graphs/kinds.py)
    compare      whether each graph is compared with torch; without, the export needs the least memory, and the graphs
                 have no parity report until one that compares has run
    Raises ExportError for what does not go together.
    """

    precision: str = "fp32"
    fp8: Fp8 | None = None
    ops: str = "auto"
    target: "Target | None" = None
    compare: bool = True
    weights: str = CONSTANT

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ExportError(f"--precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}.")
        if (self.precision in QUANTIZED) != (self.fp8 is not None):
            got = "none" if self.fp8 is None else f"one with {self.precision}"
            raise ExportError(
                f"--calibration goes with --precision fp8 or nvfp4, got {got}: make it with python -m export.calibrate."
            )
        require_weights(self.weights, self.precision)
        if self.target is None and self.ops not in ("auto", "reference"):
            raise ExportError(f"--ops {self.ops} needs a target, got none: add --sm and --toolkit, such as --sm 89.")
        if self.fp8 is not None and self.target is not None and self.target.sm < LOWEST_SM[self.precision]:
            raise ExportError(
                f"{self.precision.upper()} needs an architecture of {LOWEST_SM[self.precision]} or later, got --sm "
                f"{self.target.sm}: use bf16."
            )

    @property
    def base(self) -> str:
        """The precision of what is not quantised."""
        return "bf16" if self.precision in QUANTIZED else self.precision

    @property
    def check_precision(self) -> str:
        """The precision in which ONNX Runtime runs the graph, itself or as its twin."""
        return "fp32" if self.precision == "fp32" else "fp16"

    def check(self, checkpoint: Checkpoint) -> None:
        """Raises ExportError unless calibration and globs fit the checkpoint."""
        if self.fp8 is not None:
            self.fp8.calibration.require(checkpoint)
            check_globs(self.fp8.keep, checkpoint.dit_config, checkpoint.llm_config)

    def build(self, component: Component, checkpoint: Checkpoint) -> Built:
        """Loads a graph of the base precision, fuses and quantises it."""
        module, kernels, ops = self._fused(component, checkpoint)
        if self.fp8 is not None:
            quantize_module(component, module, self.fp8)
            if self.target is not None:
                from stepvideo_serve.fused.choose import fuse_quantization

                fuse_quantization(module)
        return Built(module, translation_table(kernels), ops)

    def build_shared(self, component: Component, checkpoint: Checkpoint) -> Built:
        """`build` for a graph whose weights are inputs. Raises ExportError for norm gains beyond the constant scale of
        FP8 attention."""
        module, kernels, ops = self._fused(component, checkpoint)
        if self.fp8 is not None:
            scale_module(component, module, self.fp8)
            if kernels:
                from stepvideo_serve.fused.shared_scales import SharedSelfAttentionFp8, share_scales

                share_scales(module, self._value_range(component))
                for part in module.modules():
                    if isinstance(part, SharedSelfAttentionFp8):
                        require_gains(f"{component.prefix}attn1.core", norm_gains(part))
        if isinstance(module, LlmAttention):
            module = SlopesOutside(module)
        return Built(module, translation_table(kernels), ops)

    def same_precision(self, component: Component) -> Callable[[], nn.Module]:
        """Loads the module whose loss is the measure of a graph's: quantised alike, without fused operators."""
        return partial(self._quantized, component)

    def key(self, component: Component, checkpoint: Checkpoint) -> str:
        """Equal keys mean equal graphs."""
        tools = Path(export.__file__).parent
        parts: dict[str, Any] = {
            "weights": checkpoint.digest(component.part, component.prefix) if not self._outside(component) else "input",
            "spec": component.spec.to_json(),
            "precision": self.precision,
            "opset": OPSET,
            "code": digest_of(Path(stepvideo_serve.__file__).parent, SOURCES),
            "export_code": digest_of(tools, EXPORT_SOURCES),
            "tools": {name: version(name) for name in TOOLS},
        }
        if self.fp8 is not None:
            outside = self._outside(component)
            parts["fp8"] = sorted(kept_in(component, self.fp8.keep)) if outside else self.fp8.key(component)
            parts["fp8_code"] = digest_of(tools, QUANTIZE_SOURCES)
        if self.target is not None:
            chosen = self._choices(component, checkpoint)
            parts["ops"] = {op: choice.to_json() for op, choice in chosen.items()}
            parts["kernels_code"] = digest_of(_kernels_folder(), KERNEL_SOURCES)
        return content_key(**parts)

    def _outside(self, component: Component) -> bool:
        """Whether the graph of the component has its weights as inputs."""
        return self.weights == INPUT and not component.name.startswith(WHOLE_GRAPHS)

    def _quantized(self, component: Component) -> nn.Module:
        module = component.load()
        if self.fp8 is not None:
            quantize_module(component, module, self.fp8)
        return module

    def _choices(self, component: Component, checkpoint: Checkpoint) -> "dict[str, Choice]":
        from stepvideo_serve.fused.choose import ModelSizes, choose_ops, ops_of

        core = SHARED_CORE if _is_shared_core(component) else f"{component.prefix}attn1.core"
        wide = self.fp8 is not None and is_kept(core, self.fp8.keep)
        precision = self.base if wide or self.fp8 is None else "fp8"
        sizes = ModelSizes.of(checkpoint.dit_config, checkpoint.llm_config, checkpoint.vae_config)
        return choose_ops(precision, self.target, self.ops, sizes, ops_of(component.name))

    def _fused(self, component: Component, checkpoint: Checkpoint) -> tuple[nn.Module, bool, dict[str, Any]]:
        """The module, whether kernels take part, and the choices for the manifest."""
        if self.target is None:
            return component.load(), False, {}
        from stepvideo_serve.fused.choose import apply_ops

        choices = self._choices(component, checkpoint)
        scales = self._attention_scales(component)
        module, used = apply_ops(component.load(), component.name, choices, scales)
        return module, bool(used), {op: choice.to_json() for op, choice in choices.items()}

    def _value_range(self, component: Component) -> float | None:
        """amax of the values of a graph's FP8 attention, None without one."""
        if self.fp8 is None or self._attention_scales(component) is None:
            return None
        if _is_shared_core(component):
            return self.fp8.calibration.largest(f"{SHARED_CORE}.v")
        return self.fp8.calibration.of(f"{component.prefix}attn1.core.v")

    def _attention_scales(self, component: Component) -> dict[str, torch.Tensor] | None:
        if self.fp8 is None or component.part != "dit" or not component.prefix:
            return None
        calibration, core = self.fp8.calibration, f"{component.prefix}attn1.core"
        if _is_shared_core(component):
            largest = {name: torch.tensor(calibration.largest(f"{SHARED_CORE}.{name}")) for name in OPERANDS}
            return {f"core.{name}": scale_of(amax, torch.float32) for name, amax in largest.items()}
        if f"{core}.q" not in calibration.amax:
            return None
        scale = {name: torch.tensor(calibration.of(f"{core}.{name}")) for name in OPERANDS}
        return {f"attn1.{name}": scale_of(amax, torch.float32) for name, amax in scale.items()}


def require_weights(weights: str, precision: str) -> None:
    """Raises ExportError unless graphs in this precision may have their weights so."""
    if weights not in WEIGHTS or (weights == INPUT and precision == "nvfp4"):
        raise ExportError(
            "--weights must be constant or input, and constant with --precision nvfp4, which has no weight sets; got "
            f"{weights} with {precision}: correct it."
        )


def _is_shared_core(component: Component) -> bool:
    """Whether it is the attention that all blocks share where the tokens are split."""
    return component.name.startswith("dit_core_")


def digest_of(folder: Path, patterns: tuple[str, ...]) -> str:
    """SHA-256 over the code that shapes the graphs: an edit there makes them stale. Raises ExportError for a pattern
    that matches no file, whose code would not be covered."""
    digest = hashlib.sha256()
    for pattern in patterns:
        paths = sorted(folder.glob(pattern))
        if not paths:
            raise ExportError(
                f"The code of graphs must match {pattern} in {folder}, no file does: correct the pattern."
            )
        for path in paths:
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _kernels_folder() -> Path:
    """Of the package stepvideo_kernels, which fused operators need."""
    import stepvideo_kernels

    return Path(stepvideo_kernels.__file__).parent
