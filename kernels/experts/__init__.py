"""Products in which each row has a matrix of its own among several: the experts of a mixture."""

from . import linear, nvfp4, wna16

__all__ = ["linear", "nvfp4", "wna16"]
