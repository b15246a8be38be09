"""Running compiled graphs: the spec of a graph, the runners, and the manifest of an engine directory."""
