"""Is a graph or an engine what torch computes? One graph, one engine, or a whole loop against the reference."""
