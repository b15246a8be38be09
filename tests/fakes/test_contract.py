"""The stub refuses what the real libraries refuse, and what they only break on."""

import inspect
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from stepvideo_serve.engine.nvinfer import empty_outputs, make_logger
from stepvideo_serve.parallel.collectives import WaitClock
from tests.engine.toy import Graph, toy_inputs
from tests.fakes.clocks import ContractError
from tests.fakes.engines import write_engine
from tests.fakes.machine import Machine

GPU = "cuda"


@pytest.fixture
def context(toy: Graph, tmp_path: Path, gpu_machine: Machine) -> "Bound":
    return Bound(toy, tmp_path, gpu_machine)


class Bound:
    """The toy engine with everything set, for a test to change one thing."""

    def __init__(self, toy: Graph, folder: Path, machine: Machine) -> None:
        trt = machine.tensorrt
        write_engine(folder / "engine", toy.onnx_path, toy.spec)
        self.logger = make_logger(trt)
        self.engine = trt.Runtime(self.logger).deserialize_cuda_engine((folder / "engine").read_bytes())
        user = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        self.context = self.engine.create_execution_context(user)
        self.tensors = {name: tensor.to(GPU) for name, tensor in toy_inputs(4, 3).items()}
        for name, tensor in self.tensors.items():
            assert self.context.set_input_shape(name, tuple(tensor.shape))
        sizes = {"rows": 4, "columns": 3}
        self.tensors |= empty_outputs(toy.spec, sizes, torch.device(GPU))
        for name, tensor in self.tensors.items():
            assert self.context.set_tensor_address(name, tensor.data_ptr())
        self.scratch = torch.empty(self.engine.device_memory_size_v2, dtype=torch.uint8, device=GPU)
        self.context.set_device_memory(self.scratch.data_ptr(), len(self.scratch))
        self.stream = torch.cuda.Stream()
        self.stream.wait_stream(torch.cuda.current_stream())

    def run(self) -> bool:
        accepted: bool = self.context.execute_async_v3(self.stream.cuda_stream)
        torch.cuda.current_stream().wait_stream(self.stream)
        return accepted


def test_what_is_right_is_computed(context: Bound, toy: Graph) -> None:
    assert context.run()
    with torch.no_grad():
        expected = toy.module(*toy_inputs(4, 3).values())
    for tensor, reference in zip(toy.spec.outputs, expected, strict=True):
        torch.testing.assert_close(context.tensors[tensor.name].cpu(), reference)


@pytest.mark.parametrize(
    "name",
    ["device_memory_size", "weight_streaming_budget", "weight_streaming_budget_v2", "has_implicit_batch_dimension"],
)
def test_names_that_are_gone_or_not_used_are_missing(context: Bound, name: str) -> None:
    with pytest.raises(AttributeError):
        getattr(context.engine, name)
    with pytest.raises(AttributeError):
        setattr(context.engine, name, 1)


def test_a_shape_outside_the_profile(context: Bound) -> None:
    assert not context.context.set_input_shape("values", (17, 8))
    assert "does not satisfy the profile" in context.logger.last_error
    assert not context.context.set_input_shape("value", (4, 8))


def test_a_shape_that_was_not_set(toy: Graph, tmp_path: Path, gpu_machine: Machine) -> None:
    bound = Bound(toy, tmp_path, gpu_machine)
    del bound.context._shapes["ids"]
    assert not bound.run()
    assert "not set: ['ids']" in bound.logger.last_error


def test_an_address_that_is_not_aligned(context: Bound) -> None:
    with pytest.raises(ContractError, match="gain must be aligned to 256"):
        context.context.set_tensor_address("gain", context.tensors["gain"].data_ptr() + 16)


def test_an_address_of_memory_that_is_gone(context: Bound) -> None:
    del context.tensors["gain"]
    with pytest.raises(ContractError, match=r"engine toy: gain: 32 bytes at .* must lie in memory that is alive"):
        context.run()


def test_memory_that_is_too_small(context: Bound) -> None:
    small = torch.empty(31, device=GPU)
    context.context.set_tensor_address("mixed", small.data_ptr())
    with pytest.raises(ContractError, match=r"mixed: 128 bytes at .* must lie in memory that is alive"):
        context.run()


