"""One module per family of separators: the published network, and the graph that is exported."""
