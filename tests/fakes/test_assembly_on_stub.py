"""The real assembly on the stub: what a rank loads, from which folders, and what is said when it does not fit."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from stepvideo_kernels.vae_attention.reference import vae_attention
from stepvideo_serve.assembly import engines
from stepvideo_serve.assembly.engines import activation_memory
from stepvideo_serve.assembly.on_gpus import beside_graphs
from stepvideo_serve.assembly.runners import load_runners
from stepvideo_serve.assembly.stages import Denoiser, FrameDecoder, build_frame_decoder
from stepvideo_serve.config import ServeConfig
from stepvideo_serve.engine.gpu_memory import free_memory
from stepvideo_serve.engine.manifest import Manifest
from stepvideo_serve.engine.runner import EngineRunner
from stepvideo_serve.errors import EngineError
from tests.fakes.driver import FakeDriver
from tests.fakes.engines import write_engines, write_kernel
from tests.fakes.machine import Machine
from tests.fakes.plugin_engine import NAME, PART, WIDTH, forget_kernels, name_kernels
from tests.parallel.sharded_ranks import make_job, make_video

Load = Callable[..., ServeConfig]
GIB = 1 << 30


def test_one_rank_denoises_and_decodes_as_onnx_runtime_does(load: Load, gpu_machine: Machine) -> None:
    """The same graphs: the same bits."""
    job, video = make_job(), make_video()
    found, expected = (Denoiser(load("single", backend)) for backend in ("tensorrt", "ort"))
    for ours, theirs in zip(found.run(job), expected.run(job), strict=True):
        assert ours.latents is not None
        assert theirs.latents is not None
        assert torch.equal(ours.latents, theirs.latents)
    frames, pictures = (FrameDecoder(load("single", backend)).decode(video) for backend in ("tensorrt", "ort"))
    for picture, frame in zip(pictures, frames, strict=True):
        assert (picture == frame).all()
    assert gpu_machine.fake.runtimes == 1


@pytest.mark.parametrize(("layout", "held_mib"), [("single", 1), ("sp2", 0), ("cfg2.tp2", 0)])
def test_where_ranks_decode_the_model_beside_them_holds_no_decoder(
    layout: str, held_mib: int, load: Load, gpu_machine: Machine
) -> None:
    """Neither its weights nor its activations."""
    free = gpu_machine.gpu.free_bytes
    decoder = build_frame_decoder(load(layout))
    assert (free - gpu_machine.gpu.free_bytes) >> 20 == held_mib
    assert (decoder is None) is (layout != "single")


def test_plugins_of_a_rank_find_their_kernels(tp2: ServeConfig, gpu_machine: Machine) -> None:
    """In the order of a rank: the root's engines, its slice's, the root's again."""
    write_kernel(tp2.model.engines_dir / "kernels", WIDTH)
    name_kernels(tp2.model.engines_dir, PART)
    whole = load_runners(tp2, [NAME], 1)[NAME]
    own = load_runners(tp2, [NAME], 1, PART)[NAME]
    load_runners(tp2, ["vae_decoder"], 1)
    q, k, v = (torch.randn(1, 37, WIDTH, generator=torch.Generator().manual_seed(i)).half() for i in range(3))
    expected = vae_attention(q.float(), k.float(), v.float())
    FakeDriver.launches.clear()
    for runner in (whole, own):
        found = runner.from_cpu(q=q, k=k, v=v)["out_out"]
        torch.testing.assert_close(found.cpu().float(), expected, rtol=2**-9, atol=2**-10)
    assert len(FakeDriver.launches) == 2
    gpu_machine.gpu.check()


def test_a_kernel_that_is_missing_is_said_before_an_engine_is_loaded(tp2: ServeConfig, gpu_machine: Machine) -> None:
    kernels = tp2.model.engines_dir / "kernels"
    unnamed = rf"The engine {NAME} has plugins, and the manifest of .* must name their kernels by hash, found none"
    with pytest.raises(EngineError, match=unnamed):
        load_runners(tp2, [NAME], 1, PART)
    write_kernel(kernels, 2 * WIDTH)
    name_kernels(tp2.model.engines_dir, PART)
    refused = rf"{kernels} must hold one kernel vae_attention fp16 WIDTH=96 for SM 90, it has 0: build it"
    with pytest.raises(EngineError, match=refused):
        load_runners(tp2, [NAME], 1, PART)
    assert gpu_machine.fake.runtimes == 0


