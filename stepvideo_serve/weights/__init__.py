"""Reading checkpoints in the official layout."""
