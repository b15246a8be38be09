"""Starting, asking and supervising the server: everything outside the server's own processes.

Free of torch, numpy and the configuration: a probe or a supervisor must start in a moment.
"""
