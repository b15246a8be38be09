"""What operators see of a running server: logs, metrics, traces, and the watches that write them."""
