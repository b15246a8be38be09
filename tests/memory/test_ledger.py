"""The ledger of memory: against what torch took on an H200, against the communicators that ranks make, and its sums."""

import re
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from stepvideo_serve.geometry import VideoGeometry
from stepvideo_serve.memory.ledger import (
    CONTEXT_BYTES,
    POOL_BYTES,
    RANK_REST_BYTES,
    Between,
    Graphs,
    between_graphs,
    communicators,
    ledger,
)
from stepvideo_serve.memory.placement import DECODER, ENCODER, SERVER, TEXT, Placement
from stepvideo_serve.memory.predicted import ENGINES, TORCH, predicted, runs_on
from stepvideo_serve.memory.sizes import GIB, ModelSize, Workload
from stepvideo_serve.parallel.collectives import Collectives
from stepvideo_serve.parallel.layout import Layout
from stepvideo_serve.planning.model_size import PUBLISHED, model_size, workload

SINGLE = Layout()
LAYOUTS = ("single", "cfg2", "tp2", "sp4", "cfg2.tp4", "cfg2.sp4", "tp2.sp4", "cfg2.tp2.sp2")


@pytest.fixture(scope="module")
def size() -> ModelSize:
    return model_size(PUBLISHED)


@pytest.fixture(scope="module")
def work() -> Workload:
    return workload(PUBLISHED, VideoGeometry(102, 544, 992), steps=50)


def measured(root: Path) -> dict[str, float]:
    """Stage -> GiB at its peak in torch on an H200, weights included (docs/gpu.md)."""
    text = (root / "docs" / "gpu.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in text.splitlines() if "|" in line]
    return {row[0]: float(row[4]) for row in rows if len(row) == 5 and re.fullmatch(r"[\d.]+", row[4])}


def test_it_is_what_torch_took_on_an_h200(root: Path, size: ModelSize, work: Workload) -> None:
    found = predicted(size, Placement(SINGLE), work, "bf16", TORCH)
    held = {holding.process: holding.tensors / GIB for holding in found.holdings}
    clip = size.clip_parameters * 2 / GIB
    took = measured(root)
    assert held["rank 0"] == pytest.approx(took["DiT, one guided step, 48 layers"], rel=0.02)
    assert held[DECODER] == pytest.approx(took["VAE decoder, one chunk of 17 frames"], rel=0.01)
    assert held[ENCODER] == pytest.approx(took["VAE encoder, one image"], rel=0.03)
    assert held[TEXT] - clip == pytest.approx(took["Step-LLM, one prompt"], rel=0.01)


def test_a_decoder_in_engines_takes_what_tensorrt_planned(root: Path, size: ModelSize, work: Workload) -> None:
    """docs/engines.md has the plan."""
    text = (root / "docs" / "engines.md").read_text(encoding="utf-8")
    [planned] = re.findall(r"Video-VAE decoder, one chunk \|.*\| ([\d.]+) \|$", text, re.MULTILINE)
    found = predicted(size, Placement(SINGLE), work, "bf16").of(DECODER)
    assert found.activations / GIB == pytest.approx(float(planned), rel=0.005)


@pytest.fixture
def groups_made() -> Iterator[list[int]]:
    """How many ranks each further group has that this process made and is in."""
    made: list[int] = []
    new_group = dist.new_group

    def noted(ranks: list[int]) -> object:
        if 0 in ranks:
            made.append(len(ranks))
        return new_group(ranks)

    with patch.object(dist, "new_group", noted):
        yield made
    dist.destroy_process_group()


@pytest.mark.parametrize("name", LAYOUTS)
def test_communicators_are_those_that_a_rank_makes(name: str, groups_made: list[int]) -> None:
    layout = Layout.parse(name)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=layout.world_size)
    Collectives(layout, 0)
    several = layout.world_size > 1  # one rank alone has no process group, and makes no communicator
    assert communicators(layout) == several + len(groups_made)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
def test_every_byte_is_somebodys(name: str, precision: str, size: ModelSize, work: Workload) -> None:
    place = Placement(Layout.parse(name), text=1)
    found = predicted(size, place, work, precision)
    assert {holding.process for holding in found.holdings} == {*place.processes, SERVER}
    assert sum(found.by_gpu.values()) == sum(holding.total for holding in found.holdings)
    assert all(sum(holding.parts.values()) == holding.total for holding in found.holdings)
    assert found.by_gpu[found.fullest] == max(found.by_gpu.values())


def test_a_stage_takes_all_that_it_holds_to_another_gpu(size: ModelSize, work: Workload) -> None:
    here, there = (predicted(size, Placement(Layout(cfg=2), text=gpu), work, "fp8") for gpu in (0, 2))
    moved = here.of(TEXT).total
    assert there.by_gpu == {**here.by_gpu, 0: here.by_gpu[0] - moved, 2: moved + CONTEXT_BYTES + POOL_BYTES}
    assert there.without([2]).by_gpu.keys() == {0, 1}
    assert Placement(Layout(cfg=2), text=1).shared == {0, 1}


def test_where_ranks_decode_each_holds_a_decoder_and_the_model_none(size: ModelSize, work: Workload) -> None:
    alone, two = (predicted(size, Placement(Layout.parse(name)), work, "bf16") for name in ("single", "cfg2"))
    decoder = alone.of(DECODER)
    assert two.of("rank 1").weights == alone.of("rank 0").weights + decoder.weights
    assert two.of("rank 1").activations == max(alone.of("rank 0").activations, decoder.activations)
    with pytest.raises(KeyError, match=DECODER):
        two.of(DECODER)


def test_fp32_takes_twice_of_bf16_and_fp8_less(size: ModelSize, work: Workload) -> None:
    in_fp32, in_bf16, in_fp8, in_nvfp4 = (
        predicted(size, Placement(SINGLE), work, precision) for precision in ("fp32", "bf16", "fp8", "nvfp4")
    )
    for process in ("rank 0", ENCODER, DECODER):
        assert in_fp32.of(process).weights == 2 * in_bf16.of(process).weights
        assert in_fp32.of(process).keys_values == 2 * in_bf16.of(process).keys_values
    saved = size.dit.cut
    assert in_bf16.of("rank 0").weights - in_fp8.of("rank 0").weights == saved
    assert in_nvfp4 == in_fp8


def test_what_comes_after_the_graphs_is_what_a_loader_leaves_free() -> None:
    found = ledger(Placement(Layout(sp=2)), {"rank 0": Graphs(7, 5)}, Between(11, 13))
    assert found.of("rank 0").after_graphs == 11 + 13 + RANK_REST_BYTES
    assert found.of("rank 1").tensors == 11 + 13
    assert found.of(TEXT).tensors == 0
    assert Graphs(7, 5) + Graphs(2, 3) == Graphs(9, 5)


def test_tokens_and_keys_are_divided_among_the_ranks_that_share_them(size: ModelSize) -> None:
    """38,000 tokens, 397 of text."""
    one, sp4, tp4, cfg2 = (
        between_graphs(size.widths, layout, 38_000, 397)
        for layout in (SINGLE, Layout(sp=4), Layout(tp=4), Layout(cfg=2))
    )
    assert one.keys_values == 2 * 48 * 2 * 397 * 6144 * 2
    assert (sp4.keys_values, tp4.keys_values) == (one.keys_values, one.keys_values // 4)
    assert cfg2.keys_values == one.keys_values // 2
    assert sp4.tokens < tp4.tokens / 3


def test_what_runs_a_backend() -> None:
    assert [runs_on(backend) for backend in ("tensorrt", "tensorrt_rtx", "ort", "eager")] == [ENGINES] * 2 + [TORCH] * 2
