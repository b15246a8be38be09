"""Triton loads this file; the model is stepvideo_serve.serving.public.StreamingModel."""

from stepvideo_serve.serving.public import StreamingModel as TritonPythonModel

__all__ = ["TritonPythonModel"]
