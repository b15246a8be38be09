"""Parts for tensor parallelism, read straight from the files: bit for bit the slices of the whole tensors."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from export.tiny.config import llm_json
from export.tiny_checkpoint import save_weights, write_json
from stepvideo_serve.assembly.checkpoint import Checkpoint, meta_shapes
from stepvideo_serve.dit.config import DiTConfig
from stepvideo_serve.dit.model import StepVideoDiT
from stepvideo_serve.errors import CheckpointError, SetupError
from stepvideo_serve.text.step_llm import StepLLM, StepLLMConfig
from stepvideo_serve.weights.cuts import TensorPart
from tests.mini import normal

State = dict[str, Tensor]
DIT = DiTConfig(
    num_heads=8, num_layers=2, in_channels=4, out_channels=4, patch_size=1, llm_channels=48, clip_channels=32
)
LLM = StepLLMConfig(width=48, num_heads=24, num_groups=8, num_layers=2, ffn_width=256, vocab_size=64, norm_eps=1e-5)
DTYPES = (torch.bfloat16, torch.float32)
COUNTS = (2, 4, 8)
COLUMNS = ("wo.weight", "net.2.weight", "w2.weight")
ROWS = ("attn1.wqkv.weight", "wq.weight", "wkv.weight", "proj.weight")


@dataclass(frozen=True)
class Written:
    """A checkpoint of a DiT and an LLM, and what is in its files."""

    folder: Path
    dit: State
    llm: State


def values(shapes: dict[str, tuple[int, ...]]) -> State:
    return {key: normal(*shape, seed=i).bfloat16() for i, (key, shape) in enumerate(shapes.items())}


@pytest.fixture(scope="module", params=["single", "sharded", "state dict"])
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Written:
    folder = tmp_path_factory.mktemp("slices")
    dit, llm = values(meta_shapes(lambda: StepVideoDiT(DIT))), values(meta_shapes(lambda: StepLLM(LLM)))
    write_json(folder / "transformer" / "config.json", DIT.to_dict())
    write_json(folder / "step_llm" / "config.json", llm_json(LLM))
    if request.param == "state dict":
        torch.save(dit, folder / "transformer" / "pytorch_model.bin")
        torch.save(llm, folder / "step_llm" / "pytorch_model.bin")
    else:
        files = 1 if request.param == "single" else 3
        save_weights(folder / "transformer", "diffusion_pytorch_model", dit, files)
        save_weights(folder / "step_llm", "model", llm, files)
    return Written(folder, dit, llm)


def expected(key: str, whole: Tensor, part: TensorPart) -> Tensor:
    """Written out apart from the plans: which tensors are cut, along which axis, and in how many sections."""

    def own(tensor: Tensor, dim: int) -> Tensor:
        return tensor.chunk(part.count, dim)[part.index]

    if key.endswith("attention.wqkv.weight"):
        return torch.cat([own(whole[: LLM.width], 0), own(whole[LLM.width :], 0)])
    if key.endswith("w1.weight"):
        return torch.cat([own(whole[: LLM.ffn_width], 0), own(whole[LLM.ffn_width :], 0)])
    if key.endswith(COLUMNS):
        return own(whole, 1)
    return own(whole, 0) if key.endswith(ROWS) else whole


def below(prefix: str, state: State) -> State:
    return {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}


def assert_holds(module: nn.Module, state: State, part: TensorPart, dtype: torch.dtype) -> None:
    loaded = module.state_dict()
    assert loaded.keys() == state.keys()
    for key, tensor in loaded.items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, expected(key, state[key], part).to(dtype)), key
    assert not any(parameter.requires_grad for parameter in module.parameters())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", COUNTS)
def test_parts_of_a_dit_block(written: Written, count: int, dtype: torch.dtype) -> None:
    checkpoint = Checkpoint(written.folder)
    state = below("transformer_blocks.1.", written.dit)
    for part in (TensorPart(i, count) for i in range(count)):
        assert_holds(checkpoint.dit_block(1, dtype, part), state, part, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", COUNTS)
def test_parts_of_step_llm(written: Written, count: int, dtype: torch.dtype) -> None:
    checkpoint = Checkpoint(written.folder)
    layer = below("transformer.layers.1.", written.llm)
    attention = {key: tensor for key, tensor in layer.items() if key.startswith("attention")}
    embeddings = below("", {key: tensor for key, tensor in written.llm.items() if key.startswith("tok_embeddings.")})
    for part in (TensorPart(i, count) for i in range(count)):
        assert_holds(checkpoint.step_llm(dtype, part), written.llm, part, dtype)
        assert_holds(checkpoint.llm_attention(1, dtype, part), attention, part, dtype)
        rest = {key: tensor for key, tensor in layer.items() if key not in attention}
        assert_holds(checkpoint.llm_feed_forward(1, dtype, part), rest, part, dtype)
        assert_holds(checkpoint.llm_embed(dtype), embeddings, part, dtype)


def test_a_long_matrix_is_copied_in_several_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a small block, rows of every tensor are read in many pieces, the last one shorter."""
    monkeypatch.setattr("stepvideo_serve.weights.files.CUT_BLOCK_BYTES", 7 * 48 * 2)
    state = values(meta_shapes(lambda: StepLLM(LLM)))
    write_json(tmp_path / "step_llm" / "config.json", llm_json(LLM))
    save_weights(tmp_path / "step_llm", "model", state)
    checkpoint = Checkpoint(tmp_path)
    for dtype in DTYPES:
        for part in (TensorPart(0, 4), TensorPart(3, 4)):
            assert_holds(checkpoint.step_llm(dtype, part), state, part, dtype)


def test_heads_that_do_not_divide(written: Written) -> None:
    checkpoint = Checkpoint(written.folder)
    with pytest.raises(SetupError, match=r"transformer_blocks\.0\..*tp = 3, axis . has 8 pieces"):
        checkpoint.dit_block(0, part=TensorPart(0, 3))
    with pytest.raises(SetupError, match=r"transformer\.layers\.0\..*tp = 16, axis . has 8 pieces"):
        checkpoint.step_llm(part=TensorPart(0, 16))


def test_a_part_of_other_weights_than_the_configuration_says(written: Written, tmp_path: Path) -> None:
    config = replace(LLM, num_groups=4)
    write_json(tmp_path / "step_llm" / "config.json", llm_json(config))
    save_weights(tmp_path / "step_llm", "model", written.llm)
    with pytest.raises(CheckpointError, match=r"attention\.wqkv\.weight with shape"):
        Checkpoint(tmp_path).step_llm(part=TensorPart(0, 2))
