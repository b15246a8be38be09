"""Triton loads this file; the model is stepvideo_serve.serving.public.UnaryModel."""

from stepvideo_serve.serving.public import UnaryModel as TritonPythonModel

__all__ = ["TritonPythonModel"]
