"""The kernels as layers of TensorRT: the form of a plugin, its registration, its node in ONNX."""
