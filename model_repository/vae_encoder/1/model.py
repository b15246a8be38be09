"""Triton loads this file; the model is stepvideo_serve.serving.stage_models.VaeEncoderModel."""

from stepvideo_serve.serving.stage_models import VaeEncoderModel as TritonPythonModel

__all__ = ["TritonPythonModel"]
