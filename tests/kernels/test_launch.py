"""Packing parameters for a built kernel, held against the machine code's own table; nothing here needs a GPU."""

import struct
from collections.abc import Mapping
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from stepvideo_kernels.compile.binaries import Binary, Slot, slots_of_ptx
from stepvideo_kernels.launch.cuda_driver import CudaDriver
from stepvideo_kernels.launch.library import KernelLibrary
from stepvideo_kernels.launch.parameters import Argument, PackedParameters, TensorView, pack
from stepvideo_serve.errors import EngineError

# As triton 3.9 writes it for (desc tensordesc<bf16[1, 64, 128]>, out *bf16, tokens i32, wide i64, eps fp32, flag i1).
PTX = """
.version 9.4
.target sm_90a
.visible .entry kernel(
	.param .align 64 .b8 kernel_param_0[128],
	.param .u32 kernel_param_1,
	.param .u32 kernel_param_2,
	.param .u32 kernel_param_3,
	.param .u64 kernel_param_4,
	.param .u64 kernel_param_5,
	.param .u64 kernel_param_6,
	.param .u64 .ptr .global .align 1 kernel_param_7,
	.param .u32 kernel_param_8,
	.param .u64 kernel_param_9,
	.param .f32 kernel_param_10,
	.param .u8 kernel_param_11,
	.param .u64 .ptr .global .align 1 kernel_param_12,
	.param .u64 .ptr .global .align 1 kernel_param_13
)
.reqntid 128
"""
CODE = b"\x7fELF and so on"
ENCODING = {"swizzle": 3, "elem_size": 2, "elem_type": 10, "block_size": [1, 64, 64], "fp4_padded": False}
VIEW = TensorView(0x7000, (2, 37, 128), (37 * 128, 128, 1))
ARGUMENTS: dict[str, Argument] = {"desc": VIEW, "out": 0x1000, "tokens": -5, "wide": 1 << 40, "eps": 1e-5, "flag": True}


def make_binary(**changes: Any) -> Binary:
    kinds = ("tensordesc<bf16[1, 64, 128]>", "*bf16", "i32", "i64", "fp32", "i1")
    entry, slots = slots_of_ptx(PTX)
    binary = Binary(
        name="attention.bf16.sm90.m64",
        op="attention",
        variant="bf16",
        sm=90,
        chosen=True,
        entry=entry,
        tile={"block_m": 64},
        constexprs={"WIDTH": 6144, "BLOCK_M": 64},
        parameters=tuple(zip(ARGUMENTS, kinds, strict=True)),
        slots=slots,
        threads=128,
        num_ctas=1,
        shared_bytes=100_000,
        scratch_bytes=0,
        scratch_alignment=1,
        profile_scratch_bytes=0,
        programmatic_launch=False,
        cooperative=False,
        tensor_maps=(ENCODING,),
        key="key",
        cubin_sha256=sha256(CODE).hexdigest(),
        compiler="triton 3.9.0",
        report={},
    )
    return replace(binary, **changes)


class RecordingDriver:
    """Stands in for CUDA where there is none: keeps what it is given."""

    def __init__(self) -> None:
        self.loaded: list[str] = []
        self.launches: list[tuple[Any, tuple[int, int, int], int, list[bytes]]] = []

    def load(self, binary: Binary, code: bytes) -> str:
        assert code == CODE
        self.loaded.append(binary.name)
        return binary.entry

    def encode_tensor_map(self, view: TensorView, encoding: Mapping[str, Any]) -> bytes:
        return struct.pack("<Q", view.address) + bytes(encoding["block_size"]) + bytes(117)

    def launch(
        self, kernel: Any, binary: Binary, grid: tuple[int, int, int], stream: int, parameters: PackedParameters
    ) -> None:
        self.launches.append((kernel, grid, stream, [parameters.raw(i) for i in range(len(binary.slots))]))


def write(folder: Path, binary: Binary, code: bytes = CODE) -> None:
    (folder / f"{binary.name}.cubin").write_bytes(code)
    binary.save(folder)


def test_parameter_table_of_a_ptx() -> None:
    entry, slots = slots_of_ptx(PTX)
    assert entry == "kernel"
    assert [slot.size for slot in slots] == [128, 4, 4, 4, 8, 8, 8, 8, 4, 8, 4, 1, 8, 8]
    assert slots[0] == Slot(128, 64)
    with pytest.raises(EngineError, match="it has none"):
        slots_of_ptx("no kernel here")


