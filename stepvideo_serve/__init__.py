"""Serve Step-Video-TI2V (text + first image + motion score -> video) from Triton Inference Server."""
