"""Both halves under the official key names: `encoder.*` and `decoder.*`."""

from torch import nn

from stepvideo_serve.vae.config import VAEConfig
from stepvideo_serve.vae.decoder import VideoDecoder
from stepvideo_serve.vae.encoder import VideoEncoder


class VideoVAE(nn.Module):
    """Holder of the two networks, used for their keys and shapes; they run apart."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.encoder = VideoEncoder(config)
        self.decoder = VideoDecoder(config)
