"""A folder of built kernels: `<name>.cubin`, `<name>.ptx` and `<name>.json` for each.

The JSON file says how to launch the cubin; it is all that the production path reads, so that neither torch nor the
Triton language is needed there.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from stepvideo_kernels.kernel_spec import Constant
from stepvideo_serve.errors import EngineError

TENSOR_MAP_BYTES = 128
TENSOR_MAP_ALIGNMENT = 64

_SCALAR_BYTES = {"i1": 1, "i8": 1, "u8": 1, "i16": 2, "u16": 2, "fp16": 2, "bf16": 2, "i32": 4, "u32": 4, "fp32": 4}
_WIDE_BYTES = {"i64": 8, "u64": 8, "fp64": 8}
SCALAR_BYTES: Mapping[str, int] = {**_SCALAR_BYTES, **_WIDE_BYTES}

_DESCRIPTOR = re.compile(r"tensordesc<(\w+)\[([\d,\s]+)\]>")
_ENTRY = re.compile(r"\.entry\s+(\w+)\s*\((.*?)\)", re.DOTALL)
_PARAMETER = re.compile(r"\.param\s+(?:\.align\s+(\d+)\s+)?\.([a-z])(\d+)(?:\s+\.ptr[^,\[]*?)?\s+\w+(?:\[(\d+)\])?\s*$")


@dataclass(frozen=True)
class Slot:
    """One parameter of the machine code: its size and alignment in bytes."""

    size: int
    alignment: int


@dataclass(frozen=True)
class Binary:
    """How to launch one cubin.

    parameters      (name, type) of what the caller passes, in order: pointers "*bf16", scalars "i32" "fp32" ...,
                    "tensordesc<...>"; constants are compiled in
    slots           the machine code's own parameter table, from the PTX: what `parameters` expand to, then two
                    pointers to scratch memory
    threads         of a block, warp specialisation included
    shared_bytes    dynamic shared memory of a block
    scratch_bytes   global scratch memory for each block, aligned to scratch_alignment; usually none
    tensor_maps     for each "tensordesc" parameter how its tensor map is encoded; what the compiler chose
    report          registers, spills, instructions and so on; for people and the table
    """

    name: str
    op: str
    variant: str
    sm: int
    chosen: bool
    entry: str
    tile: Mapping[str, Any]
    constexprs: Mapping[str, Constant]
    parameters: tuple[tuple[str, str], ...]
    slots: tuple[Slot, ...]
    threads: int
    num_ctas: int
    shared_bytes: int
    scratch_bytes: int
    scratch_alignment: int
    profile_scratch_bytes: int
    programmatic_launch: bool
    cooperative: bool
    tensor_maps: tuple[Mapping[str, Any], ...]
    key: str
    cubin_sha256: str
    compiler: str
    report: Mapping[str, Any]

    def save(self, folder: Path) -> None:
        """Writes `<name>.json`; last, since its presence says that the others are whole."""
        path = folder / f"{self.name}.json"
        part = path.with_suffix(".json.part")
        part.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")
        part.replace(path)

    @classmethod
    def load(cls, path: Path, expected: str | None = None) -> "Binary":
        """Raises EngineError when the file is not such a description, the two parameter tables differ, or the file's
        SHA-256 is not the `expected` one."""
        try:
            content = path.read_bytes()
            if expected is not None and (found := sha256(content).hexdigest()) != expected:
                raise EngineError(
                    f"{path} must have SHA-256 {expected}, as the manifest of the engines says, found {found}: restore "
                    "the kernels that the engines came with."
                )
            values = json.loads(content.decode("utf-8"))
            values["parameters"] = tuple((name, kind) for name, kind in values["parameters"])
            values["slots"] = tuple(Slot(**slot) for slot in values["slots"])
            values["tensor_maps"] = tuple(values["tensor_maps"])
            binary = cls(**values)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise EngineError(
                f"{path} must describe a built kernel, could not be read ({error}): build it again."
            ) from None
        check_parameters(binary)
        return binary

    def read_cubin(self, folder: Path) -> bytes:
        """The machine code; raises EngineError when it is missing or not the one described."""
        path = folder / f"{self.name}.cubin"
        try:
            code = path.read_bytes()
        except OSError as error:
            raise EngineError(
                f"{path} must hold a built kernel, could not be read ({error}): build it again."
            ) from None
        if sha256(code).hexdigest() != self.cubin_sha256:
            raise EngineError(
                f"{path} must be the file that {self.name}.json describes, it is another: build it again."
            )
        return code


def check_parameters(binary: Binary) -> None:
    """Raises EngineError when what the caller would pass does not fit the machine code's own table."""
    expected = [slot for name, kind in binary.parameters for slot in slots_of(name, kind)]
    expected += [Slot(8, 8), Slot(8, 8)]
    if tuple(expected) != binary.slots:
        raise EngineError(
            f"{binary.name} must take parameters of {_sizes(expected)} bytes, its machine code has "
            f"{_sizes(binary.slots)}: build it with the compiler that this version is written for (triton 3.9)."
        )
    descriptors = sum(kind.startswith("tensordesc") for _, kind in binary.parameters)
    if descriptors != len(binary.tensor_maps):
        raise EngineError(
            f"{binary.name} must have a tensor map for each of its {descriptors} descriptors, got "
            f"{len(binary.tensor_maps)}: pass pointers where the architecture has no tensor memory accelerator."
        )


def slots_of(name: str, kind: str) -> list[Slot]:
    """What a parameter expands to. A descriptor is a tensor map, its sizes (32 bits) and its strides (64 bits)."""
    if kind.startswith("*"):
        return [Slot(8, 8)]
    if kind in SCALAR_BYTES:
        return [Slot(SCALAR_BYTES[kind], SCALAR_BYTES[kind])]
    rank = len(descriptor_block(name, kind))
    return [Slot(TENSOR_MAP_BYTES, TENSOR_MAP_ALIGNMENT), *[Slot(4, 4)] * rank, *[Slot(8, 8)] * rank]


def descriptor_block(name: str, kind: str) -> tuple[int, ...]:
    """ "tensordesc<bf16[64, 128]>" -> (64, 128); raises EngineError for any other type."""
    match = _DESCRIPTOR.fullmatch(kind)
    if match is None:
        raise EngineError(
            f"Parameter {name} must be a pointer, a number or a tensordesc, got {kind}: correct its type."
        )
    return tuple(int(size) for size in match[2].split(","))


def slots_of_ptx(ptx: str) -> tuple[str, tuple[Slot, ...]]:
    """Name and parameter table of the one kernel in a PTX text; raises EngineError when that is not understood."""
    entry = _ENTRY.search(ptx)
    if entry is None:
        raise EngineError("A PTX text with one kernel was expected, it has none: build it again.")
    slots = []
    for line in entry[2].split(",\n"):
        match = _PARAMETER.search(line.strip())
        if match is None:
            raise EngineError(f"A parameter was expected in the PTX of {entry[1]}, got {line.strip()!r}.")
        size = int(match[3]) // 8 * int(match[4] or 1)
        slots.append(Slot(size, int(match[1] or size)))
    return entry[1], tuple(slots)


def _sizes(slots: list[Slot] | tuple[Slot, ...]) -> str:
    return " ".join(str(slot.size) for slot in slots)
