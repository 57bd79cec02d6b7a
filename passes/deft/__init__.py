"""Sparse MLPs (DEFT): read only the weights of neurons that are on."""

from .deft import Deft, DeftConfig

__all__ = ["Deft", "DeftConfig"]
