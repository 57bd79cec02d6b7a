"""What a program costs on a device: prices of nodes, and who is paid for what."""

from . import prices  # noqa: F401 (registers the prices)
from .model import CostModel

__all__ = ["CostModel"]
