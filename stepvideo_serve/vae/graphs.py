"""What the two halves of the Video-VAE take and give as graphs."""

from stepvideo_serve.engine.spec import Dim, EngineSpec, TensorSpec
from stepvideo_serve.geometry import FRAMES_PER_CHUNK, LATENTS_PER_CHUNK
from stepvideo_serve.vae.config import VAEConfig

LATENT_SIDES = {"latent_height": Dim(min=2, opt=34, max=128), "latent_width": Dim(min=2, opt=62, max=128)}
LATENT = ("latent_height", "latent_width")
PIXELS = ("16*latent_height", "16*latent_width")


def vae_encoder_spec(config: VAEConfig, dtype: str) -> EngineSpec:
    """One image; the log variance is clamped as in the official posterior."""
    posterior = (1, 1, config.z_channels, *LATENT)
    return EngineSpec(
        "vae_encoder",
        inputs=(TensorSpec("pixels", dtype, (1, 1, 3, *PIXELS)),),
        outputs=(TensorSpec("latent_mean", dtype, posterior), TensorSpec("latent_logvar", dtype, posterior)),
        dims=LATENT_SIDES,
    )


def vae_decoder_spec(config: VAEConfig, dtype: str) -> EngineSpec:
    """One chunk."""
    return EngineSpec(
        "vae_decoder",
        inputs=(TensorSpec("latents", dtype, (1, LATENTS_PER_CHUNK, config.z_channels, *LATENT)),),
        outputs=(TensorSpec("frames", dtype, (1, FRAMES_PER_CHUNK, 3, *PIXELS)),),
        dims=LATENT_SIDES,
    )