def test_every_value_has_the_width_that_the_machine_code_reads() -> None:
    packed = pack(make_binary(), ARGUMENTS, RecordingDriver())
    raw = [packed.raw(index) for index in range(14)]
    assert packed.sizes == tuple(slot.size for slot in make_binary().slots)
    assert struct.unpack("<Q3B", raw[0][:11]) == (0x7000, 1, 64, 64)
    assert [struct.unpack("<i", one)[0] for one in raw[1:4]] == [2, 37, 128]
    assert [struct.unpack("<q", one)[0] for one in raw[4:7]] == [37 * 128, 128, 1]
    assert struct.unpack("<Q", raw[7])[0] == 0x1000
    assert struct.unpack("<i", raw[8])[0] == -5
    assert struct.unpack("<q", raw[9])[0] == 1 << 40
    assert raw[10] == struct.pack("<f", 1e-5)
    assert raw[11:] == [b"\x01", bytes(8), bytes(8)]


def test_parameters_lie_at_multiples_of_their_alignment() -> None:
    import ctypes

    binary = make_binary()
    packed = pack(binary, ARGUMENTS, RecordingDriver())
    pointers = (ctypes.c_uint64 * len(binary.slots)).from_address(packed.address)
    for pointer, slot in zip(pointers, binary.slots, strict=True):
        assert pointer % slot.alignment == 0


