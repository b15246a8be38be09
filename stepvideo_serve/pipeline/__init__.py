"""One request from its first call to its mp4: the stages in their order, and the checks of the result."""
