"""What a kernel requires and accepts, how it is tiled on each architecture, and how much work it does: all as data.

Every op has a module `stepvideo_kernels.<op>.spec` that imports neither torch nor the Triton language and offers
    SPEC     KernelSpec: what the op accepts; `SPEC.refuse(...)` says why not
    builds() tuple[KernelBuild, ...]: every binary, for every architecture, that `stepvideo_kernels.compile` makes
    grid(...) the launch grid for given shapes and a TileConfig
Element types are named "bf16", "fp16", "fp32" and "fp8" (E4M3, finite, maximum 448).
An architecture ("SM") is its compute capability without the dot: 80 A100, 89 L40S, 90 H100 and H200, 100 B200,
120 RTX PRO Blackwell. Binaries for 90, 100 and 120 are architecture-exact (sm_90a, sm_100a, sm_120a).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

SMS = (80, 89, 90, 100, 120)
FP8_MAX = 448.0
FP8_MIN_SM = 89

# The operators as ONNX nodes and as TensorRT plugins: domain (of plugins: namespace) and version.
ONNX_DOMAIN = "stepvideo"
ONNX_VERSION = 1

ELEMENT_BYTES: Mapping[str, int] = {"fp8": 1, "bf16": 2, "fp16": 2, "fp32": 4}
POINTER_TYPES: Mapping[str, str] = {"fp8": "*fp8e4nv", "bf16": "*bf16", "fp16": "*fp16", "fp32": "*fp32"}

Constant = int | float | bool | str


@dataclass(frozen=True)
class FullSize:
    """Shapes of one denoising step at 102 x 544 x 992 with classifier-free guidance, and of the other stages."""

    batch: int = 2
    heads: int = 48
    head_dim: int = 128
    video_tokens: int = 37_944
    llm_tokens: int = 320
    llm_groups: int = 8
    vae_tokens: int = 42_160
    vae_channels: int = 512

    @property
    def width(self) -> int:
        return self.heads * self.head_dim


@dataclass(frozen=True)
class TileConfig:
    """One way to tile a kernel.

    block_m     rows (queries, tokens) of one program
    block_n     columns of one step of the inner loop (keys); 0 when the kernel has no such loop
    num_warps   warps of one program, before warp specialisation adds its own
    num_stages  depth of the software pipeline
    max_registers  ceiling per thread (a multiple of 8), None to leave it to the assembler
    extra       further constexprs of the kernel
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    num_ctas: int = 1
    warp_specialize: bool = False
    max_registers: int | None = None
    extra: Mapping[str, Constant] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Short and unique among the configurations of a kernel, fit for a file name."""
        parts = [f"m{self.block_m}", f"n{self.block_n}" if self.block_n else "", f"w{self.num_warps}"]
        parts += [f"s{self.num_stages}", f"c{self.num_ctas}" if self.num_ctas > 1 else ""]
        parts += ["ws" if self.warp_specialize else "", f"r{self.max_registers}" if self.max_registers else ""]
        parts += [
            f"{key.lower().replace('_', '')}{int(value) if isinstance(value, bool) else value}"
            for key, value in self.extra.items()
        ]
        return "".join(parts)


@dataclass(frozen=True)
class Work:
    """What some piece of work costs.

    flops      multiply and add counted separately, at `precision`
    bytes      to and from device memory, each operand counted once
    exps       exponentials, which run on the special function units and can be the limit of attention
    precision  which peak the flops are held against: "fp8" and "bf16" are tensor cores, "fp32" is not
    """

    flops: float
    bytes: float
    exps: float = 0.0
    precision: Literal["fp8", "bf16", "fp32"] = "fp32"


@dataclass(frozen=True)
class KernelBuild:
    """One binary: a kernel function specialised for types, constants, a tiling and an architecture.

    function     "package.module:name" of the kernel
    signature    every parameter in the kernel's order: "*bf16", "*fp8e4nv", "i32", "i64", "fp32",
                 "tensordesc<bf16[64,128]>" (a tensor map made by the host), or "constexpr"
    constexprs   values of the parameters marked "constexpr"
    aligned      pointers aligned to 16 bytes and integers divisible by 16: without it loads are not vectorised
    narrow       pointers taken for aligned to 8 bytes, so that loads and stores have no more than 8
    chosen       the configuration that production uses: one for each op, variant and architecture
    instructions regular expressions; each must match an opcode of the machine code, e.g. r"QGMMA.*E4M3"
    fp8_operands the tensor-core instructions must be the 8-bit ones, none of the 16-bit ones may occur
    no_spills    asserted by the build; set False only for a configuration that is not chosen
    tile_work    of one program (its whole inner loop)
    full_work    at `FullSize`
    shape        what full_work is about, for the table
    """

    op: str
    variant: str
    sm: int
    function: str
    signature: Mapping[str, str]
    constexprs: Mapping[str, Constant]
    tile: TileConfig
    chosen: bool
    tile_work: Work
    full_work: Work
    shape: str
    aligned: tuple[str, ...] = ()
    narrow: tuple[str, ...] = ()
    instructions: tuple[str, ...] = ()
    fp8_operands: bool = False
    no_spills: bool = True

    @property
    def name(self) -> str:
        """Unique among all builds, fit for a file name."""
        return f"{self.op}.{self.variant}.sm{self.sm}.{self.tile.label}"


@dataclass(frozen=True)
class KernelSpec:
    """What an op's kernel accepts. Nothing is permitted by default: every field is given.

    dtypes         of the main input, with the lowest SM for each, e.g. {"bf16": 80, "fp8": 89}
    outputs        of the main output, likewise
    size_name      what `size` means for this op: "head size" or "width"
    size_multiple  accepted sizes are multiples of this one ...
    size_max       ... up to this one; equal values accept exactly one size
    layouts        names of accepted memory layouts, e.g. ("[batch, heads, tokens, channels] contiguous",)
    max_tokens     longest sequence (32-bit offsets inside one batch entry and head)
    requires       one line for people: everything that the numbers above do not say
    """

    op: str
    dtypes: Mapping[str, int]
    outputs: Mapping[str, int]
    size_name: str
    size_multiple: int
    size_max: int
    layouts: tuple[str, ...]
    sms: tuple[int, ...]
    max_tokens: int
    requires: str

    def refuse(
        self,
        *,
        dtype: str,
        output: str,
        size: int,
        sm: int,
        layout: str | None = None,
        tokens: int | None = None,
    ) -> str | None:
        """Why the kernel does not take these operands on this architecture, as one sentence; None when it does."""
        if sm not in self.sms:
            return f"{self.op} has binaries for SM {_listed(self.sms)}, got SM {sm}: use the reference there."
        if dtype not in self.dtypes:
            return f"{self.op} takes {_listed(self.dtypes)}, got {dtype}: cast before it."
        if sm < self.dtypes[dtype]:
            return f"{self.op} takes {dtype} from SM {self.dtypes[dtype]} on, got SM {sm}: use another type."
        if output not in self.outputs:
            return f"{self.op} gives {_listed(self.outputs)}, got {output}: cast behind it."
        if sm < self.outputs[output]:
            return f"{self.op} gives {output} from SM {self.outputs[output]} on, got SM {sm}: use another type."
        if size % self.size_multiple or not 0 < size <= self.size_max:
            return f"{self.op} takes a {self.size_name} of {self._sizes()}, got {size}: use the reference for it."
        if layout is not None and layout not in self.layouts:
            return f"{self.op} takes the layout {_listed(self.layouts)}, got {layout}: make it so before the op."
        if tokens is not None and tokens > self.max_tokens:
            return f"{self.op} takes up to {self.max_tokens} tokens, got {tokens}: split the sequence."
        return None

    def _sizes(self) -> str:
        if self.size_multiple == self.size_max:
            return str(self.size_max)
        return f"a multiple of {self.size_multiple} up to {self.size_max}"


def _listed(values: Iterable[object]) -> str:
    return " or ".join(str(value) for value in values)
