"""Layers that are alike are traced, captured and proven once: a model is compiled by a copy of itself with few of them."""

from .further import Further
from .short import Short

__all__ = ["Further", "Short"]
