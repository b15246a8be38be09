"""Golden tensors, computed by the official code, and their recomputation with this package."""
