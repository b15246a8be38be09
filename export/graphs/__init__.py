"""From a module to an ONNX file: what is to be written (recipe, placement), and how (writer)."""
