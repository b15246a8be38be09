"""The TensorRT runner on the contract stub (tests/fakes): streams, memory, and what TensorRT refuses."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from stepvideo_serve.engine.nvinfer import ActivationMemory, empty_outputs
from stepvideo_serve.errors import EngineError
from tests.engine.toy import Graph, toy_inputs
from tests.fakes.clocks import ContractError
from tests.fakes.machine import Machine, machine
from tests.fakes.toy_engine import open_toy

GPU = torch.device("cuda", 0)
MIB = 2**20


def on_gpu(rows: int = 4, columns: int = 3, seed: int = 0) -> dict[str, torch.Tensor]:
    return {name: tensor.to(GPU) for name, tensor in toy_inputs(rows, columns, seed).items()}


@pytest.fixture(autouse=True)
def gpu_machine() -> Iterator[Machine]:
    with machine(total_bytes=1 << 30) as made:
        yield made


def test_engines_and_torch_take_turns(toy: Graph, tmp_path: Path) -> None:
    """What an engine gives is changed by torch, given to the next one, and freed, without a wait of the host."""
    memory, expected = ActivationMemory(GPU), toy_inputs(4, 3)
    with open_toy(toy, tmp_path, memory) as first, open_toy(toy, tmp_path, memory) as second, torch.no_grad():
        inputs = on_gpu()
        for _ in range(5):
            inputs["values"] = first(**inputs)["mixed"] * 0.5
            inputs["values"] = second(**inputs)["mixed"]
            expected["values"] = toy.module(*expected.values())[0] * 0.5
            expected["values"] = toy.module(*expected.values())[0]
        torch.testing.assert_close(inputs["values"].cpu(), expected["values"])


def test_one_runtime_and_one_logger(toy: Graph, tmp_path: Path, gpu_machine: Machine) -> None:
    memory = ActivationMemory(GPU)
    runners = [open_toy(toy, tmp_path, memory) for _ in range(3)]
    assert gpu_machine.fake.runtimes == 1
    for runner in runners:
        runner.close()


def test_scratch_memory_that_grows_gives_the_old_one_back(toy: Graph, tmp_path: Path, gpu_machine: Machine) -> None:
    """To TensorRT, which allocates outside of torch: both together would not fit."""
    memory = ActivationMemory(GPU)
    memory.reserve(500 * MIB)
    memory.reserve(600 * MIB)
    assert gpu_machine.gpu.free_bytes >= 400 * MIB
    with open_toy(toy, tmp_path, memory, weight_bytes=400 * MIB):
        pass
    memory.reserve(100)
    assert memory.size_bytes == 600 * MIB


def test_too_little_memory_for_activations() -> None:
    with pytest.raises(EngineError, match=r"need 2\.0 GiB for their activations, 1\.0 GiB of the GPU's 1\.0 are free"):
        ActivationMemory(GPU).reserve(2 << 30)


def test_too_little_memory_for_weights(toy: Graph, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"Engine toy must fit into the GPU's memory, .*OutOfMemory.*more ranks"):
        open_toy(toy, tmp_path, weight_bytes=2 << 30)


def test_an_engine_of_another_version(toy: Graph, tmp_path: Path) -> None:
    with pytest.raises(
        EngineError, match=r"must load into tensorrt 11.*is not compatible.*; build it with this version"
    ):
        open_toy(toy, tmp_path, version="10.0")


def test_inputs_at_addresses_that_tensorrt_refuses_are_copied(toy: Graph, tmp_path: Path) -> None:
    inputs = on_gpu()
    whole = torch.zeros(9, device=GPU)
    whole[1:] = inputs["gain"]
    assert whole[1:].is_contiguous()
    assert whole[1:].data_ptr() % 256
    with open_toy(toy, tmp_path) as runner:
        expected = runner(**inputs)["mixed"]
        assert torch.equal(runner(**{**inputs, "gain": whole[1:]})["mixed"], expected)


def test_a_refusal_has_its_reason(toy: Graph, tmp_path: Path, gpu_machine: Machine) -> None:
    with open_toy(toy, tmp_path) as runner:
        gpu_machine.fake.refuse_enqueue = "Error Code 7: Internal Error (a shape)"
        with pytest.raises(EngineError, match=r"Engine toy must run with .*TensorRT refused: .*\(a shape\)"):
            runner(**on_gpu())
        gpu_machine.fake.refuse_enqueue = ""
        runner(**on_gpu())


def test_one_scratch_memory_for_two_streams_is_found(toy: Graph, tmp_path: Path) -> None:
    """What the stub is for: nothing in the product does this."""
    memory, other = ActivationMemory(GPU), ActivationMemory(GPU)
    with open_toy(toy, tmp_path, memory) as first, open_toy(toy, tmp_path, other) as second:
        other._buffer = memory._buffer
        inputs = on_gpu()
        outputs = [empty_outputs(toy.spec, {"rows": 4, "columns": 3}, GPU) for _ in range(2)]
        torch.cuda.synchronize()
        first._enqueue(inputs, outputs[0])
        with pytest.raises(ContractError, match="nothing orders the two"):
            second._enqueue(inputs, outputs[1])
        torch.cuda.synchronize()
