"""The diffusion transformer (DiT): latent tokens, text context and motion score -> velocity."""
