"""Triton loads this file; the model is stepvideo_serve.serving.stages.VaeEncoderModel."""

from stepvideo_serve.serving.stages import VaeEncoderModel as TritonPythonModel

__all__ = ["TritonPythonModel"]
