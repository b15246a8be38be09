"""Video-VAE v2: image -> latent, latent -> frames, in independent chunks of 17 frames <-> 3 latents."""
