"""What the assembler made of a kernel: registers, spills, the instructions used, and which of them are in loops."""

import re
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from stepvideo_serve.errors import ExportError

TENSOR_CORE = re.compile(r"(?:HGMMA|QGMMA|IGMMA|UTC\w*MMA|HMMA|QMMA|OMMA|IMMA|DMMA)(?:\.|$)")
TENSOR_CORE_16_BIT = re.compile(r"(?:HGMMA|UTCHMMA|HMMA)(?:\.|$)")
WARPGROUP_PRODUCT = re.compile(r"[HQI]GMMA(?:\.|$)")
LOCAL_MEMORY = re.compile(r"(?:LDL|STL)(?:\.|$)")

_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;", re.MULTILINE)
_TARGET = re.compile(r"0x([0-9a-f]+)\s*$")
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+)")


@dataclass(frozen=True)
class Instruction:
    """address in bytes; opcode with its modifiers, such as "QGMMA.64x128x32.F32.E4M3.E4M3"."""

    address: int
    opcode: str
    operands: str


@dataclass(frozen=True)
class MachineCode:
    """spill_instructions: loads and stores of local memory anywhere; loop_spills: those inside a loop; serialized: the
    assembler waits after every single product of a warpgroup (SM 90), as it does when it lacks registers to leave
    several under way (ptxas' notes C7511, C7512 and C7515)."""

    registers: int
    stack_bytes: int
    instructions: int
    tensor_core: dict[str, int]
    spill_instructions: int
    loop_spills: int
    serialized: bool
    opcodes: tuple[str, ...]

    def missing(self, patterns: tuple[str, ...]) -> list[str]:
        """Those patterns that no opcode matches."""
        return [pattern for pattern in patterns if not any(re.match(pattern, opcode) for opcode in self.opcodes)]

    @property
    def uses_16_bit_tensor_cores(self) -> bool:
        return any(TENSOR_CORE_16_BIT.match(opcode) for opcode in self.opcodes)


def inspect_cubin(cubin: Path, cuobjdump: str) -> MachineCode:
    """Reads a cubin of one kernel. Raises ExportError when cuobjdump fails or prints what is not understood."""
    usage = _USAGE.search(_run(cuobjdump, "-res-usage", cubin))
    instructions = parse_sass(_run(cuobjdump, "-sass", cubin))
    if usage is None or not instructions:
        raise ExportError(f"cuobjdump was expected to list the code of {cubin}, and did not: use triton 3.9's own.")
    registers, stack = (int(value) for value in usage.groups())
    inside = in_loops(instructions)
    opcodes = Counter(instruction.opcode for instruction in instructions)
    return MachineCode(
        registers=registers,
        stack_bytes=stack,
        instructions=len(instructions),
        tensor_core={opcode: count for opcode, count in opcodes.items() if TENSOR_CORE.match(opcode)},
        spill_instructions=_count_local(instructions),
        loop_spills=_count_local(inside),
        serialized=is_serialized(instructions),
        opcodes=tuple(opcodes),
    )


def parse_sass(listing: str) -> list[Instruction]:
    """The instructions of a `cuobjdump -sass` listing, in order."""
    return [Instruction(int(a, 16), opcode, operands) for a, opcode, operands in _INSTRUCTION.findall(listing)]


def in_loops(instructions: list[Instruction]) -> list[Instruction]:
    """The instructions between the target of a backward branch and the branch.

    A branch to itself, with which every kernel ends, is no loop. The compiler puts rarely run parts (waiting for a
    barrier) behind the end of a kernel and branches back from there; such a range reaches from the loop to the end of
    the kernel, and what it holds beyond the loop is counted too: the answer errs on the strict side.
    """
    ranges = []
    for instruction in instructions:
        target = _TARGET.search(instruction.operands)
        if instruction.opcode.startswith("BRA") and target and int(target[1], 16) < instruction.address:
            ranges.append((int(target[1], 16), instruction.address))
    return [one for one in instructions if any(first <= one.address <= last for first, last in ranges)]


def is_serialized(instructions: list[Instruction]) -> bool:
    """Whether there are as many waits as asynchronous products of warpgroups."""
    products = sum(1 for one in instructions if WARPGROUP_PRODUCT.match(one.opcode))
    waits = sum(1 for one in instructions if one.opcode.startswith("WARPGROUP.DEPBAR"))
    return 0 < products <= waits


def _count_local(instructions: list[Instruction]) -> int:
    return sum(1 for instruction in instructions if LOCAL_MEMORY.match(instruction.opcode))


def _run(cuobjdump: str, option: str, cubin: Path) -> str:
    done = subprocess.run([cuobjdump, option, str(cubin)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ExportError(f"cuobjdump {option} {cubin} was expected to succeed, it said: {done.stderr.strip()}.")
    return done.stdout
