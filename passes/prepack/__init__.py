"""Prepacking: run a padded batch without its pads."""

from .prepack import Prepack, PrepackConfig

__all__ = ["Prepack", "PrepackConfig"]
