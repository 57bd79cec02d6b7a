"""Linears over integer weights of 2 to 8 bits."""

from . import cpu, cuda, linear, plain

__all__ = ["cpu", "cuda", "linear", "plain"]
