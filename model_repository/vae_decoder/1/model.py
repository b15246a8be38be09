"""Triton loads this file; the model is stepvideo_serve.serving.stage_models.VaeDecoderModel."""

from stepvideo_serve.serving.stage_models import VaeDecoderModel as TritonPythonModel

__all__ = ["TritonPythonModel"]
