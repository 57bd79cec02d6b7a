"""Layers that are alike are traced, captured and proven once: a model is compiled by a copy of itself with few of them."""

from .calls import ByLayers

__all__ = ["ByLayers"]
