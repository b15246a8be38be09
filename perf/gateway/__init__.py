"""The gateway under load, against the same servers driven directly: python -m perf.gateway (`make bench-gateway`)."""
