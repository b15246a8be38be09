"""Stages on a GPU of their own, on the stub, which refuses an engine that runs while another GPU is the current one."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch

from stepvideo_serve.assembly.on_gpus import BESIDE, stage_device
from stepvideo_serve.assembly.stages import Denoiser, FrameDecoder, ImageEncoder, build_text_encoder
from stepvideo_serve.config import ServeConfig, StageDevice
from stepvideo_serve.errors import ConfigError
from stepvideo_serve.memory.placement import DECODER, ENCODER, SECTIONS, TEXT, Placement
from tests.fakes.clocks import ContractError
from tests.fakes.machine import Machine, machine
from tests.parallel.sharded_ranks import make_job, make_video

Load = Callable[..., ServeConfig]
SECOND = torch.device("cuda", 1)


@pytest.fixture
def two_gpus() -> Iterator[Machine]:
    with machine(count=2) as made:
        yield made


def placed(config: ServeConfig, device: StageDevice, *processes: str) -> ServeConfig:
    """The stages of these processes on that GPU."""
    sections = {SECTIONS[process]: getattr(config, SECTIONS[process]) for process in processes}
    return replace(config, **{name: replace(section, device=device) for name, section in sections.items()})


def test_the_decoder_computes_where_it_is_placed(load: Load, two_gpus: Machine) -> None:
    """The same graphs as ONNX Runtime's, so the same bits; the denoiser beside it stays on the first GPU."""
    decoder = FrameDecoder(placed(load("single"), "cuda:1", DECODER))
    denoiser = Denoiser(load("single"))
    assert decoder._graph.device == SECOND
    assert {str(runner.device) for runner in denoiser.runners.values()} == {"cuda:0"}
    expected = FrameDecoder(load("single", "ort")).decode(make_video())
    for frames, pictures in zip(decoder.decode(make_video()), expected, strict=True):
        assert (frames == pictures).all()
    assert len(list(denoiser.run(make_job()))) > 0
    assert torch.cuda.current_device() == 0, "threads that begin later compute there"
    two_gpus.gpu.check()


@pytest.mark.usefixtures("two_gpus")
def test_an_engine_under_another_current_gpu_is_noticed(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the stub is for here: without the runner's own look at the current GPU the call would go to GPU 0."""
    decoder = FrameDecoder(placed(load("single"), "cuda:1", DECODER))
    monkeypatch.setattr(torch.cuda, "device", lambda _: torch.no_grad())
    with pytest.raises(ContractError, match="vae_decoder is on cuda:1, the current GPU is cuda:0"):
        list(decoder.decode(make_video()))


@pytest.mark.parametrize(
    ("process", "build"), [(TEXT, build_text_encoder), (ENCODER, ImageEncoder), (DECODER, FrameDecoder)]
)
@pytest.mark.usefixtures("two_gpus")
def test_every_stage_asks_for_its_own_gpu(process: str, build: Callable[[ServeConfig], object], load: Load) -> None:
    config = placed(load("single"), "cuda:7", process)
    said = (
        rf'\[{SECTIONS[process]}\] device must be one of the 2 GPUs that torch sees here, got "cuda:7": see nvidia-smi'
    )
    with pytest.raises(ConfigError, match=said):
        build(config)


@pytest.mark.usefixtures("two_gpus")
def test_where_each_stage_is(load: Load) -> None:
    config = placed(load("single"), "cuda:1", ENCODER)
    assert {stage: str(stage_device(config, stage)) for stage in ("", *BESIDE)} == {
        "": "cuda",
        TEXT: "cuda",
        ENCODER: "cuda:1",
        DECODER: "cuda",
    }


def test_what_is_refused(load: Load) -> None:
    on_cpu = placed(load("single", "ort"), "cuda:1", TEXT)
    with pytest.raises(
        ConfigError, match=r'\[text\] device must be "" beside \[model\] device = "cpu", got "cuda:1": '
    ):
        Placement.of(on_cpu)
    with pytest.raises(ConfigError, match=r'\[decoder\] device must be "" where several ranks decode, .* got "cuda:1"'):
        Placement.of(placed(load("cfg2.sp2"), "cuda:1", DECODER))
