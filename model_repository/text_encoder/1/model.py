"""Triton loads this file; the model is stepvideo_serve.serving.stage_models.TextEncoderModel."""

from stepvideo_serve.serving.stage_models import TextEncoderModel as TritonPythonModel

__all__ = ["TritonPythonModel"]
