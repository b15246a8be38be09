"""Plans as data: what they cover, what each part gets, and that what does not fit is named."""

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from stepvideo_serve.assembly.checkpoint import meta_shapes
from stepvideo_serve.dit.blocks import DiTBlock
from stepvideo_serve.dit.config import DiTConfig
from stepvideo_serve.dit.model import StepVideoDiT
from stepvideo_serve.dit.sharding import dit_plan
from stepvideo_serve.errors import SetupError
from stepvideo_serve.text.sharding import llm_plan
from stepvideo_serve.text.step_llm import StepLLM, StepLLMConfig
from stepvideo_serve.weights.cuts import REPLICATED, WHOLE, Cut, ShardPlan, Split, TensorPart
from tests.mini import MINI

DIT = DiTConfig(
    num_heads=48, num_layers=48, in_channels=64, out_channels=64, patch_size=1, llm_channels=6144, clip_channels=1024
)
LLM = StepLLMConfig(
    width=6144, num_heads=48, num_groups=8, num_layers=48, ffn_width=16896, vocab_size=65536, norm_eps=1e-5
)
Shapes = dict[str, tuple[int, ...]]


@pytest.fixture(scope="module")
def dit_shapes() -> Shapes:
    return meta_shapes(lambda: StepVideoDiT(DIT))


@pytest.fixture(scope="module")
def llm_shapes() -> Shapes:
    return meta_shapes(lambda: StepLLM(LLM))


def plan_of(split: Split) -> ShardPlan:
    return ShardPlan("a network", {"w": split})


def cut(tensor: Tensor, split: Split, part: TensorPart, rows: int = 3) -> Tensor:
    """The part, put together block by block as the reader of files does it."""
    found = plan_of(split).cuts({"w": tuple(tensor.shape)}, part)["w"]
    out = torch.full(found.shape(tuple(tensor.shape)), -1, dtype=tensor.dtype)
    for source, target in found.blocks(tuple(tensor.shape), rows):
        out[target] = tensor[source]
    return out


def test_the_official_keys_are_all_covered(dit_shapes: Shapes, llm_shapes: Shapes) -> None:
    dit_plan(DIT).check(dit_shapes)
    llm_plan(LLM).check(llm_shapes)


def test_what_is_cut(dit_shapes: Shapes, llm_shapes: Shapes) -> None:
    part = TensorPart(1, 4)
    dit, llm = dit_plan(DIT).cuts(dit_shapes, part), llm_plan(LLM).cuts(llm_shapes, part)
    assert {key.split(".", 2)[2] for key in dit} == {
        "attn1.wqkv.weight",
        "attn1.wo.weight",
        "attn2.wq.weight",
        "attn2.wkv.weight",
        "attn2.wo.weight",
        "ff.net.0.proj.weight",
        "ff.net.2.weight",
    }
    assert {key.split(".", 3)[3] for key in llm} == {
        "attention.wqkv.weight",
        "attention.wo.weight",
        "feed_forward.w1.weight",
        "feed_forward.w2.weight",
    }
    assert len(dit) == 7 * 48
    assert len(llm) == 4 * 48
    assert dit["transformer_blocks.5.attn1.wqkv.weight"] == Cut(0, ((12 * 384, 24 * 384),))
    assert dit["transformer_blocks.47.ff.net.2.weight"] == Cut(1, ((6144, 12288),))
    assert llm["transformer.layers.3.attention.wqkv.weight"] == Cut(0, ((1536, 3072), (6144 + 512, 6144 + 1024)))
    assert llm["transformer.layers.3.feed_forward.w1.weight"] == Cut(0, ((4224, 8448), (16896 + 4224, 16896 + 8448)))


def test_the_whole_is_not_cut(dit_shapes: Shapes) -> None:
    assert dit_plan(DIT).cuts(dit_shapes, WHOLE) == {}


