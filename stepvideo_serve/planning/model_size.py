"""From the networks' configurations to the numbers that the planner needs (cost.py), without any weights.

Parameters are counted on the meta device, where tensors have shapes only, FLOPs of the Video-VAE by running it there.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from stepvideo_serve.assembly.checkpoint import Checkpoint, meta_shapes
from stepvideo_serve.dit.config import FFN_MULTIPLE, DiTConfig
from stepvideo_serve.dit.embeddings import SINUSOID_CHANNELS
from stepvideo_serve.dit.model import StepVideoDiT
from stepvideo_serve.dit.sharding import dit_plan
from stepvideo_serve.geometry import LATENTS_PER_CHUNK, VideoGeometry
from stepvideo_serve.memory.sizes import BF16_BYTES, ModelSize, Parameters, Workload
from stepvideo_serve.text.sharding import llm_plan
from stepvideo_serve.text.states import CLIP_TOKENS, LLM_MAX_TOKENS
from stepvideo_serve.text.step_llm import StepLLM, StepLLMConfig
from stepvideo_serve.vae.config import VAEConfig
from stepvideo_serve.vae.model import VideoDecoder, VideoEncoder, VideoVAE
from stepvideo_serve.weights.cuts import ShardPlan
from stepvideo_serve.weights.json_file import integer, read_json_object

CLIP_FIELDS = (
    *("hidden_size", "num_hidden_layers", "intermediate_size"),
    *("vocab_size", "max_position_embeddings", "type_vocab_size"),
)


@dataclass(frozen=True)
class ModelConfigs:
    """Of all networks; `clip` holds the CLIP_FIELDS of Hunyuan-CLIP's config.json."""

    dit: DiTConfig
    llm: StepLLMConfig
    vae: VAEConfig
    clip: Mapping[str, int]

    @classmethod
    def load(cls, folder: Path) -> "ModelConfigs":
        """From a checkpoint, of whose weights only the VAE's headers are read. Raises CheckpointError."""
        checkpoint = Checkpoint(folder)
        clip_file = folder / "hunyuan_clip" / "clip_text_encoder" / "config.json"
        values = read_json_object(clip_file)
        clip = {name: integer(values, name, str(clip_file)) for name in CLIP_FIELDS}
        return cls(checkpoint.dit_config, checkpoint.llm_config, checkpoint.vae_config, clip)


# The published Step-Video-TI2V: transformer/config.json, step_llm/config.json and clip_text_encoder/config.json of the
# release, and the Video-VAE's widths in the official code.
PUBLISHED = ModelConfigs(
    dit=DiTConfig(
        num_heads=48,
        num_layers=48,
        in_channels=64,
        out_channels=64,
        patch_size=1,
        llm_channels=6144,
        clip_channels=1024,
    ),
    llm=StepLLMConfig(
        width=6144, num_heads=48, num_groups=8, num_layers=48, ffn_width=16896, vocab_size=65536, norm_eps=1e-5
    ),
    vae=VAEConfig(
        z_channels=64,
        num_res_blocks=2,
        encoder_stem=32,
        encoder_widths=(128, 256, 512, 512),
        decoder_widths=(128, 256, 512, 512),
    ),
    clip=dict(zip(CLIP_FIELDS, (1024, 24, 4096, 47020, 512, 2), strict=True)),
)


def model_size(configs: ModelConfigs) -> ModelSize:
    """Dimensions of the DiT, and parameters of all networks."""
    dit, llm, vae = configs.dit, configs.llm, configs.vae
    of_vae = meta_shapes(lambda: VideoVAE(vae))
    return ModelSize(
        width=dit.width,
        heads=dit.num_heads,
        layers=dit.num_layers,
        hidden=FFN_MULTIPLE * dit.width,
        patch_in=2 * dit.patch_values,
        patch_out=dit.out_channels * dit.patch_size**2,
        time_channels=SINUSOID_CHANNELS,
        dit=_parameters(meta_shapes(lambda: StepVideoDiT(dit)), dit_plan(dit)),
        llm=_parameters(meta_shapes(lambda: StepLLM(llm)), llm_plan(llm)),
        llm_groups=llm.num_groups,
        clip_parameters=bert_parameters(configs.clip),
        vae_encoder_parameters=sum(prod(of_vae[key]) for key in of_vae if key.startswith("encoder.")),
        vae_decoder_parameters=sum(prod(of_vae[key]) for key in of_vae if key.startswith("decoder.")),
    )


