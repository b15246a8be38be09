"""Errors after which CUDA fails for ever, told from those that it gets over; without a GPU."""

from types import SimpleNamespace

import pytest
import torch

from stepvideo_serve.engine.device_errors import device_errors, lost_context, require_context
from stepvideo_serve.engine.nvinfer import NvInferRunner
from stepvideo_serve.errors import DeviceLost, EngineError, InvalidRequest
from tests.engine.toy import SPEC

ILLEGAL = "CUDA error: an illegal memory access was encountered"
OUT_OF_MEMORY = "CUDA error: out of memory"
ADVICE = "\nCUDA kernel errors might be asynchronously reported at some other API call."


@pytest.fixture
def cuda_says(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What CUDA answers in a process that uses it: all is well while this is empty."""
    sentences: list[str] = []

    def query() -> bool:
        for sentence in sentences:
            raise torch.AcceleratorError(sentence + ADVICE)
        return False  # work is under way

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(query=query))
    return sentences


def test_an_error_of_cuda_loses_the_device() -> None:
    with (
        pytest.raises(DeviceLost, match=rf"AcceleratorError: {ILLEGAL}\): send the request again") as caught,
        device_errors(),
    ):
        raise torch.AcceleratorError(ILLEGAL + ADVICE)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value.__cause__, torch.AcceleratorError)


@pytest.mark.parametrize(
    "error", [torch.AcceleratorError(OUT_OF_MEMORY), torch.OutOfMemoryError("2 GiB"), ValueError()]
)
@pytest.mark.usefixtures("cuda_says")
def test_what_cuda_gets_over_stays_what_it_is(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, device_errors():
        raise error
    assert caught.value is error


@pytest.mark.parametrize("error", [RuntimeError("CUBLAS_STATUS_EXECUTION_FAILED"), EngineError("TensorRT failed")])
def test_whatever_the_error_is_cuda_is_asked(cuda_says: list[str], error: Exception) -> None:
    cuda_says.append(ILLEGAL)
    with pytest.raises(DeviceLost, match=f"{error}; CUDA says: {ILLEGAL}"), device_errors():
        raise error


def test_the_answer_to_a_request_is_no_error_of_the_device(cuda_says: list[str]) -> None:
    cuda_says.append(ILLEGAL)
    with pytest.raises(InvalidRequest), device_errors():
        raise InvalidRequest("The latents must be finite.")


def test_where_nobody_uses_cuda_nothing_is_lost() -> None:
    assert lost_context() is None
    require_context("a probe asked")


def test_lack_of_memory_leaves_the_context_whole(cuda_says: list[str]) -> None:
    cuda_says.append(OUT_OF_MEMORY)
    assert lost_context() is None


@pytest.mark.parametrize("lost", [True, False])
def test_a_refusal_of_tensorrt_is_the_devices_where_cuda_says_so(cuda_says: list[str], lost: bool) -> None:
    cuda_says += [ILLEGAL] * lost
    logger = SimpleNamespace(last_error="Cuda Runtime (700)")
    runner = SimpleNamespace(spec=SPEC, _logger=logger, device=torch.device("cuda", 0))
    sentence = rf"TensorRT refused to run toy \(Cuda Runtime \(700\)\); CUDA says: {ILLEGAL}"
    with pytest.raises(DeviceLost if lost else EngineError, match=sentence if lost else "build the engine again"):
        raise NvInferRunner._refused(runner, {"values": [4, 8]})  # type: ignore[arg-type]
