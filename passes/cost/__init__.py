"""What a program costs on a device: prices of nodes, and who is paid for what."""

from .model import CostModel

__all__ = ["CostModel"]
