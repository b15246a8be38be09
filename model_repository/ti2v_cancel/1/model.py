"""Triton loads this file; the model is stepvideo_serve.serving.cancel.CancelModel."""

from stepvideo_serve.serving.cancel import CancelModel as TritonPythonModel

__all__ = ["TritonPythonModel"]
