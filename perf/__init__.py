"""Benchmarks: ratios of two things measured in the same run. Nothing here is a test."""
