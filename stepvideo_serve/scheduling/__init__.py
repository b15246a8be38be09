"""Who goes first, what goes on after a failure, and which results are kept. Knows neither Triton nor torch."""
