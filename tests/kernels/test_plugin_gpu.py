"""Engines with plugins, built and run on the GPU at hand, with machine code built for it; against fp64."""

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stepvideo_kernels.choice import OPS, builds_of
from stepvideo_kernels.kernel_spec import SMS, FullSize
from stepvideo_kernels.launch.on_cuda import sm_of
from stepvideo_kernels.plugins.onnx_nodes import operators
from stepvideo_kernels.plugins.registration import device_kernels, register
from stepvideo_serve.dit.rope import rope_tables
from tests.kernels import plugin_graphs
from tests.kernels.comparison import assert_no_worse
from tests.kernels.plugin_graphs import RANGES, Dims, form_of

HEADS = 2
TOKENS = {"N": 203, "L": 101, "L16": 112}
OPERATORS = ("qkv_norm_rope", "attention", "alibi_attention", "vae_attention", "adaln_modulate", "adaln_residual")
WIDE: dict[str, dict[str, Dims]] = {"vae_attention": {name: [1, "N", 512] for name in "qkv"}}


@pytest.fixture(scope="module")
def sm() -> int:
    found = sm_of(torch.device("cuda"))
    if found not in SMS:
        pytest.skip(f"needs a GPU of SM {SMS}, found SM {found}")
    return found


@pytest.fixture(scope="module")
def tensorrt(sm: int, root: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The module that can build here, with the plugins registered and their kernels built."""
    folder = tmp_path_factory.mktemp("kernels")
    builds = [build for op in OPS for build in builds_of(op, FullSize(heads=HEADS)) if build.chosen and build.sm == sm]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(root / "kernels"), str(root)])
    command = [sys.executable, "-m", "stepvideo_kernels.compile", "--out", str(folder), "--heads", str(HEADS)]
    names = [build.name for build in builds]
    done = subprocess.run([*command, "--only", *names], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    try:
        module = import_module("tensorrt")
    except ImportError:
        module = import_module("tensorrt_rtx")
    register(module, device_kernels(folder), sm)
    return module


def serialized(trt: Any, path: Path, profile: dict[str, list[list[int]]]) -> Any:
    logger = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(logger)
    network, config = builder.create_network(0), builder.create_builder_config()
    parser = trt.OnnxParser(network, logger)
    assert parser.parse_from_file(str(path)), [parser.get_error(i).desc() for i in range(parser.num_errors)]
    ranges = builder.create_optimization_profile()
    for name, ends in profile.items():
        ranges.set_shape(name, *ends)
    config.add_optimization_profile(ranges)
    engine = builder.build_serialized_network(network, config)
    assert engine is not None
    return engine


def run(trt: Any, plan: Any, inputs: dict[str, Tensor], outputs: dict[str, Tensor]) -> None:
    engine = trt.Runtime(trt.Logger(trt.Logger.WARNING)).deserialize_cuda_engine(plan)
    assert engine is not None
    context = engine.create_execution_context()
    for name, tensor in inputs.items():
        assert context.set_input_shape(name, tuple(tensor.shape))
    for name, tensor in {**inputs, **outputs}.items():
        assert context.set_tensor_address(name, tensor.data_ptr())
    stream = torch.cuda.Stream()
    assert context.execute_async_v3(stream.cuda_stream)
    stream.synchronize()


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("operator", OPERATORS)
def test_an_engine_computes_the_formula(tensorrt: Any, operator: str, tmp_path: Path) -> None:
    form, changed = form_of(operator), WIDE.get(operator)
    path = plugin_graphs.write(tmp_path / "node.onnx", form, changed_shapes=changed)
    plan = serialized(tensorrt, path, plugin_graphs.profile(form, changed, {**RANGES, "N": (1, 1000, 4096)}))
    given = inputs_of(operator)
    own, exact = formula(operator, given), formula(operator, {name: one.double() for name, one in given.items()})
    made = {f"out_{one.name}": torch.full_like(two, torch.nan) for one, two in zip(form.outputs, own, strict=True)}
    made = {name: tensor.cuda() for name, tensor in made.items()}
    run(tensorrt, plan, {name: tensor.cuda() for name, tensor in given.items()}, made)
    for name, tensor, ours, right in zip(made, made.values(), own, exact, strict=True):
        assert_no_worse(tensor.cpu(), ours, right, f"{operator} {name}")


@pytest.mark.parametrize("operator", OPERATORS)
def test_inputs_and_formulas_fit_the_operators(operator: str) -> None:
    """What the test above needs of a machine without a GPU."""
    own = formula(operator, inputs_of(operator))
    assert [one.dtype for one in own] == [torch.bfloat16] * len(form_of(operator).outputs)
    assert all(torch.isfinite(one).all() for one in own)


def inputs_of(operator: str) -> dict[str, Tensor]:
    """Input -> normal values in bf16, or what fp32 stands for: tables of rotations, positive slopes."""
    form, generator = form_of(operator), torch.Generator().manual_seed(1)
    dims = {**plugin_graphs.shapes(form), **WIDE.get(operator, {})}
    given = {}
    for one in form.inputs:
        values = torch.randn(
            [TOKENS[dim] if isinstance(dim, str) else dim for dim in dims[one.name]], generator=generator
        )
        given[one.name] = values.bfloat16() if one.element == "main" else values.abs()
    tables = rope_tables(7, 29, 1)
    return given | {name: table for name, table in zip(("rope_cos", "rope_sin"), tables, strict=True) if name in given}


def formula(operator: str, given: dict[str, Tensor]) -> list[Tensor]:
    """What the operator computes on a CPU, in the precision of its inputs."""
    operation = next(one for one in operators() if one._schema.name == f"stepvideo::{operator}")
    returned = operation(*given.values())
    return list(returned) if isinstance(returned, tuple | list) else [returned]
