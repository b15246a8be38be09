"""Every stage hands its tensors to the device of its graphs and takes them back, without a GPU: torch's meta device
stands for one. Tensors there have no values, and torch refuses to mix them with those of the CPU, as it does for CUDA.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from export.compare.graph_stages import GraphStages, encode_prompts
from stepvideo_serve.assembly.checkpoint import Checkpoint
from stepvideo_serve.assembly.graphs import components
from stepvideo_serve.assembly.stages import LocalStages
from stepvideo_serve.config import ServeConfig
from stepvideo_serve.dit.velocity import DiTVelocity
from stepvideo_serve.engine.runner import EagerRunner
from stepvideo_serve.geometry import VideoGeometry
from stepvideo_serve.parallel.collectives import Collectives
from stepvideo_serve.parallel.layout import Layout
from stepvideo_serve.sampling.job import DenoiseJob, run_job
from tests.meta_device import META, ReadableMeta
from tests.mini import job_settings
from tests.serving.launch import EAGER


@pytest.fixture
def meta() -> Iterator[ReadableMeta]:
    with ReadableMeta() as mode:
        yield mode


@pytest.fixture
def config(mini_checkpoint: Path, tmp_path: Path) -> ServeConfig:
    path = tmp_path / "serve.toml"
    path.write_text(EAGER.format(model=mini_checkpoint, layout="single"))
    loaded = ServeConfig.load(path)
    return replace(loaded, model=replace(loaded.model, device=cast(Any, "meta")))


def job_for(stages: LocalStages) -> DenoiseJob:
    shape = VideoGeometry(34, 64, 96).latent_shape(stages.latent_channels)
    text = stages.encode_text("一只猫。")
    condition = stages.encode_image(torch.zeros(3, 64, 96), torch.zeros(shape[1:]))
    return DenoiseJob(torch.zeros(shape), condition, text, text, job_settings(2, preview_every=1))


def test_from_prompt_to_frames(config: ServeConfig, meta: ReadableMeta) -> None:
    stages = LocalStages(config)
    job = job_for(stages)
    assert {tensor.device.type for tensor in (job.condition, job.positive.llm, job.positive.clip)} == {"cpu"}
    *_, done = stages.denoise(job, lambda: False)
    assert done.latents is not None
    assert done.latents.device.type == "cpu"
    frames = [chunk.shape for chunk in stages.decode(done.latents)]
    assert frames == [(17, 64, 96, 3), (17, 64, 96, 3)]
    assert meta.reads >= 8  # text, image, two steps of two branches, two chunks


@pytest.mark.usefixtures("meta")
def test_calibration(config: ServeConfig) -> None:
    """The stages of export.calibrate --device cuda, up to the latents."""
    checkpoint = Checkpoint(config.model.dir)
    table = components(checkpoint, "fp32")

    def open_graph(name: str) -> EagerRunner:
        return EagerRunner(table[name].spec, table[name].load(), META)

    texts = encode_prompts(checkpoint, open_graph, ["一只猫。"])
    stages = GraphStages(checkpoint, open_graph, texts, torch.float32)
    condition = stages.encode_image(torch.zeros(3, 64, 96), torch.zeros(stages.latent_channels, 4, 6))
    [text] = texts.values()
    job = DenoiseJob(torch.zeros(3, *condition.shape), condition, text, text, job_settings(2))
    *_, done = stages.denoise(job, lambda: False)
    assert done.latents is not None
    assert done.latents.device.type == "cpu"


@pytest.mark.usefixtures("meta")
def test_on_ranks(config: ServeConfig) -> None:
    checkpoint = Checkpoint(config.model.dir)
    table = components(checkpoint, "fp32")
    graphs = {name: EagerRunner(table[name].spec, table[name].load(), META) for name in table if name[:3] == "dit"}
    ranks = Collectives(Layout.parse("single"), 0)
    velocity = DiTVelocity(graphs, checkpoint.dit_config, torch.float32, META, ranks)
    stages = LocalStages(config)
    *_, done = run_job(job_for(stages), velocity, lambda latents: latents.numpy())
    assert done.latents is not None
    assert done.latents.device.type == "cpu"
