"""Triton loads this file; the model is stepvideo_serve.serving.denoiser.DenoiserModel."""

from stepvideo_serve.serving.denoiser import DenoiserModel as TritonPythonModel

__all__ = ["TritonPythonModel"]
