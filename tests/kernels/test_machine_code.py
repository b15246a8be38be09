"""Reading a disassembly, and what follows from the numbers."""

import pytest

from stepvideo_kernels.compile.machine_code import (
    LOCAL_MEMORY,
    TENSOR_CORE,
    TENSOR_CORE_16_BIT,
    Instruction,
    in_loops,
    is_serialized,
    parse_sass,
)
from stepvideo_kernels.hardware import blocks_per_sm, roofline
from stepvideo_kernels.kernel_spec import Work

LISTING = """
        Function : kernel
        /*0000*/                   LDC R1, c[0x0][0x28] ;                    /* 0x00000a00ff017b82 */
        /*0010*/                   STL [R1], R2 ;                            /* 0x0000000000147919 */
        /*0020*/              @!P0 BRA 0x70 ;                                /* 0x0000002000448947 */
        /*0030*/                   LDL.64 R4, [R1] ;                         /* 0x00009800ff517b82 */
        /*0040*/                   QGMMA.64x128x32.F32.E4M3.E4M3 R24, gdesc[UR8], R24, !UPT, gsb0 ;
        /*0050*/              @!UP1 UIADD3 UR4, UR4, 0x1, URZ ;
        /*0060*/               @P0 BRA 0x30 ;                                /* 0xffffffec00840947 */
        /*0070*/                   EXIT ;
        /*0080*/                   BRA 0x80;                                 /* 0xfffffffc00fc7947 */
"""


def test_every_instruction_is_read_with_its_modifiers() -> None:
    code = parse_sass(LISTING)
    assert [one.address for one in code] == [16 * index for index in range(9)]
    assert code[4].opcode == "QGMMA.64x128x32.F32.E4M3.E4M3"
    assert code[5].opcode == "UIADD3"


def test_a_loop_is_what_a_backward_branch_encloses() -> None:
    inside = in_loops(parse_sass(LISTING))
    assert [one.address for one in inside] == [0x30, 0x40, 0x50, 0x60]
    assert [one.opcode for one in inside if LOCAL_MEMORY.match(one.opcode)] == ["LDL.64"]


@pytest.mark.parametrize(
    ("opcodes", "serialized"),
    [
        (["WARPGROUP.ARRIVE", "HGMMA.64x128x16.F32.BF16", "HGMMA.64x128x16.F32.BF16", "WARPGROUP.DEPBAR.LE"], False),
        (["HGMMA.64x64x16.F32.BF16", "WARPGROUP.DEPBAR.LE", "QGMMA.64x64x32.F32", "WARPGROUP.DEPBAR.LE"], True),
        (["HMMA.16816.F32.BF16", "LDGDEPBAR"], False),
    ],
)
def test_a_wait_after_each_product_of_a_warpgroup_is_noticed(opcodes: list[str], serialized: bool) -> None:
    assert is_serialized([Instruction(16 * i, opcode, "") for i, opcode in enumerate(opcodes)]) is serialized


@pytest.mark.parametrize(
    ("opcode", "sixteen_bit"),
    [
        ("HGMMA.64x128x16.F32.BF16", True),
        ("QGMMA.64x128x32.F32.E4M3.E4M3", False),
        ("UTCHMMA", True),
        ("UTCQMMA", False),
        ("HMMA.16816.F32.BF16", True),
        ("QMMA.16832.F32.E4M3.E4M3", False),
    ],
)
def test_tensor_core_instructions(opcode: str, sixteen_bit: bool) -> None:
    assert TENSOR_CORE.match(opcode)
    assert bool(TENSOR_CORE_16_BIT.match(opcode)) is sixteen_bit
    assert not TENSOR_CORE.match("HADD2.F32")


@pytest.mark.parametrize(
    ("sm", "threads", "registers", "shared_bytes", "tensor_columns", "blocks"),
    [
        (90, 128, 128, 0, 0, 4),  # registers: 65536 / (128 * 128)
        (90, 128, 32, 100 * 1024, 0, 2),  # shared memory: 228 KB / 101 KB
        (120, 128, 32, 50 * 1024, 0, 1),  # 100 KB / 51 KB
        (90, 1024, 32, 0, 0, 2),  # threads
        (89, 32, 24, 0, 0, 24),  # blocks
        (100, 128, 32, 0, 256, 2),  # tensor memory
        (90, 384, 168, 1024, 0, 1),
        (90, 128, 255, 230 * 1024, 0, 0),
    ],
)
def test_blocks_that_a_multiprocessor_holds(
    sm: int, threads: int, registers: int, shared_bytes: int, tensor_columns: int, blocks: int
) -> None:
    held = blocks_per_sm(
        sm, threads=threads, registers=registers, shared_bytes=shared_bytes, tensor_columns=tensor_columns
    )
    assert held == blocks


@pytest.mark.parametrize(
    ("work", "milliseconds", "limit"),
    [
        (Work(flops=0, bytes=3.35e9), 1.0, "memory"),
        (Work(flops=989e9, bytes=1, precision="bf16"), 1.0, "bf16 arithmetic"),
        (Work(flops=989e9, bytes=1, precision="fp8"), 0.49975, "fp8 arithmetic"),
        (Work(flops=1, bytes=1, exps=16 * 132 * 1.83e6), 1.0, "exponentials"),
    ],
)
def test_roofline_is_the_slowest_of_three(work: Work, milliseconds: float, limit: str) -> None:
    h100 = next(one for one in roofline(work, 90) if one.gpu == "H100")
    assert h100.milliseconds == pytest.approx(milliseconds, rel=1e-4)
    assert h100.limit == limit
