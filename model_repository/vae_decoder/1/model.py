"""Triton loads this file; the model is stepvideo_serve.serving.stages.VaeDecoderModel."""

from stepvideo_serve.serving.stages import VaeDecoderModel as TritonPythonModel

__all__ = ["TritonPythonModel"]
