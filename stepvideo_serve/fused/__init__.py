"""Modules of the networks replaced by fused operators, and their FP8 and NVFP4 layers: for export, and for torch."""
