"""What one request takes: memory, seconds, threads, files, shared memory; by size, before it waits until it is over."""