@pytest.mark.parametrize("count", [2, 4, 8])
def test_modules_have_the_shapes_of_the_cuts(dit_shapes: Shapes, llm_shapes: Shapes, count: int) -> None:
    part = TensorPart(count - 1, count)
    prefix = "transformer_blocks.0."
    blocks = {key: shape for key, shape in dit_shapes.items() if key.startswith(prefix)}
    cuts = dit_plan(DIT).cuts(blocks, part)
    expected = {prefix + key: shape for key, shape in meta_shapes(lambda: DiTBlock(DIT.width, count)).items()}
    assert expected == {key: cuts[key].shape(shape) if key in cuts else shape for key, shape in blocks.items()}
    cuts = llm_plan(LLM).cuts(llm_shapes, part)
    held = {key: cuts[key].shape(shape) if key in cuts else shape for key, shape in llm_shapes.items()}
    assert meta_shapes(lambda: StepLLM(LLM, count)) == held


@pytest.mark.parametrize(
    ("split", "joined"),
    [
        (Split(0, 4), 0),
        (Split(1, 8), 1),
        (Split(2, 4), 2),
    ],
)
@pytest.mark.parametrize("rows", [1, 3, 100])
def test_parts_in_a_row_are_the_whole(split: Split, joined: int, rows: int) -> None:
    whole = torch.arange(8 * 16 * 4).view(8, 16, 4)
    parts = [cut(whole, split, TensorPart(i, 4), rows) for i in range(4)]
    assert torch.equal(torch.cat(parts, joined), whole)


@pytest.mark.parametrize("rows", [1, 3, 100])
def test_every_section_is_cut(rows: int) -> None:
    """Twelve rows of queries, then four of keys and values, for two groups."""
    whole = torch.arange(16)
    split = Split(0, 2, (12, 4))
    assert cut(whole, split, TensorPart(0, 2), rows).tolist() == [0, 1, 2, 3, 4, 5, 12, 13]
    assert cut(whole, split, TensorPart(1, 2), rows).tolist() == [6, 7, 8, 9, 10, 11, 14, 15]
    assert cut(whole[None], replace(split, dim=1), TensorPart(1, 2), rows).tolist() == [[6, 7, 8, 9, 10, 11, 14, 15]]


def test_only_one_run_of_rows_is_contiguous() -> None:
    assert Cut(0, ((2, 4),)).is_contiguous
    assert not Cut(0, ((2, 4), (8, 9))).is_contiguous
    assert not Cut(1, ((2, 4),)).is_contiguous


@pytest.mark.parametrize(
    ("patterns", "named"),
    [
        ({"a.*": REPLICATED, "b": REPLICATED, "no.*.match": REPLICATED}, "no.*.match"),
        ({"a.*": REPLICATED}, " b "),
        ({"a.*": REPLICATED, "b": REPLICATED, "*.x": REPLICATED}, "a.x"),
    ],
    ids=["unused", "uncovered", "twice"],
)
def test_a_plan_that_does_not_fit_is_named(patterns: Mapping[str, None], named: str) -> None:
    with pytest.raises(SetupError, match="Sharding plan of a network") as caught:
        ShardPlan("a network", patterns).check(["a.x", "a.y", "b"])
    assert named in str(caught.value)


@pytest.mark.parametrize(
    ("split", "count", "named"),
    [
        (Split(0, 3), 2, "must divide by tp = 2, axis 0 has 3 pieces"),
        (Split(0, 5), 5, "5 equal pieces, found 12"),
        (Split(0, 2, (8, 6)), 2, "sections [8, 6]"),
        (Split(0, 2, (9, 3)), 2, "sections [9, 3]"),
        (Split(2, 2), 2, "axis 2"),
    ],
)
def test_what_does_not_divide_is_named(split: Split, count: int, named: str) -> None:
    with pytest.raises(SetupError) as caught:
        plan_of(split).cuts({"w": (12, 4)}, TensorPart(0, count))
    assert named in str(caught.value)


def test_heads_are_never_torn() -> None:
    """Three heads have 1152 rows, which two ranks could share; not so the heads."""
    config = replace(MINI.dit, num_heads=3)
    with pytest.raises(SetupError, match=r"transformer_blocks\.0\..*tp = 2, axis . has 3 pieces"):
        dit_plan(config).cuts(meta_shapes(lambda: StepVideoDiT(config)), TensorPart(0, 2))


@pytest.mark.parametrize(("index", "count"), [(2, 2), (-1, 2), (0, 0)])
def test_a_part_that_does_not_exist(index: int, count: int) -> None:
    with pytest.raises(SetupError, match="0 <= index < count"):
        TensorPart(index, count)
