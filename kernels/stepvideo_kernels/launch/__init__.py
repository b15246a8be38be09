"""Machine code -> a running kernel: packed parameters, the loaded library, the CUDA driver."""
