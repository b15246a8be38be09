"""Keys and shapes of the networks in their official sizes, on the meta device.

The counts are those of the official code; the digests pin every key and shape, so that no rename goes unnoticed.
Configurations: `transformer/config.json`, `step_llm/config.json` and the CLIP's config.json of the official release;
the Video-VAE's widths are 32 x (4, 8, 16, 16) and 128 x (1, 2, 4, 4) in the official code.
"""

import hashlib
from math import prod

import pytest
from transformers import BertConfig

from stepvideo_serve.assembly.checkpoint import meta_shapes
from stepvideo_serve.dit.config import DiTConfig
from stepvideo_serve.dit.model import StepVideoDiT
from stepvideo_serve.text.hunyuan_clip import HunyuanClip
from stepvideo_serve.text.step_llm import StepLLM, StepLLMConfig
from stepvideo_serve.vae.config import VAEConfig
from stepvideo_serve.vae.model import VideoVAE

Shapes = dict[str, tuple[int, ...]]

DIT_JSON = {
    "num_attention_heads": 48,
    "attention_head_dim": 128,
    "num_layers": 48,
    "in_channels": 64,
    "out_channels": 64,
    "patch_size": 1,
    "caption_channels": [6144, 1024],
    "use_additional_conditions": True,
}
LLM = StepLLMConfig(
    width=6144, num_heads=48, num_groups=8, num_layers=48, ffn_width=16896, vocab_size=65536, norm_eps=1e-5
)
CLIP_JSON = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "vocab_size": 47020,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
}
VAE = VAEConfig(
    z_channels=64,
    num_res_blocks=2,
    encoder_stem=32,
    encoder_widths=(128, 256, 512, 512),
    decoder_widths=(128, 256, 512, 512),
)


@pytest.fixture(scope="module")
def full_size() -> dict[str, Shapes]:
    """Part -> keys and shapes under the modules' names; those of the CLIP as in its file."""
    clip = meta_shapes(lambda: HunyuanClip(BertConfig.from_dict(CLIP_JSON)))
    vae = meta_shapes(lambda: VideoVAE(VAE))
    return {
        "dit": meta_shapes(lambda: StepVideoDiT(DiTConfig.from_dict(DIT_JSON, "the official file"))),
        "llm": meta_shapes(lambda: StepLLM(LLM)),
        "clip": {key.removeprefix("bert."): shape for key, shape in clip.items()},
        "encoder": {key: shape for key, shape in vae.items() if key.startswith("encoder.")},
        "decoder": {key: shape for key, shape in vae.items() if key.startswith("decoder.")},
    }


@pytest.mark.parametrize(
    ("part", "keys", "parameters"),
    [
        ("dit", 789, 29_382_205_504),
        ("llm", 289, 19_579_600_896),
        ("clip", 391, 352_035_840),
        ("encoder", 110, 109_885_696),
        ("decoder", 152, 388_933_123),
    ],
)
def test_number_of_keys_and_parameters(full_size: dict[str, Shapes], part: str, keys: int, parameters: int) -> None:
    shapes = full_size[part]
    assert len(shapes) == keys
    assert sum(prod(shape) for shape in shapes.values()) == parameters


@pytest.mark.parametrize(
    ("part", "key", "shape"),
    [
        ("dit", "pos_embed.proj.weight", (6144, 128, 1, 1)),
        ("dit", "adaln_single.emb.motion_score_embedder.linear_1.weight", (6144, 256)),
        ("dit", "adaln_single.linear.weight", (36864, 6144)),
        ("dit", "caption_projection.linear_1.weight", (6144, 6144)),
        ("dit", "clip_projection.weight", (6144, 1024)),
        ("dit", "transformer_blocks.47.attn1.wqkv.weight", (18432, 6144)),
        ("dit", "transformer_blocks.47.attn2.wkv.weight", (12288, 6144)),
        ("dit", "transformer_blocks.0.attn2.k_norm.weight", (128,)),
        ("dit", "transformer_blocks.0.ff.net.0.proj.weight", (24576, 6144)),
        ("dit", "transformer_blocks.0.ff.net.2.weight", (6144, 24576)),
        ("dit", "proj_out.weight", (64, 6144)),
        ("llm", "tok_embeddings.word_embeddings.weight", (65536, 6144)),
        ("llm", "transformer.layers.47.attention.wqkv.weight", (8192, 6144)),
        ("llm", "transformer.layers.0.feed_forward.w1.weight", (33792, 6144)),
        ("clip", "embeddings.position_embeddings.weight", (512, 1024)),
        ("clip", "pooler.dense.weight", (1024, 1024)),
        ("encoder", "encoder.conv_in.conv.weight", (32, 3, 3, 3, 3)),
        ("encoder", "encoder.down.0.block.0.nin_shortcut.conv.weight", (128, 32, 1, 1, 1)),
        ("encoder", "encoder.conv_out.conv.weight", (128, 2048, 3, 3, 3)),
        ("decoder", "decoder.conv_unpatchify.conv.conv.weight", (4096, 2048, 3, 3, 3)),
        ("decoder", "decoder.up.3.upsample.conv3d.conv1.conv.weight", (512, 512, 3, 3, 3)),
        ("decoder", "decoder.up.1.upsample.conv.weight", (256, 256, 3, 3)),
        ("decoder", "decoder.conv_out.conv.weight", (3, 128, 3, 3, 3)),
    ],
)
def test_known_keys(full_size: dict[str, Shapes], part: str, key: str, shape: tuple[int, ...]) -> None:
    assert full_size[part][key] == shape


@pytest.mark.parametrize(
    ("part", "digest"),
    [
        ("dit", "3e28645710ae51f2f0e7ba4152bb69d10f7589865fce27bc07130b3c38f21612"),
        ("llm", "07dca3ed15ad07ce09e67714b106a1cad5a6007b6bcebc7845430f743b9df2e4"),
        ("clip", "71497aa7379a3f0b6e7c6e64bbb0f31f8f51bc94725d7c52f4bd720c310b6355"),
        ("encoder", "d7de1c8914d669d8cf9eed5e7434d8bae374d708876178ae13c7280b06f51126"),
        ("decoder", "1877afad9083886998dd05000121985d0bb48e011dc6a2270a55bb128b801bd5"),
    ],
)
def test_every_key_and_shape(full_size: dict[str, Shapes], part: str, digest: str) -> None:
    lines = "\n".join(sorted(f"{key} {list(shape)}" for key, shape in full_size[part].items()))
    assert hashlib.sha256(lines.encode()).hexdigest() == digest


def test_the_vae_is_recognised_by_its_shapes(full_size: dict[str, Shapes]) -> None:
    assert VAEConfig.from_shapes({**full_size["encoder"], **full_size["decoder"]}, "the official file") == VAE
