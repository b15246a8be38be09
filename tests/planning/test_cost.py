"""The planner's arithmetic: against the golden counts of the official model, against the code that runs, and against
what is known of the published model on eight H100."""

import json
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stepvideo_serve.assembly.checkpoint import meta_shapes
from stepvideo_serve.dit.blocks import DiTBlock
from stepvideo_serve.dit.config import DiTConfig
from stepvideo_serve.dit.graphs import (
    ContextGraph,
    CrossGraph,
    EmbedGraph,
    FinalGraph,
    block_spec,
    context_spec,
    cross_spec,
    embed_spec,
    final_spec,
)
from stepvideo_serve.dit.model import StepVideoDiT
from stepvideo_serve.dit.segments import PIECES, CoreSegment, core_spec, segment_module, segment_spec
from stepvideo_serve.dit.sharding import dit_plan
from stepvideo_serve.dit.velocity import DiTVelocity
from stepvideo_serve.engine.runner import EagerRunner
from stepvideo_serve.errors import ConfigError
from stepvideo_serve.geometry import VideoGeometry
from stepvideo_serve.memory.placement import Placement
from stepvideo_serve.memory.predicted import block_scratch, predicted
from stepvideo_serve.memory.sizes import ModelSize, Workload
from stepvideo_serve.parallel.collectives import Collectives
from stepvideo_serve.parallel.layout import Layout
from stepvideo_serve.planning.cost import (
    exchanges,
    layouts_of,
    placements_of,
    predict,
    step_flops,
    step_seconds,
    two_queues,
)
from stepvideo_serve.planning.gpus import GPUS, gpu_named
from stepvideo_serve.planning.model_size import PUBLISHED, decoder_bytes, encoder_bytes, model_size, workload
from stepvideo_serve.text.states import TextStates
from stepvideo_serve.vae.model import VideoDecoder, VideoEncoder
from stepvideo_serve.weights.cuts import TensorPart
from tests.meta_device import ReadableMeta

H100 = GPUS["H100"]
SINGLE = Layout()
STANDARD = VideoGeometry(102, 544, 992)
LAYOUTS = ("single", "cfg2", "tp2", "tp8", "sp4", "sp8", "cfg2.tp4", "cfg2.sp4", "tp2.sp4", "cfg2.tp2.sp2")


@pytest.fixture(scope="module")
def size() -> ModelSize:
    return model_size(PUBLISHED)


@pytest.fixture(scope="module")
def work() -> Workload:
    return workload(PUBLISHED, STANDARD, steps=50)


@pytest.fixture(scope="module")
def counted(shared: Path) -> dict[str, Any]:
    """Parameters and FLOPs counted on the official code."""
    counts: dict[str, Any] = json.loads((shared / "goldens" / "flops.json").read_text())
    return counts


def tflop(counted: dict[str, Any], *parts: str) -> float:
    return float(sum(counted["dit_step_flops"][part]["tflop"] for part in parts))


def test_parameters_are_those_of_the_official_model(size: ModelSize, counted: dict[str, Any]) -> None:
    assert size.dit.cut + size.dit.whole == counted["dit_params"]["total"]
    assert size.llm.cut + size.llm.whole == counted["llm_params"]["total"]
    assert size.clip_parameters == counted["clip_params"]
    assert size.vae_encoder_parameters + size.vae_decoder_parameters == sum(counted["vae_params"].values())
    assert size.llm.bytes(1, "bf16") == counted["llm_params"]["bytes_bf16"]


def test_flops_of_a_step_are_those_of_the_official_model(
    size: ModelSize, work: Workload, counted: dict[str, Any]
) -> None:
    """One rank does all the work; what it does not repeat in each step, or for each branch, is missing from it."""
    flops = {part: value / 1e12 for part, value in step_flops(size, SINGLE, work).items()}
    assert work.tokens == counted["tokens"]["N"]
    assert flops["qkv"] == pytest.approx(tflop(counted, "self_attn qkv proj"))
    assert flops["core"] == pytest.approx(tflop(counted, "self_attn core (QK^T, PV)"))
    assert flops["out"] == pytest.approx(tflop(counted, "self_attn out proj"))
    assert flops["cross_projections"] == pytest.approx(tflop(counted, "cross_attn q,out proj"))
    assert flops["cross_core"] == pytest.approx(tflop(counted, "cross_attn core"))
    assert flops["feed_forward"] == pytest.approx(tflop(counted, "ffn"))
    per_request = ("cross_attn kv proj (397 text tok)", "text projection (caption 320 + clip 77)")
    assert work.prepare_flops / 1e12 == pytest.approx(tflop(counted, *per_request))
    twice = 2 * 37944 * 128 * 6144 / 1e12 + tflop(counted, "adaln + embedders") / 2  # embedded once for both branches
    total = sum(flops.values()) + work.prepare_flops / 1e12 + twice
    assert total == pytest.approx(counted["dit_step_total_tflop"], rel=1e-9)


