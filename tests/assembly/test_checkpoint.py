"""What a checkpoint gives when its files are right, in each of the forms that they come in."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import BertModel

from export.tiny_checkpoint import DEFAULT_SEED, random_state
from stepvideo_serve.assembly.checkpoint import Checkpoint
from tests.assembly.edits import clip_as_state_dict, linked_copy, rewrite
from tests.mini import MINI

State = dict[str, Tensor]
DTYPES = (torch.float32, torch.bfloat16)
VAE_FILE = Path("vae/vae_v2.safetensors")
DIT_STEM = "diffusion_pytorch_model"


@pytest.fixture
def copy(mini_checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint that the test may change."""
    return linked_copy(mini_checkpoint, tmp_path / "copy")


def written(part: str) -> State:
    """What went into the files of `part`, under the modules' names."""
    return random_state(MINI.shapes()[part], DEFAULT_SEED)


def starting_with(state: State, prefix: str) -> State:
    return {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}


def assert_holds(module: nn.Module, state: State, dtype: torch.dtype = torch.float32) -> None:
    loaded = module.state_dict()
    assert loaded.keys() == state.keys()
    for key, tensor in loaded.items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, state[key].to(dtype)), key
    assert not module.training
    assert not any(parameter.requires_grad for parameter in module.parameters())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_network_has_the_weights_of_its_files(mini_checkpoint: Path, dtype: torch.dtype) -> None:
    checkpoint = Checkpoint(mini_checkpoint)
    vae = written("vae")
    assert_holds(checkpoint.dit(dtype), written("dit"), dtype)
    assert_holds(checkpoint.step_llm(dtype), written("llm"), dtype)
    assert_holds(checkpoint.clip(dtype).bert, written("clip"), dtype)
    assert_holds(checkpoint.vae_encoder(dtype), starting_with(vae, "encoder."), dtype)
    assert_holds(checkpoint.vae_decoder(dtype), starting_with(vae, "decoder."), dtype)


def test_configurations_are_read_from_files_and_shapes(mini_checkpoint: Path) -> None:
    checkpoint = Checkpoint(mini_checkpoint)
    assert checkpoint.dit_config == MINI.dit
    assert checkpoint.llm_config == MINI.llm
    assert checkpoint.vae_config == MINI.vae
    assert checkpoint.clip_config.hidden_size == MINI.clip.width


def test_the_dit_can_be_had_in_pieces(mini_checkpoint: Path) -> None:
    checkpoint = Checkpoint(mini_checkpoint)
    state = written("dit")
    outer = {key: tensor for key, tensor in state.items() if not key.startswith("transformer_blocks.")}
    assert_holds(checkpoint.dit_outer(), outer)
    for index in range(MINI.dit.num_layers):
        assert_holds(checkpoint.dit_block(index), starting_with(state, f"transformer_blocks.{index}."))


def shards_without_index(folder: Path) -> None:
    (folder / f"transformer/{DIT_STEM}.safetensors.index.json").unlink()


def a_single_file(folder: Path) -> None:
    for path in (folder / "transformer").glob("*.safetensors*"):
        path.unlink()
    save_file(written("dit"), folder / f"transformer/{DIT_STEM}.safetensors")


def a_file_that_the_index_does_not_name(folder: Path) -> None:
    source = folder / f"transformer/{DIT_STEM}-00001-of-00002.safetensors"
    shutil.copy(source, source.with_name(f"{DIT_STEM}.safetensors"))


@pytest.mark.parametrize("change", [shards_without_index, a_single_file, a_file_that_the_index_does_not_name])
def test_weights_come_single_or_sharded(copy: Path, change: Callable[[Path], None]) -> None:
    change(copy)
    assert_holds(Checkpoint(copy).dit(), written("dit"))


def test_the_last_convolution_of_the_vae_has_another_name_in_the_file(copy: Path) -> None:
    with safe_open(copy / VAE_FILE, framework="pt") as file:
        names = {key for key in file.keys() if "conv_out" in key}  # noqa: SIM118  # not a mapping
    quirky = {"decoder.conv_out.weight", "decoder.conv_out.bias"}
    assert names == {*quirky, "encoder.conv_out.conv.weight", "encoder.conv_out.conv.bias"}

    def to_module_names(state: State) -> None:
        for name in quirky:
            state[name.replace("conv_out.", "conv_out.conv.")] = state.pop(name)

    rewrite(copy / VAE_FILE, to_module_names)
    assert_holds(Checkpoint(copy).vae_decoder(), starting_with(written("vae"), "decoder."))


@pytest.mark.parametrize("prefix", ["", "bert."])
def test_clip_comes_as_a_state_dict_too(copy: Path, prefix: str) -> None:
    head = {
        "cls.predictions.bias": torch.zeros(5),
        "cls.seq_relationship.weight": torch.zeros(2, MINI.clip.width),
        f"{prefix}embeddings.position_ids": torch.arange(MINI.clip.max_positions)[None],
    }
    clip_as_state_dict(copy, prefix, head)
    assert_holds(Checkpoint(copy).clip().bert, written("clip"))


def test_clip_computes_what_transformers_does(mini_checkpoint: Path) -> None:
    """Buffers that no file holds have to be right as well."""
    checkpoint = Checkpoint(mini_checkpoint)
    reference = BertModel(checkpoint.clip_config)
    reference.load_state_dict({key: tensor.float() for key, tensor in written("clip").items()})
    reference.train(False)
    ids, mask = checkpoint.clip_tokenizer().encode("A small boat 小船")
    with torch.inference_mode():
        expected = reference(input_ids=ids, attention_mask=mask)
        states, pooled = checkpoint.clip()(ids, mask)
    assert torch.equal(states, expected.last_hidden_state)
    assert torch.equal(pooled, expected.pooler_output)


def test_no_network_shares_memory_with_another_load(mini_checkpoint: Path) -> None:
    checkpoint = Checkpoint(mini_checkpoint)
    before = checkpoint.dit_block(0, torch.bfloat16)
    before.scale_shift_table.zero_()
    after = checkpoint.dit_block(0, torch.bfloat16)
    assert torch.equal(after.scale_shift_table, written("dit")["transformer_blocks.0.scale_shift_table"])


def test_digests_follow_the_files_behind_a_prefix(copy: Path) -> None:
    index = json.loads((copy / f"transformer/{DIT_STEM}.safetensors.index.json").read_text(encoding="utf-8"))
    outside, inside = min(index["weight_map"]), max(index["weight_map"])
    asked = [("dit", outside), ("dit", inside), ("dit", ""), ("llm", ""), ("clip", ""), ("vae", "")]

    def digests() -> list[str]:
        checkpoint = Checkpoint(copy)
        return [checkpoint.digest(part, prefix) for part, prefix in asked]

    before = digests()
    assert len(set(before)) == len(asked)
    assert digests() == before
    rewrite(copy / "transformer" / index["weight_map"][inside], lambda state: state[inside].mul_(2))
    changed = [new != old for new, old in zip(digests(), before, strict=True)]
    assert changed == [False, True, True, False, False, False]
