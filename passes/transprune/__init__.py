"""TransPrune, FastV and PyramidDrop: leave out image tokens that later layers do not need."""

from .transprune import TransPrune

__all__ = ["TransPrune"]
