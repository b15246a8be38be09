"""Fused GPU kernels of the DiT, Step-LLM and the Video-VAE, in the Triton language.

"The Triton language" is the compiler that kernels are written for; "Triton" alone is the server everywhere in this
project.
"""
