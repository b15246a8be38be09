"""FP8: what ranges the activations have (observers, calibration), graphs that compute in E4M3 (fp8), their weights
made once for all layouts (weight_set, shards), and which layers suffer from it (sensitivity)."""
