"""Sparse MLPs (DEFT): read only the weights of neurons that are on."""

from .config import DeftConfig
from .deft import Deft

__all__ = ["Deft", "DeftConfig"]