def _parameters(shapes: Mapping[str, tuple[int, ...]], plan: ShardPlan) -> Parameters:
    patterns = [pattern for pattern, split in plan.patterns.items() if split is not None]
    cut = sum(prod(shape) for key, shape in shapes.items() if any(fnmatchcase(key, pattern) for pattern in patterns))
    return Parameters(cut=cut, whole=sum(prod(shape) for shape in shapes.values()) - cut)


def bert_parameters(clip: Mapping[str, int]) -> int:
    """Of a BERT with pooler (arXiv 1810.04805), from the fields of its config.json."""
    width, hidden = clip["hidden_size"], clip["intermediate_size"]
    vectors = clip["vocab_size"] + clip["max_position_embeddings"] + clip["type_vocab_size"]
    norm = 2 * width
    attention = 4 * (width * width + width) + norm
    feed_forward = 2 * width * hidden + hidden + width + norm
    layers = clip["num_hidden_layers"] * (attention + feed_forward)
    return vectors * width + norm + layers + width * width + width


def workload(configs: ModelConfigs, geometry: VideoGeometry, steps: int, both_orientations: bool = False) -> Workload:
    """One guided request with two texts of full length. Hunyuan-CLIP's work, below 1 % of Step-LLM's, is left out.
    both_orientations: engines reserve memory for the video's height and width exchanged, too."""
    dit, width, text_tokens = configs.dit, configs.dit.width, CLIP_TOKENS + LLM_MAX_TOKENS
    longer = max(geometry.height, geometry.width)
    largest = (longer, longer) if both_orientations else (geometry.height, geometry.width)
    keys_values = dit.num_layers * 4 * text_tokens * width**2
    context = 2 * LLM_MAX_TOKENS * (dit.llm_channels + width) * width + 2 * CLIP_TOKENS * dit.clip_channels * width
    return Workload(
        tokens=geometry.tokens // dit.patch_size**2,
        text_tokens=text_tokens,
        steps=steps,
        chunks=geometry.chunks,
        prepare_flops=2 * (keys_values + context),
        llm_flops=2 * _llm_flops(configs.llm),
        encode_flops=_encoder_flops(configs.vae, geometry),
        chunk_flops=_decoder_flops(configs.vae, geometry),
        chunk_bytes=decoder_bytes(configs.vae, *largest),
        image_bytes=encoder_bytes(configs.vae, *largest),
    )


def _llm_flops(llm: StepLLMConfig) -> float:
    """One text of full length; the attention core is counted in full, although half of it is masked."""
    attention = 2 * llm.width**2 + 2 * llm.width * llm.head_dim * llm.num_groups
    matrices = attention + 3 * llm.width * llm.ffn_width
    return llm.num_layers * (2 * matrices * LLM_MAX_TOKENS + 4 * LLM_MAX_TOKENS**2 * llm.width)


def _decoder_flops(vae: VAEConfig, geometry: VideoGeometry) -> float:
    """One chunk: counted while the decoder runs on the meta device, which computes nothing."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        latents = torch.empty(1, LATENTS_PER_CHUNK, vae.z_channels, geometry.latent_height, geometry.latent_width)
        VideoDecoder(vae)(latents)
    return float(counter.get_total_flops())


def _encoder_flops(vae: VAEConfig, geometry: VideoGeometry) -> float:
    """One image, counted in the same way."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        VideoEncoder(vae)(torch.empty(1, 1, 3, geometry.height, geometry.width))
    return float(counter.get_total_flops())


def decoder_bytes(vae: VAEConfig, height: int, width: int) -> int:
    """Peak of a bf16 decoder on one chunk of height x width pixels, without the convolutions' own workspace.

    It comes in the first residual block at full resolution: 20 frames (three are dropped later) at the width of the
    level before, as they came in and after norm and SiLU, once more padded by two frames, and the result.
    """
    wide, narrow = vae.decoder_widths[1], vae.decoder_widths[0]
    return height * width * (20 * (2 * wide + narrow) + 22 * wide) * BF16_BYTES


def encoder_bytes(vae: VAEConfig, height: int, width: int) -> int:
    """The same of the encoder on one image. It comes in the second residual block at full resolution: its input, the
    result of the first convolution as it is and after norm and SiLU, once more padded by two frames, and the result,
    beside the picture and its first channels."""
    return height * width * (7 * vae.encoder_widths[0] + vae.encoder_stem + 3) * BF16_BYTES
