"""FP8: what ranges the activations have (observers, calibration), graphs that compute in E4M3 (fp8), and which layers
suffer from it (sensitivity)."""
