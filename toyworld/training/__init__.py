"""Training the toy world's Video-VAE and DiT on a CPU."""
