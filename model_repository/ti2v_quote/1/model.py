"""Triton loads this file; the model is stepvideo_serve.serving.public.QuoteModel."""

from stepvideo_serve.serving.public import QuoteModel as TritonPythonModel

__all__ = ["TritonPythonModel"]