def test_flops_of_the_other_networks_are_those_of_the_official_model(work: Workload, counted: dict[str, Any]) -> None:
    assert work.llm_flops / 1e12 == pytest.approx(counted["llm_tflop_2prompts"])
    assert work.encode_flops / 1e12 == pytest.approx(counted["vae_encode_image_1f"]["total_tflop"])
    assert work.chunk_flops / 1e12 == pytest.approx(counted["vae_decode_chunk_3lat"]["total_tflop"])
    assert work.chunks == 6


@pytest.mark.parametrize("name", LAYOUTS)
def test_all_ranks_together_do_the_work_of_one(size: ModelSize, work: Workload, name: str) -> None:
    layout = Layout.parse(name)
    odd = replace(work, tokens=37_941)  # not divisible by 2, 4 or 8
    whole = step_flops(size, SINGLE, odd)
    ranks = [step_flops(size, layout, odd, rank) for rank in range(layout.world_size)]
    for part in whole.keys() - {"outer"}:
        assert sum(rank[part] for rank in ranks) == pytest.approx(whole[part])
    assert all(sum(rank.values()) <= sum(ranks[0].values()) for rank in ranks)


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_weights_of_a_rank_are_what_its_slices_hold(size: ModelSize, work: Workload, tp: int) -> None:
    shapes = meta_shapes(lambda: StepVideoDiT(PUBLISHED.dit))
    cuts = dit_plan(PUBLISHED.dit).cuts(shapes, TensorPart(0, tp))
    held = {key: cuts[key].shape(shape) if key in cuts else shape for key, shape in shapes.items()}
    parameters = sum(torch.Size(shape).numel() for shape in held.values())
    decoder = 0 if tp == 1 else size.vae_decoder_parameters
    assert predicted(size, Placement(Layout(tp=tp)), work, "bf16").of("rank 0").weights == 2 * (parameters + decoder)


def test_fp8_halves_what_is_cut(size: ModelSize) -> None:
    assert size.dit.bytes(4, "bf16") - size.dit.bytes(4, "fp8") == size.dit.cut // 4
    assert 29.3e9 < size.dit.bytes(1, "fp8") < 29.9e9


def test_step_llm_may_be_cut_only_with_tensor_parallelism_that_divides_its_groups() -> None:
    assert set(placements_of(Layout(sp=4), 8)) == {"whole", "elsewhere"}
    assert set(placements_of(Layout(tp=8), 8)) == {"split", "whole", "elsewhere"}
    assert "split" not in placements_of(Layout(tp=4), 6)


def test_step_llm_goes_where_there_is_room(size: ModelSize, work: Workload) -> None:
    placements = {
        name: predict(size, Layout.parse(name), work, H100, "bf16").placement for name in ("tp8", "cfg2.sp4", "tp2")
    }
    assert placements == {"tp8": "split", "cfg2.sp4": "elsewhere", "tp2": "split"}
    assert predict(size, SINGLE, work, GPUS["H200"], "bf16").placement == "whole"
    assert predict(size, SINGLE, work, GPUS["L40S"], "bf16").placement is None


