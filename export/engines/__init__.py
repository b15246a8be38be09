"""ONNX graphs -> engines: each built in a process of its own, its plan checked, the result recorded in a manifest."""
