"""Source of the kernels -> machine code for every GPU generation, and the table that describes it."""
