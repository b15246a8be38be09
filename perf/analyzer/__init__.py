"""perf_analyzer on the real server, and a report of what it measured."""
