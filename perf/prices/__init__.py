"""What presets of quality cost on a checkpoint, against its exact runs: `python -m perf.prices`, make prices."""
