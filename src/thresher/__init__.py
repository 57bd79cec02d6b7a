"""Thresher computes only the grain: graph rewrites that take the waste out of transformer inference."""

__version__ = "0.1.0"