@pytest.mark.parametrize(("value", "bits"), [(1.0, 0x3F80), (1.00390625, 0x3F80), (1.01171875, 0x3F82), (-2.5, 0xC020)])
def test_bf16_scalars_are_rounded_to_nearest_even(value: float, bits: int) -> None:
    binary = make_binary(parameters=(("x", "bf16"),), slots=(Slot(2, 2), Slot(8, 8), Slot(8, 8)), tensor_maps=())
    assert pack(binary, {"x": value}, RecordingDriver()).raw(0) == bits.to_bytes(2, "little")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"out": 0x1008}, "out must be an address divisible by 16"),
        ({"out": 0}, "out must be an address divisible by 16"),
        ({"out": 1.5}, "out must be an address divisible by 16"),
        ({"tokens": 1 << 31}, "tokens must fit i32"),
        ({"tokens": 2.0}, "tokens must be a number of type i32"),
        ({"eps": "small"}, "eps must be a number of type fp32"),
        ({"desc": 0x7000}, "desc must be a TensorView of 3 dimensions"),
        ({"desc": TensorView(0x7000, (37, 128), (128, 1))}, "desc must be a TensorView of 3 dimensions"),
        ({"desc": TensorView(0x7000, (2, 37, 100), (3700, 100, 1))}, "multiples of 16 bytes"),
        ({"desc": TensorView(0x7008, (2, 37, 128), (37 * 128, 128, 1))}, "multiples of 16 bytes"),
        ({"surplus": 1}, "takes the parameters desc, out, tokens, wide, eps, flag, got"),
    ],
)
def test_unfit_arguments_are_refused(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(EngineError, match=sentence):
        pack(make_binary(), {**ARGUMENTS, **change}, RecordingDriver())


def test_missing_argument_is_refused() -> None:
    arguments = {name: value for name, value in ARGUMENTS.items() if name != "eps"}
    with pytest.raises(EngineError, match="takes the parameters"):
        pack(make_binary(), arguments, RecordingDriver())


def test_scratch_memory_is_asked_for() -> None:
    binary = make_binary(scratch_bytes=256, scratch_alignment=128, num_ctas=2)
    with pytest.raises(EngineError, match="256 bytes of scratch"):
        pack(binary, ARGUMENTS, RecordingDriver())
    assert pack(binary, ARGUMENTS, RecordingDriver(), scratch=0x8000).raw(12) == (0x8000).to_bytes(8, "little")


@pytest.mark.parametrize(
    "wrong",
    [
        {"parameters": (("desc", "tensordesc<bf16[64, 128]>"), *make_binary().parameters[1:])},
        {"parameters": make_binary().parameters[:-1]},
        {"slots": make_binary().slots[:-1]},
        {"tensor_maps": ()},
    ],
    ids=["rank", "count", "scratch", "tensor maps"],
)
def test_description_that_does_not_fit_the_machine_code_is_refused(tmp_path: Path, wrong: dict[str, Any]) -> None:
    make_binary(**wrong).save(tmp_path)
    with pytest.raises(EngineError, match="must"):
        Binary.load(tmp_path / "attention.bf16.sm90.m64.json")


def test_description_survives_saving(tmp_path: Path) -> None:
    binary = make_binary()
    binary.save(tmp_path)
    assert Binary.load(tmp_path / f"{binary.name}.json") == binary


def test_library_finds_loads_once_and_launches(tmp_path: Path) -> None:
    write(tmp_path, make_binary())
    write(tmp_path, make_binary(name="attention.bf16.sm90.m128", chosen=False))
    write(tmp_path, make_binary(name="attention.bf16.sm80.m64", sm=80))
    driver = RecordingDriver()
    library = KernelLibrary(tmp_path, 90, driver)
    kernel = library.find("attention", "bf16", WIDTH=6144)
    assert library.find("attention", "bf16") is kernel
    assert driver.loaded == ["attention.bf16.sm90.m64"]
    kernel.launch((3, 2, 1), 77, ARGUMENTS)
    kernel.launch((0, 2, 1), 77, ARGUMENTS)
    [(handle, grid, stream, raw)] = driver.launches
    assert (handle, grid, stream) == ("kernel", (3, 2, 1), 77)
    assert raw[8] == struct.pack("<i", -5)


def test_scratch_is_for_every_block_of_the_grid(tmp_path: Path) -> None:
    write(tmp_path, make_binary(scratch_bytes=256, num_ctas=2))
    kernel = KernelLibrary(tmp_path, 90, RecordingDriver()).find("attention", "bf16")
    assert kernel.scratch_bytes((5, 3, 1)) == 5 * 3 * 2 * 256


def test_library_says_what_it_lacks(tmp_path: Path) -> None:
    write(tmp_path, make_binary())
    with pytest.raises(EngineError, match="has none: run `make kernels`"):
        KernelLibrary(tmp_path, 120, RecordingDriver())
    library = KernelLibrary(tmp_path, 90, RecordingDriver())
    with pytest.raises(EngineError, match="one kernel attention fp8 for SM 90, it has 0"):
        library.find("attention", "fp8")
    with pytest.raises(EngineError, match="WIDTH=256 for SM 90, it has 0"):
        library.find("attention", "bf16", WIDTH=256)


def test_machine_code_other_than_described_is_refused(tmp_path: Path) -> None:
    write(tmp_path, make_binary(), code=b"another file")
    with pytest.raises(EngineError, match="it is another"):
        KernelLibrary(tmp_path, 90, RecordingDriver()).find("attention", "bf16")


def digest(path: Path) -> str:
    return sha256(path.read_bytes()).hexdigest()


def test_kernels_are_those_that_the_engines_came_with(tmp_path: Path) -> None:
    """Whoever can write this folder alone changes nothing: neither a description and its machine code together, nor a
    file more."""
    write(tmp_path, make_binary())
    name = "attention.bf16.sm90.m64.json"
    described = {name: digest(tmp_path / name), "attention.bf16.sm80.m64.json": "of another architecture"}
    write(tmp_path, make_binary(name="attention.bf16.sm90.m128"))
    KernelLibrary(tmp_path, 90, RecordingDriver(), described=described).find("attention", "bf16")
    with pytest.raises(EngineError, match="it has 2"):
        KernelLibrary(tmp_path, 90, RecordingDriver()).find("attention", "bf16")
    code = b"\x7fELF of somebody else"
    write(tmp_path, make_binary(cubin_sha256=sha256(code).hexdigest()), code=code)
    assert Binary.load(tmp_path / name).read_cubin(tmp_path) == code, "of one accord with each other"
    with pytest.raises(EngineError, match=rf"{name} must have SHA-256 {described[name]}, as the manifest"):
        KernelLibrary(tmp_path, 90, RecordingDriver(), described=described)


def test_without_cuda_the_way_to_get_it_is_said() -> None:
    """No test machine has both the package and a driver; where one has, the driver is simply there."""
    import torch

    if torch.cuda.is_available():
        assert CudaDriver() is not None
        return
    with pytest.raises(EngineError, match=r"pip install cuda-bindings==13\.5\.0|needs an NVIDIA driver"):
        CudaDriver()