def test_too_little_scratch_memory(context: Bound) -> None:
    with pytest.raises(ContractError, match="toy needs 4000 aligned bytes, got 3999"):
        context.context.set_device_memory(context.scratch.data_ptr(), 3999)


def test_an_output_that_is_read_too_early(context: Bound) -> None:
    assert context.context.execute_async_v3(context.stream.cuda_stream)
    with pytest.raises(ContractError, match=r"memory is read that engine toy uses on stream .*, and nothing orders"):
        context.tensors["mixed"] + 1
    torch.cuda.current_stream().wait_stream(context.stream)


def test_an_input_that_is_overwritten_too_early(context: Bound) -> None:
    assert context.context.execute_async_v3(context.stream.cuda_stream)
    with pytest.raises(ContractError, match="memory is written that engine toy uses"):
        context.tensors["values"].zero_()
    torch.cuda.current_stream().wait_stream(context.stream)


def test_an_input_that_is_freed_too_early(context: Bound, gpu_machine: Machine) -> None:
    assert context.context.execute_async_v3(context.stream.cuda_stream)
    del context.tensors["values"]
    with pytest.raises(ContractError, match="Memory is freed that engine toy uses"):
        torch.cuda.synchronize()
    gpu_machine.gpu.faults.clear()
    torch.cuda.synchronize()


def test_a_lost_device_stays_lost(context: Bound, gpu_machine: Machine) -> None:
    """Every call fails from then on, and TensorRT refuses with the reason."""
    gpu_machine.gpu.poison = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    assert not context.context.execute_async_v3(context.stream.cuda_stream)
    assert "illegal memory access" in context.logger.last_error
    for call in (torch.cuda.synchronize, context.stream.synchronize, torch.cuda.mem_get_info):
        with pytest.raises(torch.AcceleratorError, match="illegal memory access"):
            call()
    with pytest.raises(torch.AcceleratorError):
        torch.zeros(3, device=GPU)
    gpu_machine.gpu.poison = None


def test_a_copy_that_is_not_waited_for_has_not_arrived(gpu_machine: Machine) -> None:
    there, here = torch.arange(3.0).to(GPU), torch.empty(3, pin_memory=True)
    here.copy_(there, non_blocking=True)
    arrived = torch.cuda.Event(blocking=True)
    arrived.record()
    assert here.isnan().all()
    arrived.synchronize()
    assert here.tolist() == [0.0, 1.0, 2.0]
    gpu_machine.gpu.check()


def test_tensors_of_cpu_and_gpu_do_not_mix(gpu_machine: Machine) -> None:
    there = torch.zeros(3, device=GPU)
    assert there.is_cuda
    assert there.device == gpu_machine.gpu.device
    assert (there + torch.tensor(2.0)).cpu().tolist() == [2.0, 2.0, 2.0]
    with pytest.raises(RuntimeError, match="same device"):
        there + torch.zeros(3)
    with pytest.raises(TypeError, match="can't convert cuda:0 device type tensor to numpy"):
        there.numpy()


def test_a_collective_is_to_be_waited_for(tmp_path: Path, gpu_machine: Machine) -> None:
    dist.init_process_group("cpu:gloo,cuda:nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        partial = torch.ones(4, device=GPU)
        work = dist.all_reduce(partial, async_op=True)
        with pytest.raises(ContractError, match="memory is read that the collective allreduce_ uses on NCCL's stream"):
            partial + 1
        with pytest.raises(ContractError, match="the collective allreduce_ uses"):
            partial.zero_()
        assert work is not None
        clock = WaitClock()
        with clock.waiting(partial):
            work.wait()
        assert partial.cpu().tolist() == [1.0] * 4
        assert clock.take() >= 0
        whole = torch.empty(4, device=GPU)
        dist.all_gather_single(whole, partial)
        dist.all_to_all_single(whole, partial, [4], [4])
        assert whole.cpu().tolist() == [1.0] * 4
        with pytest.raises(ContractError, match="not among what the product uses"):
            dist.broadcast(partial, 0)
    finally:
        dist.destroy_process_group()
    gpu_machine.gpu.check()


def test_signatures(gpu_machine: Machine) -> None:
    """The parameters' names of TensorRT 11.1: the product may give them by name."""
    trt = gpu_machine.tensorrt
    engine = trt.Runtime.deserialize_cuda_engine
    assert list(inspect.signature(engine).parameters) == ["self", "serialized_engine"]
