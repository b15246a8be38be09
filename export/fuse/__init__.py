"""Which fused operator each part of a network gets, and the translation of these operators to ONNX."""
