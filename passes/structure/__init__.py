"""The transformer in a graph, recovered once and read by every pass."""
