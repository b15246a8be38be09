"""Token-causal attention of the Video-VAE: one head as wide as the feature map has channels."""
