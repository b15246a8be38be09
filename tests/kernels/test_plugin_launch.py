"""What a plugin's enqueue does, up to the driver: real plugin classes, real binaries and their parameter tables.

In place of the GPU, the interpreter runs the kernel's source on exactly the parameters that were packed; the result has
to be, bit for bit, that of the op's own launch with the same tiling.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorrt_rtx as trt
import torch
from torch import Tensor

from stepvideo_kernels.choice import builds_of
from stepvideo_kernels.kernel_spec import FullSize
from stepvideo_kernels.launch.library import KernelLibrary
from stepvideo_kernels.launch.on_cuda import type_name
from stepvideo_kernels.plugins.registration import Registration, creator_class
from stepvideo_serve.errors import EngineError
from tests.kernels.comparison import poisoned
from tests.kernels.interpreted import InterpretingDriver
from tests.kernels.plugin_graphs import form_of

HEADS = 3
TOKENS = 37
STREAM = 77
EPS = float(np.float32(2e-5))
BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
TYPES = {BF16: "BF16", FP8: "FP8", torch.float32: "FLOAT"}
# operator -> its op, variant, and the architectures: tensor maps on 90, plain pointers on 89.
CASES: dict[str, tuple[str, str, tuple[int, ...]]] = {
    "qkv_norm_rope": ("qkv_norm_rope", "bf16", (89,)),
    "qkv_norm_rope_fp8": ("qkv_norm_rope", "fp8", (89,)),
    "attention": ("attention", "bf16", (89, 90)),
    "attention_fp8": ("attention", "fp8", (89, 90)),
    "alibi_attention": ("alibi_attention", "bf16", (89,)),
    "vae_attention": ("vae_attention", "bf16", (89, 90)),
    "adaln_modulate": ("adaln_modulate", "bf16", (89,)),
    "adaln_modulate_fp8": ("adaln_modulate", "fp8", (89,)),
    "adaln_residual": ("adaln_modulate", "residual-bf16", (89,)),
    "adaln_residual_fp8": ("adaln_modulate", "residual-fp8", (89,)),
}
PAIRS = [(operator, sm) for operator, (_, _, sms) in CASES.items() for sm in sms]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The chosen binaries of all cases, for a DiT of 3 heads; built by a Python that does not interpret."""
    wanted = {(op, variant, sm) for op, variant, sms in CASES.values() for sm in sms}
    full = FullSize(heads=HEADS)
    builds = [build for op, *_ in CASES.values() for build in builds_of(op, full) if build.chosen]
    names = sorted({build.name for build in builds if (build.op, build.variant, build.sm) in wanted})
    out = tmp_path_factory.mktemp("binaries")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(root / "kernels"), str(root)])
    command = [sys.executable, "-m", "stepvideo_kernels.compile", "--out", str(out), "--heads", str(HEADS)]
    done = subprocess.run(
        [*command, "--only", *names], cwd=root, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return out


def inputs_of(operator: str, generator: torch.Generator) -> list[Tensor]:
    """In the order of the operator."""

    def normal(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    scales = [torch.rand(HEADS, generator=generator) * 0.02 + 0.005 for _ in range(3)]
    if operator.startswith("qkv"):
        values = [normal(2, TOKENS, 384 * HEADS), normal(128), normal(128)]
        values += [normal(TOKENS, 128, dtype=torch.float32) for _ in range(2)]
        return values + (scales if operator.endswith("fp8") else [])
    if operator == "attention_fp8":
        columns = normal(2, HEADS, 128, 48, dtype=FP8)
        return [normal(2, HEADS, TOKENS, 128, dtype=FP8), normal(2, HEADS, 41, 128, dtype=FP8), columns, *scales]
    if operator.startswith("attention"):
        return [normal(2, HEADS, TOKENS, 128), normal(2, HEADS, 41, 128), normal(2, HEADS, 41, 128)]
    if operator == "alibi_attention":
        return [normal(2, TOKENS, 128 * (HEADS + 2)), torch.tensor([0.5, 0.25, 0.7])]
    if operator == "vae_attention":
        return [normal(1, TOKENS, 512) for _ in range(3)]
    width = 128 * HEADS
    values = [normal(2, TOKENS, width)]
    if "residual" in operator:
        values += [normal(2, TOKENS, width), normal(2, width)]
    values += [normal(width), normal(width), normal(2, width), normal(2, width)]
    return [*values, torch.tensor([0.03])] if operator.endswith("fp8") else values


def direct(operator: str, given: list[Tensor], outputs: list[Tensor], sm: int) -> None:
    """The op's own launch."""
    op, variant, _ = CASES[operator]
    tile = import_module(f"stepvideo_kernels.{op}.spec").tile(variant, sm)
    launch = import_module(f"stepvideo_kernels.{op}.kernel").launch
    fp8 = operator.endswith("fp8")
    if op == "qkv_norm_rope":
        launch(given[0], given[1:3], given[3:5], given[5:] if fp8 else None, outputs, EPS, tile)
    elif op == "attention":
        launch(*given[:3], outputs[0], tile, scales=given[3:] if fp8 else None)
    elif op == "adaln_modulate":
        residual = given[1:3] if "residual" in operator else None
        vectors = given[3:7] if residual else given[1:5]
        total = outputs[0] if residual else None
        out_scale = given[-1] if fp8 else None
        launch(given[0], residual, vectors[:2], vectors[2:], out_scale, (total, outputs[-1]), EPS, tile)
    else:
        launch(*given, outputs[0], tile)


def description(tensor: Tensor) -> Any:
    """As TensorRT gives it."""
    made = trt.PluginTensorDesc()
    made.dims = trt.Dims(list(tensor.shape))
    made.type = getattr(trt.DataType, TYPES[tensor.dtype])
    return made


def plugin_of(operator: str, library: Callable[[], KernelLibrary] | None) -> Any:
    """As the parser makes it from a node, and an execution context attaches it."""
    form = form_of(operator)
    fields = [
        trt.PluginField(name, np.array([EPS], np.float32), trt.PluginFieldType.FLOAT32) for name in form.attributes
    ]
    creator = creator_class(trt)(form, Registration(library, None))
    plugin = creator.create_plugin(operator, trt.PluginFieldCollection(fields), trt.TensorRTPhase.RUNTIME)
    return plugin.attach_to_context(None)


def empty_outputs(operator: str, given: list[Tensor]) -> list[Tensor]:
    form = form_of(operator)
    shapes = form.output_shapes(form.named([tuple(one.shape) for one in given]))
    elements = form.output_elements([type_name(one.dtype) for one in given])
    return [
        poisoned(*shape, dtype=FP8 if element == "fp8" else BF16)
        for shape, element in zip(shapes, elements, strict=True)
    ]


@pytest.mark.parametrize(("operator", "sm"), PAIRS)
def test_enqueue_launches_what_the_op_launches(folder: Path, operator: str, sm: int) -> None:
    given = inputs_of(operator, torch.Generator().manual_seed(5))
    made, wanted = empty_outputs(operator, given), empty_outputs(operator, given)
    driver = InterpretingDriver([*given, *made])
    plugin = plugin_of(operator, lambda: KernelLibrary(folder, sm, driver))
    plugin.on_shape_change([description(one) for one in given], [description(one) for one in made])
    assert driver.launches == []
    addresses = [[one.data_ptr() for one in tensors] for tensors in (given, made)]
    plugin.enqueue(None, None, *addresses, 0, STREAM)
    op, variant, _ = CASES[operator]
    assert [(name.split(".sm")[0], stream) for name, stream in driver.launches] == [(f"{op}.{variant}", STREAM)]
    direct(operator, given, wanted, sm)
    for one, other in zip(made, wanted, strict=True):
        assert torch.isfinite(one.float()).all()
        assert torch.equal(one.float(), other.float())


def test_new_shapes_are_prepared_anew(folder: Path) -> None:
    """A shape that changes between launches changes grid and parameters."""
    given = inputs_of("vae_attention", torch.Generator().manual_seed(5))
    short = [one[:, :5].contiguous() for one in given]
    made = [torch.full_like(given[0], float("nan")), torch.full_like(short[0], float("nan"))]
    driver = InterpretingDriver([*given, *short, *made])
    plugin = plugin_of("vae_attention", lambda: KernelLibrary(folder, 89, driver))
    for tensors, out in ((given, made[0]), (short, made[1])):
        plugin.on_shape_change([description(one) for one in tensors], [description(out)])
        plugin.enqueue(None, None, [one.data_ptr() for one in tensors], [out.data_ptr()], 0, STREAM)
    torch.testing.assert_close(made[0][:, :5].float(), made[1].float(), rtol=2**-7, atol=2**-7)


def test_a_missing_kernel_is_named_before_anything_runs(folder: Path) -> None:
    given = [torch.zeros(1, 5, 96, dtype=BF16) for _ in range(3)]
    plugin = plugin_of("vae_attention", lambda: KernelLibrary(folder, 89, InterpretingDriver(given)))
    with pytest.raises(EngineError, match="one kernel vae_attention bf16 WIDTH=96 for SM 89, it has 0"):
        plugin.on_shape_change([description(one) for one in given], [description(given[0])])


def test_without_kernels_the_remedy_is_said() -> None:
    given = [torch.zeros(1, 5, 96, dtype=BF16) for _ in range(3)]
    plugin = plugin_of("vae_attention", None)
    plugin.on_shape_change([description(one) for one in given], [description(given[0])])
    with pytest.raises(EngineError, match="register it with the folder of `make kernels`"):
        plugin.enqueue(None, None, [1, 2, 3], [4], 0, STREAM)
