"""Triton loads this file; the model is stepvideo_serve.serving.quote_model.QuoteModel."""

from stepvideo_serve.serving.quote_model import QuoteModel as TritonPythonModel

__all__ = ["TritonPythonModel"]
