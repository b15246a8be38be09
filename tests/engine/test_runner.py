"""What every runner promises."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from stepvideo_serve.engine.ort import OrtRunner
from stepvideo_serve.engine.runner import EagerRunner, EngineRunner
from stepvideo_serve.engine.spec import Dim, EngineSpec, TensorSpec
from stepvideo_serve.errors import EngineError
from tests.engine.gpu_engines import open_engine
from tests.engine.toy import WIDTH, Graph, toy_inputs
from tests.fakes.toy_engine import open_on_stub

# A backend is one more entry; those that need a GPU: pytest.param(make, marks=pytest.mark.gpu, id="...").
BACKENDS = [
    pytest.param(lambda toy: EagerRunner(toy.spec, toy.module), id="eager"),
    pytest.param(lambda toy: OrtRunner(toy.spec, toy.onnx_path, threads=2), id="ort"),
    pytest.param(open_on_stub, id="tensorrt-stub"),
    *(
        pytest.param(partial(open_engine, backend=backend), marks=pytest.mark.gpu, id=backend)
        for backend in ("tensorrt", "tensorrt_rtx")
    ),
]


@pytest.fixture(params=BACKENDS)
def runner(request: pytest.FixtureRequest, toy: Graph) -> Iterator[EngineRunner]:
    make: Callable[[Graph], AbstractContextManager[EngineRunner]] = request.param
    with make(toy) as runner:
        yield runner


def on_device(runner: EngineRunner, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to(runner.device) for name, tensor in inputs.items()}


@pytest.mark.parametrize(("rows", "columns"), [(2, 9), (16, 2)])
def test_outputs(runner: EngineRunner, toy: Graph, rows: int, columns: int) -> None:
    inputs = toy_inputs(rows, columns)
    with torch.no_grad():
        expected = toy.module(*inputs.values())
    outputs = runner(**on_device(runner, inputs))
    assert list(outputs) == [tensor.name for tensor in toy.spec.outputs]
    for output, reference in zip(outputs.values(), expected, strict=True):
        assert output.device == runner.device
        torch.testing.assert_close(output.cpu(), reference)


def test_inputs_in_another_order_and_not_contiguous(runner: EngineRunner) -> None:
    inputs = on_device(runner, toy_inputs(4, 3))
    expected = runner(**inputs)
    strided = {name: torch.stack([tensor, tensor], dim=-1)[..., 0] for name, tensor in reversed(inputs.items())}
    assert not strided["values"].is_contiguous()
    for name, output in runner(**strided).items():
        assert torch.equal(output, expected[name])


def without(name: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda inputs: {key: tensor for key, tensor in inputs.items() if key != name}


def changed(**tensors: Tensor) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda inputs: inputs | tensors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(without("ids"), r"missing \['ids'\]", id="missing"),
        pytest.param(changed(extra=torch.zeros(1)), r"unknown \['extra'\]", id="unknown"),
        pytest.param(
            changed(values=torch.zeros(4, WIDTH, dtype=torch.float64)),
            r"float32 \[rows, 8\] with rows in 2..16, got float64",
            id="dtype",
        ),
        pytest.param(changed(ids=torch.zeros(4, 1, dtype=torch.int64)), r"got int64 \[4, 1\]", id="rank"),
        pytest.param(changed(values=torch.zeros(4, WIDTH + 1)), "axis 1 must be 8", id="size"),
        pytest.param(changed(ids=torch.zeros(5, dtype=torch.int64)), "rows is 4 in an earlier axis", id="disagreement"),
        pytest.param(changed(patches=torch.zeros(1, 7, 3)), "axis 1 must be a multiple of 2", id="multiple"),
        pytest.param(changed(patches=torch.zeros(1, 2, 3)), "columns=1 is out of range", id="below the range"),
        pytest.param(changed(patches=torch.zeros(1, 20, 3)), "columns=10 is out of range", id="above the range"),
        pytest.param(changed(gain=torch.zeros(WIDTH, device="meta")), "got meta: move it", id="device"),
    ],
)
def test_wrong_inputs_are_refused_before_the_backend_runs(
    runner: EngineRunner,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    message: str,
) -> None:
    inputs = on_device(runner, toy_inputs(4, 3))
    monkeypatch.setattr(runner, "_run", lambda *_: pytest.fail("the backend ran"))
    with pytest.raises(EngineError, match=message) as refusal:
        runner(**change(inputs))
    assert str(refusal.value).startswith("Engine toy: ")


def test_what_is_no_tensor_is_refused(runner: EngineRunner) -> None:
    inputs = on_device(runner, toy_inputs(4, 3))
    with pytest.raises(EngineError, match=r'"gain" must be a tensor float32 .*, got ndarray'):
        runner(**{**inputs, "gain": inputs["gain"].cpu().numpy()})  # type: ignore[arg-type]


def test_the_next_call_leaves_outputs_alone(runner: EngineRunner) -> None:
    first = runner(**on_device(runner, toy_inputs(4, 3, seed=1)))
    copies = {name: output.clone() for name, output in first.items()}
    second = runner(**on_device(runner, toy_inputs(4, 3, seed=2)))
    for name, copy in copies.items():
        assert torch.equal(first[name], copy)
        assert not torch.equal(second[name], copy)


def test_the_caller_may_write_to_outputs(runner: EngineRunner) -> None:
    inputs = on_device(runner, toy_inputs(4, 3))
    copies = {name: tensor.clone() for name, tensor in inputs.items()}
    expected = runner(**inputs)
    for output in runner(**inputs).values():
        output.zero_()
    for name, copy in copies.items():
        assert torch.equal(inputs[name], copy)
    for name, output in runner(**inputs).items():
        assert torch.equal(output, expected[name])


def test_closed(runner: EngineRunner) -> None:
    inputs = on_device(runner, toy_inputs(4, 3))
    with runner as same:
        assert same is runner
        runner(**inputs)
    with pytest.raises(EngineError, match="it was closed"):
        runner(**inputs)
    runner.close()


def test_engine_id(runner: EngineRunner) -> None:
    assert runner.engine_id
    assert runner.spec.name == "toy"


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.Linear(4, 3), r'output "y" must be float32 \[2, 4\], got float32 \[2, 3\]'),
        (nn.Linear(4, 4).double(), r'output "y" must be float32 \[2, 4\], got float64'),
    ],
)
def test_outputs_that_do_not_fit_the_spec_are_refused(module: nn.Linear, message: str) -> None:
    class Widened(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = module(x.to(module.weight.dtype))
            return output

    spec = EngineSpec(
        "y", (TensorSpec("x", "float32", ("n", 4)),), (TensorSpec("y", "float32", ("n", 4)),), {"n": Dim(1, 1, 2)}
    )
    with EagerRunner(spec, Widened()) as runner, pytest.raises(EngineError, match=message):
        runner(x=torch.zeros(2, 4))


def test_eager_module_with_too_few_outputs(toy: Graph) -> None:
    class First(nn.Module):
        def forward(self, values: Tensor, *_: Tensor) -> Tensor:
            return values

    with (
        EagerRunner(toy.spec, First()) as runner,
        pytest.raises(EngineError, match="First must return 4 tensors, got 1"),
    ):
        runner(**toy_inputs(4, 3))
