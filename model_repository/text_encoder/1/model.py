"""Triton loads this file; the model is stepvideo_serve.serving.stages.TextEncoderModel."""

from stepvideo_serve.serving.stages import TextEncoderModel as TritonPythonModel

__all__ = ["TritonPythonModel"]