def test_engines_with_plugins_that_name_no_kernels_are_refused(tp2: ServeConfig, gpu_machine: Machine) -> None:
    write_kernel(tp2.model.engines_dir / "kernels", WIDTH)
    name_kernels(tp2.model.engines_dir)
    forget_kernels(tp2.model.engines_dir)
    with pytest.raises(EngineError, match=f"must name the kernels of engine {NAME}, .* it names none: build it again"):
        load_runners(tp2, [NAME], 1)
    assert gpu_machine.fake.runtimes == 0


def sized(config: ServeConfig, out: Path, **sizes: dict[str, int]) -> ServeConfig:
    """The engines of one rank, each of these with other sizes in bytes than usual."""
    onnx = config.model.engines_dir.parent / "onnx"
    write_engines(onnx, out, "single", sizes=sizes)
    return replace(config, model=replace(config.model, engines_dir=out))


def load_in_turn(config: ServeConfig, *groups: str) -> list[EngineRunner]:
    return [runner for group in groups for runner in load_runners(config, [group], 1).values()]


def test_activations_are_accounted_for_once(load: Load, tmp_path: Path, gpu_machine: Machine) -> None:
    """What one group has reserved is there for the next: 80 GiB hold 12 of activations and 66 of weights."""
    large = {"activation_bytes": 12 * GIB, "weight_bytes": 33 * GIB}
    config = sized(load("single"), tmp_path, dit_embed=large, vae_decoder=large)
    loaded = load_in_turn(config, "dit_embed", "vae_decoder")
    assert activation_memory(torch.device("cuda", 0)).size_bytes == 12 * GIB
    assert gpu_machine.gpu.free_bytes < 2 * GIB
    assert len(loaded) == 2  # still there


def test_a_larger_buffer_takes_the_place_of_the_smaller(load: Load, tmp_path: Path, gpu_machine: Machine) -> None:
    small = {"activation_bytes": 5 * GIB, "weight_bytes": 30 * GIB}
    large = {"activation_bytes": 12 * GIB, "weight_bytes": 33 * GIB}
    config = sized(load("single"), tmp_path, dit_embed=small, vae_decoder=large)
    loaded = load_in_turn(config, "dit_embed", "vae_decoder")
    assert gpu_machine.gpu.free_bytes < 5 * GIB
    assert len(loaded) == 2  # still there


def test_weights_that_leave_too_little(
    load: Load, tmp_path: Path, gpu_machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody gives any back, and nobody waits for that here."""
    monkeypatch.setattr(engines, "free_memory", partial(free_memory, patience_s=0.0))
    large = {"activation_bytes": 12 * GIB, "weight_bytes": 68 * GIB}
    config = sized(load("single"), tmp_path, dit_embed=large)
    free = f"{(68 * GIB - beside_graphs(config, '')) / GIB:.1f}"
    assert free == "67.0", "the rest of a rank, the texts' keys and values, and the tokens are left free"
    with pytest.raises(EngineError, match=rf"need 68\.0 GiB for their weights, {free} GiB are free beside their activ"):
        load_runners(config, ["dit_embed"], 1)
    assert gpu_machine.fake.runtimes == 0


def test_what_is_loaded_is_what_the_manifest_says(load: Load, gpu_machine: Machine) -> None:
    config = load("cfg2.sp2")
    names = sorted(Manifest.load(config.model.engines_dir / "tp0of1").graphs)
    with torch.no_grad():
        runners = load_runners(config, names, 1, "tp0of1")
    assert sorted(runners) == names
    assert {str(runner.device) for runner in runners.values()} == {"cuda:0"}
    gpu_machine.gpu.check()