def test_decoder_and_blocks_do_not_need_their_memory_at_the_same_time(size: ModelSize, work: Workload) -> None:
    """On a rank that decodes. The decoder of one rank is another process, and keeps its memory."""
    layout = Layout(sp=4)
    small, large = (predicted(size, Placement(layout), replace(work, chunk_bytes=n), "bf16") for n in (0, 10**11))
    assert small.of("rank 0").activations == block_scratch(size, layout, -(-work.tokens // 4))
    assert large.of("rank 0").activations == pytest.approx(0.642e11)
    alone = predicted(size, Placement(SINGLE), replace(work, chunk_bytes=10**11), "bf16")
    assert alone.of("rank 0").activations == block_scratch(size, SINGLE, work.tokens)
    assert alone.of("vae_decoder").activations == large.of("rank 0").activations


def test_scratch_of_a_block_is_near_what_tensorrt_planned(size: ModelSize) -> None:
    """4.5 GB for one whole block at 38,400 tokens."""
    assert block_scratch(size, SINGLE, 38_400) == pytest.approx(4.5e9, rel=0.1)


@pytest.mark.parametrize(("layout", "seconds"), [("tp8", 0.67), ("cfg2.tp4", 0.29), ("sp8", 0.06), ("cfg2.sp4", 0.05)])
def test_communication_on_eight_h100_is_what_is_known(
    size: ModelSize, work: Workload, layout: str, seconds: float
) -> None:
    step = step_seconds(size, Layout.parse(layout), work, H100, "bf16")
    assert step.communication == pytest.approx(seconds, abs=0.015)
    assert step.compute == pytest.approx(1.6, abs=0.05)


@pytest.mark.parametrize(("precision", "low", "high"), [("bf16", 80, 90), ("fp8", 41, 51)])
def test_a_request_on_eight_h100_takes_what_the_best_open_systems_would_need(
    size: ModelSize, work: Workload, precision: str, low: float, high: float
) -> None:
    assert low < predict(size, Layout(cfg=2, sp=4), work, H100, precision).request_s < high


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_step_takes_between_the_longer_of_its_parts_and_their_sum(size: ModelSize, work: Workload, name: str) -> None:
    for gpu in GPUS.values():
        step = step_seconds(size, Layout.parse(name), work, gpu, "fp8")
        assert max(step.compute, step.communication) <= step.total * (1 + 1e-9)
        assert step.total <= (step.compute + step.communication) * (1 + 1e-9)


def test_sums_are_hidden_behind_the_other_branch(size: ModelSize, work: Workload) -> None:
    """tp8 runs two branches on each rank, cfg2.tp4 one."""
    both, alone = (step_seconds(size, Layout.parse(name), work, H100, "bf16") for name in ("tp8", "cfg2.tp4"))
    assert both.total - both.compute < both.communication / 3
    assert alone.total == pytest.approx(alone.compute + alone.communication)


@pytest.mark.parametrize(
    ("pieces", "sum_s", "branches", "expected"),
    [
        ([1.0, 2.0], 0.0, 2, 6.0),
        ([1.0, 2.0], 0.5, 1, 4.0),
        ([1.0, 1.0], 1.0, 2, 5.0),  # the first sums run while the other branch computes; the last one is left
        ([1.0, 1.0], 3.0, 2, 13.0),  # the sums are the longer queue: one piece, then four sums
    ],
)
def test_two_queues(pieces: list[float], sum_s: float, branches: int, expected: float) -> None:
    assert two_queues(pieces, sum_s, branches) == expected


def test_layouts_of_eight_ranks() -> None:
    names = {str(layout) for layout in layouts_of(8, heads=48, tokens=37_944)}
    assert names == {"tp8", "sp8", "tp4.sp2", "tp2.sp4", "cfg2.tp4", "cfg2.sp4", "cfg2.tp2.sp2"}
    assert {str(layout) for layout in layouts_of(2, heads=3, tokens=45)} == {"cfg2"}
    assert {str(layout) for layout in layouts_of(4, heads=8, tokens=3)} == {"tp4", "tp2.sp2", "cfg2.tp2", "cfg2.sp2"}


@pytest.mark.parametrize(
    ("gpus", "heads", "possible"), [(3, 48, "1, 2, 4, 8, 16, 32"), (0, 48, "1, 2"), (4, 3, "1, 2")]
)
def test_a_number_of_gpus_without_a_layout_is_refused(gpus: int, heads: int, possible: str) -> None:
    with pytest.raises(ConfigError, match=f"{heads} heads needs {possible}.* got {gpus}"):
        layouts_of(gpus, heads, 37_944)


def test_an_unknown_gpu_is_refused() -> None:
    assert gpu_named("b200") is GPUS["B200"]
    with pytest.raises(ConfigError, match="H100, H200, B200, L40S, got 'A100'"):
        gpu_named("A100")


@pytest.fixture
def fake_ranks() -> Iterator[Callable[[Layout, int], Collectives]]:
    """A rank's communicator whose collectives return at once, with whatever was in the memory of the result."""

    def start(layout: Layout, rank: int) -> Collectives:
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.world_size)
        return Collectives(layout, rank)

    yield start
    dist.destroy_process_group()


def graphs_without_memory(config: DiTConfig, layout: Layout) -> dict[str, EagerRunner]:
    """What one rank runs, on the meta device."""
    name, parts = "bfloat16", layout.tp
    with torch.device("meta"):
        outer = StepVideoDiT(replace(config, num_layers=0))
        blocks = [DiTBlock(config.width, parts) for _ in range(config.num_layers)]
    modules = [
        (context_spec(config, name), ContextGraph(outer)),
        (embed_spec(config, name), EmbedGraph(outer)),
        (final_spec(config, name), FinalGraph(outer)),
        (core_spec(name, config.num_heads // (parts * layout.sp)), CoreSegment()),
    ]
    for i, block in enumerate(blocks):
        pieces = PIECES[layout.sp > 1]
        modules += [(segment_spec(config, name, piece, i, parts), segment_module(piece, block)) for piece in pieces]
        modules += [(cross_spec(config, name, i, parts), CrossGraph(block)), (block_spec(config, name, i), block)]
    return {spec.name: EagerRunner(spec, module.bfloat16(), "meta") for spec, module in modules}


@pytest.mark.parametrize(
    ("name", "rank", "guided"),
    [
        *((name, Layout.parse(name).world_size - 1, True) for name in LAYOUTS),
        *(("sp8", 0, True), ("cfg2.tp2.sp2", 0, True), ("cfg2.tp2.sp2", 0, False), ("tp2.sp4", 7, False)),
    ],
)
def test_bytes_are_those_that_the_collectives_are_given(
    size: ModelSize, fake_ranks: Callable[[Layout, int], Collectives], name: str, rank: int, guided: bool
) -> None:
    """The real schedule in the published width, with one layer and a number of tokens that divides by nothing."""
    layout = Layout.parse(name)
    config = replace(PUBLISHED.dit, num_layers=1)
    ranks = fake_ranks(layout, rank)
    dit = DiTVelocity(graphs_without_memory(config, layout), config, torch.bfloat16, "meta", ranks)
    texts = tuple(TextStates(torch.empty(n, 6144), torch.empty(77, 1024)) for n in (40, 30)[: 1 + guided])
    shape = (3, 64, 7, 11)
    with ReadableMeta():
        dit(torch.empty(shape), 0.5, dit.prepare(shape, torch.empty(shape[1:]), 5.0, texts))
    expected = exchanges(replace(size, layers=1), layout, tokens=231, branches=len(texts), rank=rank)
    assert ranks.sent_bytes == {exchange.collective: exchange.payload_bytes for exchange in expected}


def test_what_leaves_the_gpu(size: ModelSize) -> None:
    sums, heads, back, gather, both = exchanges(size, Layout(2, 4, 2), tokens=100)
    assert [exchange.calls for exchange in (sums, heads, back, gather, both)] == [144, 48, 48, 1, 1]
    assert sums.wire_bytes == 1.5 * sums.payload_bytes
    assert heads.wire_bytes == heads.payload_bytes / 2
    assert back.wire_bytes == back.payload_bytes / 2
    assert gather.wire_bytes == gather.payload_bytes / 2
    assert both.wire_bytes == both.payload_bytes == 100 * 64 * 4
    assert exchanges(size, SINGLE, tokens=100) == ()


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors alive, and remembers the most."""

    def __init__(self) -> None:
        TorchDispatchMode.__init__(self)
        self.alive: dict[int, int] = {}
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self.alive:
                self.alive[key] = storage.nbytes()
                weakref.finalize(storage, self.alive.pop, key)
        self.most = max(self.most, sum(self.alive.values()))
        return result


def test_memory_of_the_vae_is_what_an_eager_run_holds() -> None:
    with torch.device("meta"), torch.inference_mode():
        decoder, encoder = VideoDecoder(PUBLISHED.vae).bfloat16(), VideoEncoder(PUBLISHED.vae).bfloat16()
        latents = torch.empty(1, 3, 64, 8, 12, dtype=torch.bfloat16)
        with LiveBytes() as live:
            decoder(latents)
        assert decoder_bytes(PUBLISHED.vae, 128, 192) == pytest.approx(live.most, rel=1e-4)
        with LiveBytes() as live:
            encoder(torch.empty(1, 1, 3, 128, 192, dtype=torch.bfloat16))
        assert encoder_bytes(PUBLISHED.vae, 128, 192) == pytest.approx(live.most, rel=1e-4)
